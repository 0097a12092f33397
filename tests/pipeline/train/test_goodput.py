"""Where a run's time went, by logs whose sums are worked out by hand, and by logs that are cut off or foreign."""

import itertools
import json
import types

import pytest

from pipeline.train import attempts
from pipeline.train.attempts import AttemptFile, RankAttempt, command_attempt, read_file, saved_step
from pipeline.train.goodput import PARTS, goodput


def write_log(run_dir, name, lines):
    (run_dir / "attempts").mkdir(exist_ok=True)
    (run_dir / "attempts" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def note(at, step, *, steps=0.0, compiling=0.0, save=0.0, event="step", slowest="align", **waits):
    sums = {"steps_s": steps, "compile_wait_s": compiling, "save_s": save, "waits": waits, "slowest": slowest}
    return {"event": event, "at": at, "step": step} | sums


def opened(at, start_step, **facts):
    return {"event": "open", "at": at, "start_step": start_step} | facts


# Killed at step 30 with a checkpoint of step 20; 100 s later run again to step 40, evaluated and reported.
KILLED = [
    opened(30.0, 0, world_size=2, advice={"align": "use more CPUs"}),
    # Began its loop at 40 s: 4 s for the compiler, 3 s for data, 3 s of step.
    note(50.0, 1, steps=3.0, compiling=4.0, decode=2.0, devices=1.0),
    note(150.0, 20, steps=80.0, compiling=4.0, save=1.0, decode=20.0, devices=5.0),
    note(200.0, 30, steps=120.0, compiling=4.0, save=1.0, decode=29.0, devices=6.0),
]
AGAIN = [
    opened(320.0, 20, world_size=2, advice={"align": "use more CPUs"}),
    note(345.0, 21, steps=2.0, compiling=1.0, decode=2.0),
    note(440.0, 40, steps=77.0, compiling=1.0, save=2.0, decode=20.0),
    note(441.0, 40, steps=77.0, compiling=1.0, save=3.0, decode=20.0, event="trained"),
]
COMMANDS = [
    {"event": "begin", "at": 0.0},
    {"event": "begin", "at": 300.0},
    {"event": "seen", "at": 460.0},
    {"event": "end", "at": 461.0, "outcome": "done"},
]


def test_a_run_that_was_killed_and_run_again(tmp_path):
    write_log(tmp_path, "command.jsonl", COMMANDS)
    write_log(tmp_path, "rank-0.jsonl", KILLED + AGAIN)
    life = goodput(tmp_path)
    assert life.wall_s == 461 and life.down_s == 100 and life.up_s == 361
    expected = {
        "steps": 80 + 77,
        "data": 25 + 20,
        "compile": 4 + 1,
        "start": 40 + 40,
        "save": 1 + 3,
        # Steps 21 to 30 of the first attempt: 40 s, and 10 s of waits.
        "lost": 40 + 10,
        "end": 20,
        "evaluate": 0,
        "other": 0,
    }
    assert life.parts_s == pytest.approx(expected)
    assert (life.lost_steps, life.values()["restarts"]) == (10, 1)
    assert life.waits_s == pytest.approx({"decode": 40, "devices": 5})
    assert life.advice == "most of it for decoded batches of align: use more CPUs"
    values = life.values()
    assert sum(values["share_of_up"].values()) == pytest.approx(1, abs=1e-4)
    assert sum(values["share_of_wall"].values()) == pytest.approx(1, abs=1e-4)
    assert values["share_of_wall"]["down"] == pytest.approx(100 / 461, abs=1e-5)
    assert [a.outcome for a in life.attempts] == [None, "done"]


def test_a_checkpoint_between_two_notes_and_an_older_one_than_a_later_attempt_began_with(tmp_path):
    """Three attempts: to 30; from 25 to 40; from 10, whose checkpoint took the place of a damaged one."""
    third = [opened(620.0, 10), note(625.0, 11, steps=5.0), note(700.0, 40, steps=80.0, event="trained")]
    second = [opened(320.0, 25), note(330.0, 26, steps=10.0), note(360.0, 40, steps=40.0, event="trained")]
    write_log(tmp_path, "rank-0.jsonl", KILLED + second + third)
    life = goodput(tmp_path)
    # Nine of the nineteen steps from 1 to 20 took 9 * 77 / 19 s.
    kept = 3 + 77 * 9 / 19
    assert life.parts_s["steps"] == pytest.approx(kept + 80)
    assert life.lost_steps == 20 + 15
    waited, kept_waits = 35, 3 + 22 * 9 / 19
    assert life.parts_s["lost"] == pytest.approx(120 - kept + 40 + waited - kept_waits)
    # Without a command's log an attempt begins with its rank: 10 s before the loop of the first.
    assert life.parts_s["start"] == pytest.approx(10 + 0 + 0)
    assert sum(life.parts_s.values()) == pytest.approx(life.up_s)


def test_workers_that_start_again_within_one_command_are_another_attempt(tmp_path):
    write_log(tmp_path, "command.jsonl", [COMMANDS[0], {"event": "end", "at": 461.0, "outcome": "stopped"}])
    write_log(tmp_path, "rank-0.jsonl", KILLED + AGAIN)
    life = goodput(tmp_path)
    assert life.down_s == 120 and life.parts_s["start"] == pytest.approx(40 + 20)
    assert [a.outcome for a in life.attempts] == [None, "stopped"]


def test_commands_that_trained_nothing(tmp_path):
    """A start that failed after 7 s, one that was killed at once, an evaluation of 11 s."""
    lines = [
        {"event": "begin", "at": 0.0},
        {"event": "end", "at": 7.0, "outcome": "failed: no room"},
        {"event": "begin", "at": 10.0},
        {"event": "begin", "at": 20.0},
        {"event": "end", "at": 31.0, "outcome": "done"},
    ]
    write_log(tmp_path, "command.jsonl", lines)
    life = goodput(tmp_path)
    assert (life.parts_s["start"], life.parts_s["end"], life.down_s, life.wall_s) == (7, 11, 13, 31)
    assert life.advice is None and life.rank_waits_s == {}


def test_a_run_that_goes_on_is_counted_until_it_was_last_seen_or_until_now(tmp_path):
    write_log(tmp_path, "command.jsonl", COMMANDS[:1])
    write_log(tmp_path, "rank-0.jsonl", KILLED)
    life, now = goodput(tmp_path), goodput(tmp_path, now=210.0)
    assert (life.wall_s, life.lost_steps, life.parts_s["steps"], life.parts_s["end"]) == (200, 0, 120, 0)
    assert (now.wall_s, now.parts_s["end"]) == (210, 10)


def test_time_that_no_part_explains_is_said(tmp_path):
    lines = [opened(0.0, 0), note(10.0, 1, steps=10.0), note(100.0, 5, steps=60.0)]
    write_log(tmp_path, "rank-0.jsonl", lines)
    assert goodput(tmp_path).parts_s["other"] == 40


@pytest.mark.parametrize(
    ("stage", "words"),
    [("transfer", "network"), ("batch", "cpus_per_worker"), ("devices", "the bus"), ("journal", "rejects")],
)
def test_the_advice_is_for_the_stage_that_was_waited_for_longest(tmp_path, stage, words):
    write_log(tmp_path, "rank-0.jsonl", [opened(0.0, 0), note(30.0, 9, steps=20.0, decode=4.0, **{stage: 6.0})])
    assert words in goodput(tmp_path).advice
    write_log(tmp_path, "rank-0.jsonl", [opened(0.0, 0), note(30.0, 9, steps=96.0, **{stage: 4.0})])
    assert goodput(tmp_path).advice is None


def test_ranks_are_compared_by_the_waits_for_their_own_data(tmp_path):
    write_log(tmp_path, "rank-0.jsonl", KILLED)
    ended = note(199.0, 30, steps=100.0, decode=3.0, ranks=50.0)
    again = note(250.0, 30, steps=100.0, decode=4.0, ranks=50.0)
    write_log(tmp_path, "rank-1.jsonl", [opened(30.0, 0), ended, opened(210.0, 10), again])
    life = goodput(tmp_path)
    assert life.rank_waits_s == {0: {"decode": 29, "devices": 6}, 1: {"decode": 7}}
    assert life.slowest_ranks == {0: 35, 1: 7} and life.values()["slowest_rank"] == 0
    with open(tmp_path / "attempts/rank-1.jsonl", "a") as file:
        file.write('{"event": "step", "at": 260.0, "step": 31, "waits": {"decode": 9')
    assert goodput(tmp_path).slowest_ranks == {0: 35, 1: 7}


def test_the_advice_names_the_rank_that_the_others_wait_for(tmp_path):
    """Rank 2 fetched its batches for 35 of 45 s, waited 3 s for its decoders, and for no rank."""
    facts = {"advice": {"align": "use more CPUs"}}
    write_log(tmp_path, "rank-0.jsonl", [opened(0.0, 0, **facts), note(100.0, 9, steps=55.0, decode=5.0, ranks=40.0)])
    assert "one rank is slower" in goodput(tmp_path).advice
    write_log(tmp_path, "rank-1.jsonl", [opened(0.0, 0), note(99.0, 9, steps=55.0, decode=0.5, ranks=44.0)])
    write_log(tmp_path, "rank-2.jsonl", [opened(0.0, 0), note(99.0, 9, steps=55.0, decode=3.0, transfer=35.0)])
    life = goodput(tmp_path)
    assert life.advice.startswith(
        "rank 2 waits longest for its own data; decoded batches come from other machines slowly"
    )
    values = life.values()
    assert values["slowest_rank"] == 2 and values["rank_data_wait_s"]["2"] == {"decode": 3, "transfer": 35}
    assert sum(values["share_of_up"].values()) == pytest.approx(1, abs=1e-4)
    write_log(tmp_path, "rank-2.jsonl", [opened(0.0, 0), note(99.0, 9, steps=55.0, decode=37.0, slowest="align")])
    assert goodput(tmp_path).advice == (
        "rank 2 waits longest for its own data; most of it for decoded batches of align: use more CPUs"
    )


def test_cut_off_and_foreign_lines_count_for_nothing(tmp_path):
    assert goodput(tmp_path) is None
    write_log(tmp_path, "rank-0.jsonl", KILLED)
    whole = goodput(tmp_path)
    path = tmp_path / "attempts/rank-0.jsonl"
    foreign = '[1]\n{"event": 3, "at": 1}\n{"event": "step", "at": NaN}\n{"event": "step"}\n\xff\n'
    path.write_text(foreign + path.read_text() + '{"event": "step", "at": 900.0, "st')
    assert goodput(tmp_path) == whole
    # What is written next begins a line of its own.
    AttemptFile(path).write("seen", at=300.0)
    assert goodput(tmp_path).wall_s == 300 - 30
    strange = {"event": "step", "at": 205.0, "step": "x", "steps_s": None, "waits": [1], "slowest": 3}
    write_log(tmp_path, "rank-0.jsonl", [*KILLED, strange])
    assert set(goodput(tmp_path).parts_s) == set(PARTS)


def test_a_long_attempt_leaves_few_lines_and_a_kill_leaves_little_unknown(tmp_path, monkeypatch):
    """A million steps of a second: a line at least every hundredth of the time so far."""
    clock = [0.0]
    monkeypatch.setattr(attempts.time, "perf_counter", lambda: clock[0])
    written = []
    monkeypatch.setattr(AttemptFile, "write", lambda self, event, at=None, **_: written.append((event, at)))
    attempt = RankAttempt(tmp_path, rank=0, start_step=0, facts={})
    began = written[0][1]
    for step in range(1, 1_000_001):
        clock[0] = float(step)
        attempt.step(step, {})
    assert [event for event, _ in written[:2]] == ["open", "step"] and len(written) < 1200
    times = [at - began for _, at in written] + [1e6]
    assert all(b - a <= 0.01 * b + 1.01 for a, b in itertools.pairwise(times))


def test_a_command_notes_how_it_ended(tmp_path):
    with command_attempt(tmp_path, began=12.5) as attempt:
        attempt.outcome = "stopped"
    with pytest.raises(ValueError), command_attempt(tmp_path, began=13.0):
        raise ValueError("cannot read s3://KEY:SECRET@bucket/x")
    lines = read_file(tmp_path / "attempts/command.jsonl")
    assert [(line["event"], line.get("outcome")) for line in lines] == [
        ("begin", None),
        ("end", "stopped"),
        ("begin", None),
        ("end", "failed: cannot read s3://***@bucket/x"),
    ]
    assert (lines[0]["at"], lines[2]["at"]) == (12.5, 13.0)


def test_a_disk_that_takes_no_more_does_not_end_the_run_here(tmp_path):
    (tmp_path / "attempts").write_text("a file in its place")
    with command_attempt(tmp_path, began=0.0) as attempt:
        attempt.seen()


@pytest.mark.parametrize(
    ("rank", "command", "expected"),
    [
        ([opened(1.0, 0)], [], 0),
        # Killed while step 10 or 14 ran: the save after step 8 or 12 may be cut off, the one before is whole.
        ([opened(1.0, 0), note(2.0, 8)], [], 0),
        ([opened(1.0, 0), note(2.0, 9)], [], 4),
        ([opened(1.0, 0), note(2.0, 13)], [], 8),
        ([opened(1.0, 6), note(2.0, 7)], [], 6),
        ([opened(1.0, 0), note(2.0, 3, event="trained")], [{"event": "end", "at": 3.0, "outcome": "stopped"}], 3),
        ([opened(1.0, 0), note(2.0, 3, event="trained")], [{"event": "end", "at": 3.0, "outcome": "failed: x"}], 0),
        ([opened(1.0, None), note(2.0, "9")], [], 0),
    ],
)
def test_a_log_proves_that_a_step_was_saved(tmp_path, rank, command, expected):
    write_log(tmp_path, "rank-0.jsonl", rank)
    write_log(tmp_path, "command.jsonl", command)
    assert saved_step(tmp_path, every=4) == expected


def test_a_clock_that_was_set_back_mixes_up_no_attempts(tmp_path, monkeypatch):
    """Attempts follow one another as they were written, with their own lengths; the time between them is not known."""
    clock = {"time": 1e9, "perf_counter": 50.0}
    monkeypatch.setattr(attempts, "time", types.SimpleNamespace(**{k: lambda k=k: clock[k] for k in clock}))

    def passes(seconds):
        for name in clock:
            clock[name] += seconds

    def attempt(start, last, outcome):
        with command_attempt(tmp_path, began=clock["time"]) as command:
            passes(10)
            rank = RankAttempt(tmp_path, rank=0, start_step=start, facts={})
            passes(20)
            rank.step(last, {"steps_s": 20.0})
            command.outcome = outcome

    attempt(0, 8, "failed: x")
    clock["time"] -= 3600
    attempt(4, 12, "stopped")
    life = goodput(tmp_path)
    assert (round(life.wall_s, 3), round(life.down_s, 3), life.lost_steps) == (60, 0, 4)
    assert [(a.start_step, a.last_step, a.outcome) for a in life.attempts] == [(0, 8, "failed: x"), (4, 12, "stopped")]
    # The loop began as its only note of 20 s of steps was written.
    assert {k: round(v, 3) for k, v in life.parts_s.items() if v > 0.001} == {"start": 20, "steps": 30, "lost": 10}
