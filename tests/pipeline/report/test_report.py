"""The report of synthetic runs: whole, empty, torn, hostile. Numbers are checked against medians worked out by hand."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from plotly.offline import get_plotlyjs

from pipeline.report import elements
from pipeline.report.report import write_report

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "eval.json", "experts.json", "quarantine.parquet")
SECTIONS = ("evaluation", "loss", "mixture", "schedules", "experts", "time", "structures", "data", "config")


class Page(HTMLParser):
    """The page as a browser sees it, without the inlined library: tags, texts, table cells per section, chart data."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        assert self.source.count(get_plotlyjs()) == 1
        self.source = self.source.replace(get_plotlyjs(), "")
        self.tags: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.charts: list[dict] = []
        self._section, self._cell, self._json = "header", False, False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
        if tag == "tr":
            self.rows.setdefault(self._section, []).append([])
        self._json = attributes.get("type") == "application/json"
        if tag in ("td", "th"):
            self._cell = True
            self.rows[self._section][-1].append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")
        self._json = self._json and tag != "script"

    def handle_data(self, data):
        if self._json:
            self.charts.append(json.loads(data, parse_constant=pytest.fail))
            return
        self.text[self._section] = self.text.get(self._section, "") + data
        if self._cell:
            self.rows[self._section][-1][-1] += data

    def row(self, section: str, first: str) -> list[str]:
        return next(row for row in self.rows[section] if row[0] == first)


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
        "structures": [{"task": name, "variant": "16x224", "compile_s": 1.5, "vision_tokens": 196} for name in tasks],
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
    assert path == tmp_path / "demo" / "report.html" and path.stat().st_size < 6e6
    assert tuple(name for name in page.text if name != "header") == SECTIONS
    assert not any("not available" in text for text in page.text.values())
    for fact in ("IMP run: demo", "complete", "40 of 40", "S/16", "12.3 M", "1 min 20 s"):
        assert fact in page.text["header"]
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
    assert page.row("loss", "tag")[3] == "at chance" and page.row("loss", "tag")[6].startswith("2.77")


