"""The report of synthetic runs: whole, empty, torn, hostile. Numbers are checked against medians worked out by hand."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.stats import binom

from pipeline.report import charts, metrics_file
from pipeline.report.mixture import usual_counts
from pipeline.report.report import write_report

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "eval.json", "experts.json", "quarantine.parquet")
SECTIONS = ("evaluation", "loss", "mixture", "experts", "time", "data", "schedules", "structures", "run", "config")


class Page(HTMLParser):
    """The page as a browser sees it: tags, texts, and table cells per section."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self._section, self._cell = "header", False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes.get("id", "header")
        if tag == "tr":
            self.rows.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self._cell = True
            self.rows[self._section][-1].append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text[self._section] = self.text.get(self._section, "") + data
        if self._cell:
            self.rows[self._section][-1][-1] += data

    def row(self, section: str, first: str, *, cells: int = 0) -> list[str]:
        """The first row that begins with a word and has a minimum number of cells."""
        return next(row for row in self.rows[section] if row[:1] == [first] and len(row) >= cells)

    def paths(self, title: str) -> list[list[tuple[float, float]]]:
        """The points of every line in the chart with this name."""
        chart = self.source.split(f'aria-label="{title}">', 1)[1].split("</svg>", 1)[0]
        found = re.findall(r'<path class="line (?:grey|c.)" d="M([^"]*)"', chart)
        return [[tuple(map(float, point.split())) for point in path.split("L")] for path in found]


def metrics_row(step: int, task: str, loss: float) -> dict:
    return {
        "step": step,
        "task": task,
        "variant": "16x224",
        "loss": loss,
        "examples": 8,
        "tokens": 1568,
        "step_s": 0.1 * (1 + step % 3),
        "data_wait_s": 0.01,
        "learning_rate": 1e-3 / step,
        "grad_norm": 1.0 + step,
        "temperatures": {"text_vision": 0.2},
        "wall_s": 2.0 * step,
        "moe": {
            "vision": {"unrouted_fraction": 0.3, "expert_load": [0.5, 0.25, 0.25, 0.0], "z_loss": 1.5},
            "text": {"unrouted_fraction": 0.1, "expert_load": [0.25, 0.25, 0.25, 0.25], "z_loss": 1.5},
        },
    }


