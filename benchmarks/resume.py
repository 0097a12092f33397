"""kill -9 at random moments of real runs under Ray: the number survived, bit for bit, and the time of a rerun.

    python -m benchmarks.resume [--kills 20] [--workers N] [--steps N] [--seed S]

One run of a small recipe (images, text, video, sound; live decode) is left alone, another is killed again and again:
its driver (the run is started again by the same command), a process that decodes, and with workers a worker (the run
must go on by itself). Moments are random over start, steps and saves; some wait for a save in progress, some follow
immediately after the previous kill. At the end every line of metrics.jsonl, every sample id and all parameters must be
equal to those of the run that was left alone. JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.toy_recipe import toy_recipe_of

ROOT = Path(__file__).resolve().parent.parent
MARK = "IMP_BENCHMARK_MARK"
EXACT = ("step", "task", "variant", "loss", "grad_norm", "learning_rate", "temperatures")


def recipe(corpus: Path, cache: Path, *, num_steps: int) -> dict:
    return toy_recipe_of(corpus) | {
        "train": {"num_steps": num_steps, "checkpoint_every": max(1, num_steps // 40), "log_samples": True},
        "cluster": {"compile_cache": str(cache)},
        "logging": {"progress": "none", "writers": []},
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = run_dir / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_step(run_dir: Path) -> int:
    try:
        return records(run_dir)[-1]["step"]
    except (IndexError, ValueError):
        return 0


class Launch:
    """One start of the job, with its processes marked."""

    def __init__(self, config: Path, run_dir: Path, *, workers: int):
        self.run_dir, self._mark = run_dir, f"{MARK}={run_dir}-{time.time_ns()}"
        name, _, value = self._mark.partition("=")
        command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "--config", str(config), "--run-dir", str(run_dir)]
        self.log = open(run_dir.with_suffix(".log"), "ab")
        self.began, self._old = time.monotonic(), self._metrics_file()
        self.process = subprocess.Popen(
            [*command, "--set", f"cluster.num_workers={workers}"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: value, "JAX_PLATFORMS": "cpu"},
        )

    def _metrics_file(self) -> int | None:
        """The inode: a start cuts the metrics back into a new file, until which the old lines are in place."""
        path = self.run_dir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def pids(self, part: str) -> list[int]:
        """This launch's processes whose command line has ``part``."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or self._mark.encode() not in (entry / "environ").read_bytes():
                    continue
                if part.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def running(self) -> bool:
        return self.process.poll() is None

    def await_step_after(self, step: int, *, timeout_s: float) -> float | None:
        """Seconds from the launch until a step after ``step`` was logged; None if the run ended before."""
        deadline = time.monotonic() + timeout_s
        while self.running() and time.monotonic() < deadline:
            if self._metrics_file() != self._old and last_step(self.run_dir) > step:
                return time.monotonic() - self.began
            time.sleep(0.05)
        return None

    def end(self) -> int:
        """Its exit code, once every process of it is gone."""
        code = self.process.wait()
        deadline = time.monotonic() + 90
        while self.pids("") and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in self.pids(""):
            os.kill(pid, signal.SIGKILL)
        self.log.close()
        return code


def saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def choose(draw: random.Random, *, workers: int) -> tuple[str, str]:
    """(what to kill, when)."""
    targets = ["driver"] * 6 + ["decode"] * 2 + (["worker"] * 4 if workers else [])
    return draw.choice(targets), draw.choice(["soon", "save", "steps", "steps", "steps"])


def kill(launch: Launch, target: str) -> bool:
    """Kills a process of the launch. Returns whether it had one of that kind."""
    if target == "driver":
        launch.process.send_signal(signal.SIGKILL)
        return True
    pids = launch.pids("decode_worker" if target == "decode" else "RayTrainWorker")
    if pids:
        os.kill(pids[-1], signal.SIGKILL)
    return bool(pids)


def killed_run(config: Path, run_dir: Path, *, kills: int, workers: int, first_step_s: float, seed: int) -> dict:
    draw, done = random.Random(seed), 0
    reruns_s, went_on_s = [], []
    counts = {}
    launch, resumed_from = Launch(config, run_dir, workers=workers), None
    while done < kills:
        target, when = choose(draw, workers=workers)
        if when == "soon":
            time.sleep(draw.uniform(0.0, 0.7 * first_step_s))
        else:
            took = launch.await_step_after(resumed_from or 0, timeout_s=400)
            if took is not None and resumed_from is not None:
                reruns_s.append(took)
                resumed_from = None
            if when == "save":
                deadline = time.monotonic() + 20
                while launch.running() and not saving(run_dir) and time.monotonic() < deadline:
                    time.sleep(0.001)
            else:
                time.sleep(draw.uniform(0.0, 4.0))
        if not launch.running():
            break
        step = last_step(run_dir)
        if not kill(launch, target):
            continue
        done += 1
        counts[f"{target}, {when}"] = counts.get(f"{target}, {when}", 0) + 1
        say(f"kill {done} of {kills}: {target}, {when}, after step {step}")
        if target == "driver":
            launch.end()
            # The metrics are cut back to the newest checkpoint: the next step is the one after it.
            launch, resumed_from = Launch(config, run_dir, workers=workers), newest(run_dir)
        else:
            began = time.monotonic()
            if launch.await_step_after(step, timeout_s=400) is not None:
                went_on_s.append(time.monotonic() - began)
    code = launch.end()
    return {"kills": done, "of": counts, "exit code": code, "reruns_s": reruns_s, "went_on_s": went_on_s}


def newest(run_dir: Path) -> int:
    """The step that a rerun starts from."""
    return max((int(p.parent.name) for p in (run_dir / "checkpoints").glob("*/run.json")), default=0)


def parameters(run_dir: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint as its bytes."""
    import jax
    import numpy as np

    from pipeline.evaluate.trained_model import TrainedModel

    params = TrainedModel(run_dir).params
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(params)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    from pipeline.data import demo

    corpus = demo.build(folder / "corpus", limit=48, progress=False)
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe(corpus, folder / "compiled", num_steps=args.steps)))
    whole, killed = folder / "whole", folder / "killed"
    first = Launch(config, whole, workers=args.workers)
    first_step_s = first.await_step_after(0, timeout_s=400)
    code = first.end()
    say(f"left alone: exit code {code}, first step after {first_step_s:.1f} s, {time.monotonic() - first.began:.0f} s")
    found = killed_run(
        config, killed, kills=args.kills, workers=args.workers, first_step_s=first_step_s, seed=args.seed
    )
    if found["exit code"]:
        say((killed.with_suffix(".log")).read_text()[-3000:])
    a, b = records(whole), records(killed)
    equal = {
        "losses": [[r[k] for k in EXACT] for r in a] == [[r[k] for k in EXACT] for r in b] and len(a) == args.steps,
        "samples": records(whole, "samples.jsonl") == records(killed, "samples.jsonl"),
        "parameters": parameters(whole) == parameters(killed),
    }
    reruns_s, went_on_s = found.pop("reruns_s"), found.pop("went_on_s")
    print(
        json.dumps(
            found
            | {
                "workers": args.workers,
                "equal bit for bit": equal,
                "first step of the run left alone, s": round(first_step_s, 1),
                "rerun to next step, s": {"median": statistics.median(reruns_s), "longest": max(reruns_s)}
                if reruns_s
                else None,
                "going on without a rerun, s": {"median": statistics.median(went_on_s), "longest": max(went_on_s)}
                if went_on_s
                else None,
            },
            indent=1,
        )
    )
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