def test_loss_table_holds_medians_of_first_and_last_tenth(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    # "tag" ran at steps 1, 3, ... 39: the first two of its twenty losses are 9.9 and 9.7, the last two 6.3 and 6.1.
    assert page.row("loss", "tag")[1:6] == ["9.8", "6.2", "-36.7%", "20", "0"]
    assert page.row("loss", "align")[1:4] == ["9.7", "6.1", "-37.1%"]


def test_share_table_flags_a_task_outside_two_sigma(tmp_path):
    run_dir = write_run(tmp_path / "demo", tasks=("a", "b"), num_steps=100)
    summary = json.loads((run_dir / "summary.json").read_text())
    # 100 draws at 1/2: sigma is 5 %, so 59 is inside the band of 10 % and 61 is not.
    for steps, expected in ((59, "inside"), (61, "outside")):
        summary["tasks"]["a"]["steps"], summary["tasks"]["b"]["steps"] = steps, 100 - steps
        (run_dir / "summary.json").write_text(json.dumps(summary))
        page = Page(write_report(run_dir))
        assert page.row("mixture", "a")[1:4] == ["50.0%", f"{steps}.0%", expected]
    bars = next(chart["data"] for chart in page.charts if chart["layout"].get("barmode") == "group")
    assert bars[0]["x"] == [0.61, 0.39] and bars[1]["error_x"]["array"] == [0.1, 0.1]


def test_evaluation_is_above_chance_only_beyond_binomial_noise(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    rows = {row[1]: row for row in page.rows["evaluation"]}
    assert rows["acc1"][2] == "0.5" and rows["acc1"][5] == "5× chance"
    assert rows["acc5"][5] == "at chance"  # 400 guesses at 1/2: two sigma are 0.05
    assert "Not better than chance: cifar10 acc5." in page.text["header"]


def test_time_experts_and_data_numbers(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    # Steps of "align" are even; 0.1, 0.2 and 0.3 s take turns, so the median is 0.2 s.
    assert page.row("time", "align")[1:] == ["200.0", "10.0", "8", "1,568"]
    assert page.row("experts", "vision")[1:] == ["30.0%", "30.0%", "2.00", "0.00", "1"]
    assert page.row("structures", "align") == ["align", "16x224", "196", "20", "1.5"]
    assert page.row("data", "clips") == ["clips", "align, tag", "100", "320", "3.20", "320", "8", "2.50%"]
    assert "The first 100 of 120 rejects" in page.text["data"]
    assert page.row("data", "id-99")[2:4] == ["source-99", "reason-99"]
    assert not any(row[0] == "id-100" for row in page.rows["data"])


def write_attempts(run_dir: Path, *, hostile: str = "") -> None:
    """10 s to the first step, 60 s of steps of which 20 s are lost, 20 s of waits; 100 s later, 10 s and 90 s."""
    sums = {"compile_wait_s": 0.0, "save_s": 0.0, "slowest": f"align{hostile}"}
    rank_0 = [
        {"event": "open", "at": 1e9, "start_step": 0, "world_size": f"2{hostile}"},
        {"event": "step", "at": 1e9 + 10, "step": 0, "steps_s": 0.0, "waits": {}} | sums,
        {"event": "step", "at": 1e9 + 90, "step": 30, "steps_s": 60.0, "waits": {f"stream{hostile}": 20.0}} | sums,
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
    assert page.row("time", "decoding, and batches on their way here")[1:] == ["13.3 s", "9.3%"]
    assert page.row("time", "rank 1")[1:] == ["20.0 s"]
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
    sums = {"steps_s": 8.0, "compile_wait_s": 0.0, "save_s": 0.0, "waits": {"stream": 8.0}, "slowest": "align"}
    (run_dir / "attempts").mkdir()
    lines = [opened, {"event": "step", "at": 16.0, "step": 40} | sums]
    (run_dir / "attempts/rank-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_report(run_dir))
    advice = "most of it for decoded batches of align: add CPUs."
    assert f"of the logged time — {advice}" in page.text["header"] and f"Waiting: {advice}" in page.text["time"]
    assert page.row("time", "decoding, and batches on their way here")[1:] == ["8.0 s", "50.0%"]


def test_load_by_layer(tmp_path):
    """Variants by their steps: a quarter of 0.5 and three of 0.1 are 0.2, of two experts 0.4 times an even share."""
    page = Page(write_report(write_run(tmp_path / "demo")))
    maps = [chart["data"][0]["z"] for chart in page.charts if chart["data"][0]["type"] == "heatmap"]
    np.testing.assert_allclose(maps[1:], [[[0.4, 1.6], [0.5, 1.5]]] * 2)
    assert "align, vision" in page.text["experts"] and "tag, vision" in page.text["experts"]


@pytest.mark.parametrize("torn", [[1], {"vision": 3}, {"vision": {"steps": 1, "expert_load": [[1], [1, 2]]}}, None])
def test_expert_loads_that_are_none(tmp_path, torn):
    run_dir = write_run(tmp_path / "demo")
    (run_dir / "experts.json").write_text(json.dumps({"align": {"16x224": torn}, "tag": torn}))
    assert "Load by layer" not in Page(write_report(run_dir)).text["experts"]


def test_alarms_and_speed(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    assert "Alarms" not in Page(write_report(run_dir)).text["header"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"tokens_per_s": 100.0 * row["step"], "mfu": 0.25}
    rows[6]["alarms"], rows[8]["alarms"] = ["tag: diverges", "<b>"], ["again"]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(run_dir))
    assert "Alarms: 3; the first at step 7: tag: diverges." in page.text["header"]
    # Steps 1 to 40.
    assert "median 2,050" in page.text["time"] and "median 25.0%" in page.text["time"]


def test_empty_directory_and_empty_files(tmp_path):
    for name, content in (("missing", None), ("empty", b""), ("garbage", b"\xff\x00{]: '"), ("other", b"[3, null]")):
        run_dir = tmp_path / name
        run_dir.mkdir()
        for file in FILES if content is not None else ():
            (run_dir / file).write_bytes(content)
        page = Page(write_report(run_dir))
        for section in SECTIONS[:-1]:
            assert "not available" in page.text[section], (name, section)
        assert page.charts == [] and "No step was logged." in page.text["header"]


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
    assert Page(write_report(run_dir)).row("loss", "tag")[1:6] == ["9.8", "6.2", "-36.7%", "20", "0"]


def test_charts_keep_every_digit_of_a_step(tmp_path):
    rows = [metrics_row(step, "tag", 1.5) for step in (123_456_788, 123_456_789)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert Page(write_report(tmp_path)).charts[0]["data"][0]["x"] == [123_456_788, 123_456_789]


def test_losses_that_are_not_finite(tmp_path):
    run_dir = write_run(tmp_path / "demo")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["task"] == "align" and row["step"] > 30:
            row["loss"], row["grad_norm"] = math.nan, math.inf
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(run_dir))
    assert page.row("loss", "align")[1:6] == ["9.7", "–", "–", "20", "5"]
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
    assert page.row("loss", "tag")[-1] == "nce + 0.5 softmax" and page.row("loss", "align")[-1] == "contrastive"
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
    assert page.row("loss", "only")[1:3] == ["2.5", "2.5"]
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
    assert sum(tag == "script" for tag, _ in page.tags) == len(page.charts) + 2
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    # Shown as text, whole.
    assert [row[0] for row in page.rows["loss"]] == ["Task", hostile, closing, "Task", hostile, closing]
    labels = [name for chart in page.charts for name in chart["layout"].get("yaxis", {}).get("ticktext", [])]
    labels += [trace["name"] for chart in page.charts for trace in chart["data"] if "name" in trace]
    assert labels and not any("<" in label for label in labels)  # Plotly reads a small HTML of its own


def test_page_names_no_address_to_load(tmp_path):
    page = Page(write_report(write_run(tmp_path / "demo")))
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(link.startswith("#") for link in links)
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("num_tasks", [1, 25])
def test_number_of_tasks_and_length_of_traces(tmp_path, num_tasks):
    tasks = tuple(f"task_{index}" for index in range(num_tasks))
    path = write_report(write_run(tmp_path / "demo", tasks=tasks, num_steps=6000))
    page = Page(path)
    assert path.stat().st_size < 6e6
    small = [chart["data"][0]["type"] for chart in page.charts if chart["layout"].get("bar") is False]
    assert small.count("scatter") == small.count("heatmap") == num_tasks
    lengths = [len(trace["x"]) for chart in page.charts for trace in chart["data"] if "x" in trace]
    assert max(lengths) <= elements.MAX_POINTS < 6000


def test_thin_keeps_spikes_and_drops_what_is_not_finite():
    y = np.zeros(10_000)
    y[1234], y[777], y[5] = 9.0, -9.0, math.nan
    kept_x, kept_y = elements.thin(np.arange(10_000), y, limit=100)
    assert len(kept_x) <= 100 and {1234, 777} <= set(kept_x) and kept_y.max() == 9 and kept_y.min() == -9


def test_running_median_by_hand():
    x, y = np.arange(6), np.array([1.0, 9.0, 2.0, math.nan, 3.0, 8.0])
    steps, medians = elements.running_median(x, y)
    assert steps.tolist() == [0, 1, 2, 4, 5] and medians.tolist() == [2.0, 2.5, 3.0, 5.5, 3.0]


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