def write_run(run_dir: Path, *, tasks: tuple[str, ...] = ("align", "tag"), num_steps: int = 40) -> Path:
    """A run whose k-th step ran task k modulo the tasks, with the loss 10 - k/10."""
    run_dir.mkdir(parents=True)
    rows = [metrics_row(step, tasks[step % len(tasks)], 10 - step / 10) for step in range(1, num_steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "seed": 0,
        "model": {"variant": "S/16"},
        "train": {"num_steps": num_steps},
        "data_sets": {"clips": {}},
        "tasks": {name: {"data_set": "clips", "objective": "contrastive", "weight": 1.0} for name in tasks},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    steps = {name: sum(row["task"] == name for row in rows) for name in tasks}
    summary = {
        "time": {"compile_s": 20.0, "steps_s": 50.0, "total_s": 80.0, "first_step_s": 25.0},
        "tasks": {
            name: {
                "weight": 1 / len(tasks),
                "steps": steps[name],
                "examples": 8 * steps[name],
                "rows": 100,
                "data_set": "clips",
                "variants": {"16x224": steps[name]},
            }
            for name in tasks
        },
        "structures": [
            {"task": name, "variant": "16x224", "compile_s": 1.5, "vision_tokens": 196, "memory_bytes": 50 << 20}
            for name in tasks
        ],
        "plan": {"lines": ["estimate: 0.2 s a step here"], "needed_bytes": 3 << 30, "limit_bytes": 24 << 30},
        "world_size": 2,
        "num_parameters": 12_300_000,
        "rejects": {"clips": {"drawn": 320, "rejected": 8}},
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    result = {"dataset": "cifar10", "task": "zeroshot_classification", "num_examples": 400}
    result |= {"metrics": {"acc1": 0.5, "acc5": 0.52}, "chance": {"acc1": 0.1, "acc5": 0.5}}
    (run_dir / "eval.json").write_text(json.dumps([result]))
    variants = {"16x224": (1, [[0.5, 0.5], [1.0, 0.0]]), "32x224": (3, [[0.1, 0.9], [0.0, 1.0]])}
    experts = {
        name: {v: {"vision": {"steps": n, "expert_load": load}} for v, (n, load) in variants.items()} for name in tasks
    }
    (run_dir / "experts.json").write_text(json.dumps(experts))
    columns = {
        name: [f"{name}-{index}" for index in range(120)] for name in ("id", "data_set", "source", "reason", "task")
    }
    pq.write_table(pa.table(columns | {"step": list(range(120))}), run_dir / "quarantine.parquet")
    return run_dir


def test_full_run_fills_every_section(tmp_path):
    path = write_report(write_run(tmp_path / "demo"))
    page = Page(path)
    assert path == tmp_path / "demo" / "report.html" and path.stat().st_size < 1e6
    assert tuple(name for name in page.text if name != "header") == SECTIONS
    assert not any("not available" in text for text in page.text.values())
    for fact in ("IMP run: demo", "40 of 40", "1 min 20 s"):
        assert fact in page.text["header"]
    for fact in ("complete", "S/16", "12.3 M"):
        assert fact in page.text["run"]
    assert sorted(file.name for file in path.parent.iterdir()) == sorted((*FILES, "report.html"))


def test_a_loss_at_chance_has_not_fallen(tmp_path):
    """2.773 → 2.771 where ln 16 is what guessing gives: lower, and nothing learned."""
    run_dir = write_run(tmp_path / "demo")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        if row["task"] == "tag":
            row |= {"loss": 2.773 - 0.002 * number / len(rows), "chance": math.log(16)}
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(run_dir))
    assert "Loss fell on 1 of 2 tasks." in page.text["header"]
    assert "Loss still at chance: tag (2.773)." in page.text["header"]
    assert page.row("loss", "tag")[4] == "at chance" and page.row("loss", "tag")[7].startswith("2.77")


def test_loss_table_holds_medians_of_first_and_last_tenth(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    # "tag" ran at steps 1, 3, ... 39: the first two of its twenty losses are 9.9 and 9.7, the last two 6.3 and 6.1.
    assert page.row("loss", "tag")[2:7] == ["9.8", "6.2", "-36.7%", "20", "0"]
    assert page.row("loss", "align")[2:5] == ["9.7", "6.1", "-37.1%"]


def test_a_share_is_outside_only_if_chance_does_not_explain_it(tmp_path):
    """100 draws at 1/2, two tasks at 99 in 100 runs: a quarter of a percent on each side, 36 to 64 draws."""
    run_dir = write_run(tmp_path / "demo", tasks=("a", "b"), num_steps=100)
    summary = json.loads((run_dir / "summary.json").read_text())
    for steps, expected in ((64, "as expected"), (65, "outside")):
        summary["tasks"]["a"]["steps"], summary["tasks"]["b"]["steps"] = steps, 100 - steps
        (run_dir / "summary.json").write_text(json.dumps(summary))
        page = Page(write_report(run_dir))
        assert page.row("mixture", "a")[1:4] == ["50.0%", f"{steps}.0%", expected]
        assert ("chance does not explain: a, b." in page.text["header"]) == (expected == "outside")
    assert "expected 36.0% to 64.0%" in page.text["mixture"]


@pytest.mark.parametrize(
    ("draws", "share"), [(100, 0.5), (1000, 0.001), (7, 0.9), (1_000_000, 0.05), (10, 0.0), (10, 1.0)]
)
def test_the_interval_of_a_share_is_that_of_the_binomial_distribution(draws, share):
    low, high = usual_counts(draws, share, error=0.01)
    found = binom(draws, share)
    assert found.cdf(low) > 0.005 >= found.cdf(low - 1)
    assert found.sf(high) < 0.005 and (high == 0 or found.sf(high - 1) >= 0.005)


def test_usual_runs_of_many_tasks_are_seldom_alarmed():
    """Of 2,000 runs of 20 tasks 1 in 100 at most, where 2 sigma alarm in most of them."""
    draws = np.random.default_rng(0).multinomial(1000, [1 / 20] * 20, size=2000)
    low, high = usual_counts(1000, 1 / 20, error=0.01 / 20)
    assert ((draws < low) | (draws > high)).any(1).mean() <= 0.01
    assert (np.abs(draws - 50) > 2 * math.sqrt(1000 / 20 * 19 / 20)).any(1).mean() > 0.5


def metric(page: Page, name: str) -> str:
    """The line of a metric, without its markup."""
    line = re.search(rf'<div class="metrics"><span>{name}</span>.*?</span></div>', page.source).group()
    return re.sub(r"<[^>]*>", " ", line)


def test_evaluation_is_above_chance_only_beyond_binomial_noise(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    assert metric(page, "acc1").split() == ["acc1", "0.5", "chance", "0.1,", "5×", "chance"]
    assert "at chance" in metric(page, "acc5")  # 400 guesses at 1/2: two sigma are 0.05
    assert "Not better than chance: cifar10 acc5." in page.text["header"]


def test_time_experts_and_data_numbers(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    # Steps of "align" are even; 0.1, 0.2 and 0.3 s take turns, so the median is 0.2 s.
    assert page.row("time", "align")[1:] == ["200.0", "10.0", "8", "1,568"]
    assert page.row("experts", "vision", cells=6)[1:] == ["30.0%", "30.0%", "2.00", "0.00", "1"]
    assert page.row("structures", "align") == ["align", "16x224", "196", "20", "50.0", "1.5"]
    assert "estimate: 0.2 s a step here" in page.text["structures"]
    assert "the state and the largest step take 3 of 24 GiB" in page.text["structures"]
    assert page.row("data", "clips") == ["clips", "align, tag", "100", "320", "3.20", "320", "8", "2.50%"]
    assert "The first 20 of 120 rejects" in page.text["data"] and "quarantine.parquet" in page.text["data"]
    assert page.row("data", "id-19")[2:4] == ["source-19", "reason-19"]
    assert not any(row[0] == "id-20" for row in page.rows["data"])


def write_attempts(run_dir: Path, *, hostile: str = "") -> None:
    """10 s to the first step, 60 s of steps of which 20 s are lost, 20 s of waits; 100 s later, 10 s and 90 s."""
    sums = {"compile_wait_s": 0.0, "save_s": 0.0, "slowest": f"align{hostile}"}
    rank_0 = [
        {"event": "open", "at": 1e9, "start_step": 0, "world_size": f"2{hostile}"},
        {"event": "step", "at": 1e9 + 10, "step": 0, "steps_s": 0.0, "waits": {}} | sums,
        {"event": "step", "at": 1e9 + 90, "step": 30, "steps_s": 60.0, "waits": {f"decode{hostile}": 20.0}} | sums,
        {"event": "open", "at": 1e9 + 190, "start_step": 20, "world_size": 2},
        {"event": "step", "at": 1e9 + 200, "step": 20, "steps_s": 0.0, "waits": {}} | sums,
        {"event": "step", "at": 1e9 + 290, "step": 40, "steps_s": 90.0, "waits": {}} | sums,
    ]
    end = [{"event": "begin", "at": 1e9 + 190}, {"event": "end", "at": 1e9 + 290, "outcome": f"stopped{hostile}"}]
    (run_dir / "attempts").mkdir()
    for name, lines in (("rank-0", rank_0), ("rank-1", rank_0[:3]), ("command", end)):
        (run_dir / "attempts" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_where_the_time_of_all_attempts_went(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    write_attempts(run_dir)
    page = Page(write_report(run_dir))
    # Of 90 s and 100 s; a third of the first attempt's steps and waits was run again.
    assert page.row("time", "steps")[1:] == ["2 min 10 s", "68.4%", "44.8%"]
    assert page.row("time", "waiting for data")[1:] == ["13.3 s", "7.0%", "4.6%"]
    assert page.row("time", "steps run again")[1:] == ["26.7 s", "14.0%", "9.2%"]
    assert page.row("time", "starts")[1:] == ["20.0 s", "10.5%", "6.9%"]
    assert page.row("time", "between attempts")[1:] == ["1 min 40 s", "–", "34.5%"]
    assert page.row("time", "attempts")[1:] == ["3 min 10 s", "100.0%", "65.5%"]
    assert page.row("time", "batches that were not decoded yet")[1:] == ["13.3 s", "9.3%"]
    assert page.row("time", "rank 1")[1:] == ["20.0 s", "batches that were not decoded yet, 20.0 s"]
    assert page.row("time", "1") == ["1", "2001-09-09 01:46:40", "1 min 30 s", "2", "0 to 30", "killed, or still runs"]
    assert page.row("time", "2")[2:] == ["1 min 40 s", "2", "20 to 40", "stopped"]
    assert "10 steps were run again" in page.text["time"] and "3 min 10 s" in page.text["header"]


def test_waits_for_data_are_said_with_what_to_change(tmp_path):
    """As long as the steps: 0.2 s each in the median, 8 s over 40 steps."""
    run_dir = write_run(tmp_path / "demo")
    rows = [json.loads(line) | {"step_s": 0.2, "data_wait_s": 0.2} for line in open(run_dir / "metrics.jsonl")]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "Waiting for data took 50% of the logged time." in Page(write_report(run_dir)).text["header"]
    opened = {"event": "open", "at": 0.0, "start_step": 0, "advice": {"align": "add CPUs"}}
    sums = {"steps_s": 8.0, "compile_wait_s": 0.0, "save_s": 0.0, "waits": {"decode": 8.0}, "slowest": "align"}
    (run_dir / "attempts").mkdir()
    lines = [opened, {"event": "step", "at": 16.0, "step": 40} | sums]
    (run_dir / "attempts/rank-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_report(run_dir))
    advice = "most of it for decoded batches of align: add CPUs."
    assert f"of the logged time — {advice}" in page.text["header"] and f"Waiting: {advice}" in page.text["time"]
    assert page.row("time", "batches that were not decoded yet")[1:] == ["8.0 s", "50.0%"]


def test_load_by_layer(tmp_path):
    """Variants by their steps: a quarter of 0.5 and three of 0.1 are 0.2, of two experts 0.4 times an even share."""
    page = Page(write_report(write_run(tmp_path / "demo")))
    layers = [row[1:] for row in page.rows["experts"] if row[0].startswith("layer")]
    assert layers == [["0.40", "1.60"], ["0.50", "1.50"]] * 2
    assert "align, vision" in page.text["experts"] and "tag, vision" in page.text["experts"]


@pytest.mark.parametrize("torn", [[1], {"vision": 3}, {"vision": {"steps": 1, "expert_load": [[1], [1, 2]]}}, None])
def test_expert_loads_that_are_none(tmp_path, torn):
    run_dir = write_run(tmp_path / "demo")
    (run_dir / "experts.json").write_text(json.dumps({"align": {"16x224": torn}, "tag": torn}))
    assert "Load by layer" not in Page(write_report(run_dir)).text["experts"]


def test_alarms_and_speed(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    assert "Alarm " not in Page(write_report(run_dir)).text["header"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"tokens_per_s": 100.0 * row["step"], "mfu": 0.25}
    rows[6]["alarms"], rows[8]["alarms"] = ["tag: diverges 7", "<b>"], ["tag: diverges 8"]
    rows[2]["alarms"] = ["30% of the time was spent waiting for data"]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(run_dir))
    assert "Alarm at step 7, 2 times: tag: diverges 7." in page.text["header"]
    assert "Alarm at step 7: <b>." in page.text["header"]
    # A wait at the start is no finding; those of the whole run are, with their share.
    assert "30% of the time" not in page.text["header"]
    # Steps 1 to 40.
    assert "median 2,050" in page.text["time"] and "median 25.0%" in page.text["time"]


def test_empty_directory_and_empty_files(tmp_path):
    for name, content in (("missing", None), ("empty", b""), ("garbage", b"\xff\x00{]: '"), ("other", b"[3, null]")):
        run_dir = tmp_path / name
        run_dir.mkdir()
        for file in FILES if content is not None else ():
            (run_dir / file).write_bytes(content)
        page = Page(write_report(run_dir))
        for section in set(SECTIONS) - {"run", "config"}:
            assert "not available" in page.text[section], (name, section)
        assert "<svg" not in page.source and "No step was logged." in page.text["header"]


@pytest.mark.parametrize("missing", [name for name in FILES if name != "experts.json"])
def test_one_file_missing(tmp_path, missing):
    run_dir = write_run(tmp_path / "demo")
    (run_dir / missing).unlink()
    page = Page(write_report(run_dir))
    sections = {
        "metrics.jsonl": "loss",
        "summary.json": "structures",
        "eval.json": "evaluation",
        "config.yaml": "config",
    }
    assert "not available" in page.text[sections.get(missing, "data")]


def test_torn_and_foreign_lines_are_skipped(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    lines = (run_dir / "metrics.jsonl").read_text()
    foreign = '\n[1]\n{"step": "x", "task": "tag"}\n{"step": 3}\n{"step": true, "task": "tag"}\n'
    (run_dir / "metrics.jsonl").write_text(foreign + lines + '{"step": 41, "task": "tag", "loss": 1')
    assert Page(write_report(run_dir)).row("loss", "tag")[2:7] == ["9.8", "6.2", "-36.7%", "20", "0"]


def test_each_variant_has_a_line_and_its_own_chance(tmp_path):
    """A median through variants of different batches would leap between 3 and 1; here both lines are level."""
    run_dir = write_run(tmp_path / "demo", tasks=("tag",))
    rows = [json.loads(line) for line in open(run_dir / "metrics.jsonl")]
    for row in rows:
        large = row["step"] % 2
        row |= {
            "variant": "64x64" if large else "32x32",
            "loss": 3.0 if large else 1.0,
            "chance": 4.0 if large else 2.0,
        }
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(run_dir))
    heights = [{y for _, y in path} for path in page.paths("tag")]
    assert len(heights) == 4 and all(len(levels) == 1 for levels in heights)
    # Upwards on a page is less: 4 above 3 above 2 above 1, at equal distances.
    small, small_chance = heights[2].pop(), heights[3].pop()
    large, large_chance = heights[0].pop(), heights[1].pop()
    assert large_chance < large < small_chance < small
    np.testing.assert_allclose(np.diff([large_chance, large, small_chance, small]), small - small_chance, atol=0.11)
    assert page.row("loss", "tag")[1] == "64x64" and "64x64 3, chance 4" in page.text["loss"]


def test_losses_that_are_not_finite(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["task"] == "align" and row["step"] > 30:
            row["loss"], row["grad_norm"] = math.nan, math.inf
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(run_dir))
    assert page.row("loss", "align")[2:7] == ["9.7", "–", "–", "20", "5"]
    assert "Losses that are not finite: 5, in align." in page.text["header"]
    assert "Loss fell on 1 of 2 tasks." in page.text["header"]


def test_terms_of_a_loss(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["task"] == "tag":
            row["losses"] = {"nce": row["loss"] - 1, "softmax": 1.0}
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["tasks"]["tag"]["objective"] = {"nce": 1.0, "softmax": 0.5}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report(run_dir))
    assert page.row("loss", "tag")[8] == "nce + 0.5 softmax" and page.row("loss", "align")[8] == "contrastive"
    terms = [row for row in page.rows["loss"] if row[1:2] and row[1] in ("nce", "softmax")]
    assert terms == [["tag", "nce", "8.8", "5.2"], ["tag", "softmax", "1", "1"]]


def test_skipped_updates_are_bad_news(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    summary = json.loads((run_dir / "summary.json").read_text())
    for count, shown in ((0, False), (3, True)):
        (run_dir / "summary.json").write_text(json.dumps(summary | {"skipped_updates": count}))
        text = Page(write_report(run_dir)).text["header"]
        assert (f"Updates skipped because they were not finite: {count}." in text) == shown


def test_rows_with_step_task_and_loss_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "task": "only", "loss": 2.5}\n')
    page = Page(write_report(tmp_path))
    assert page.row("loss", "only")[2:4] == ["2.5", "2.5"]
    assert "not available" in page.text["schedules"] and "not available" in page.text["experts"]


def test_text_from_files_cannot_become_markup(tmp_path):
    hostile = "<script>alert(1)</script>"
    closing = "</script><img src=https://example.org/x onerror=alert(1)>\"'&"
    run_dir = write_run(tmp_path / "demo", tasks=(hostile, closing))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config + f"# {closing}\n</pre>")
    columns = {name: [closing, hostile] for name in ("id", "data_set", "source", "reason", "task")}
    pq.write_table(pa.table(columns), run_dir / "quarantine.parquet")
    result = {"dataset": closing, "task": hostile, "metrics": {closing: 0.1}, "chance": {closing: 0.5}}
    (run_dir / "eval.json").write_text(json.dumps([result]))
    rows = [metrics_row(step, (hostile, closing)[step % 2], 1.0) for step in range(1, 9)]
    for row in rows:
        row["temperatures"] = {closing: 0.1}
        row["moe"] = {closing: row["moe"]["text"]}
        row["losses"] = {closing: 1.0}
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = json.loads((run_dir / "summary.json").read_text())
    summary |= {"world_size": hostile, "rejects": {closing: {"drawn": 1, "rejected": 1}}}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    write_attempts(run_dir, hostile=closing)

    page = Page(write_report(run_dir))
    assert "<script>alert" not in page.source and "<img" not in page.source and closing not in page.source
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    # Shown as text, whole.
    assert [row[0] for row in page.rows["loss"]] == ["Task", hostile, closing, "Task", hostile, closing]


def test_page_names_no_address_to_load(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(link.startswith("#") for link in links)
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("num_tasks", [1, 25])
def test_number_of_tasks_and_length_of_lines(tmp_path, num_tasks):
    tasks = tuple(f"task_{index}" for index in range(num_tasks))
    path = write_report(write_run(tmp_path / "demo", tasks=tasks, num_steps=6000))
    page = Page(path)
    assert path.stat().st_size < 2e6
    lengths = [len(line) for name in tasks for line in page.paths(name)]
    assert len(lengths) == num_tasks and max(lengths) <= charts.MAX_POINTS


def test_a_line_is_the_median_of_neighbours_within_their_range():
    series = metrics_file.Series()
    for step, value in enumerate([1.0, 9.0, 2.0, math.nan, 3.0, 8.0, *[5.0] * 10]):
        series.add(step, value)
    line = charts.smooth_line("loss", series)
    # 15 finite values in three groups.
    assert line.x.tolist() == [np.mean([0, 1, 2, 4, 5]), 8.0, 13.0]
    assert line.y.tolist() == [3.0, 5.0, 5.0] and line.low[0] == 1 and line.high[0] == 9


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "demo")
    (run_dir / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pipeline.files.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "old"
    assert sorted(file.name for file in run_dir.iterdir()) == sorted((*FILES, "report.html"))
