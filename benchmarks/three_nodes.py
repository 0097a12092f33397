"""A run on a cluster of three nodes that gains and loses machines, is stopped and submitted again. JSON on output.

    python -m benchmarks.three_nodes [--config toy|demo] [--steps N]

A head with a token, and two machines that each hold one of two workers; all are processes of this machine. While the
submitted run trains, a machine for decoding joins, and dies; the machine of a worker dies, and another one joins;
``ray job stop`` stops the run, and the same command goes on with it. Losses, sample ids and parameters must be those of
a run that was left alone. Times are seconds from the event. Pictures decode slowly, so that one more machine is of
use, and not at all while a machine starts or the run is stopped, so that the run outlasts the story.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.campaign_bits import bits, unequal
from benchmarks.campaign_run import last_step, quick_recipe, records, say, went_after
from tests.ray_head import Head, Machine, ray_head

ROOT = Path(__file__).resolve().parent.parent
MEMORY = f"--object-store-memory={200 << 20}"
# Machines that hold a worker of two CPUs and a decoder; that hold a decoder alone.
TRAINER, DECODE = ("--num-cpus=3", MEMORY), ("--num-cpus=1", MEMORY)
SETTINGS = {"cluster.num_workers": 2, "cluster.cpus_per_worker": 2, "cluster.decode": "tasks"}
# Of pictures that are held up.
SETTINGS |= {"cluster.decode_timeout_s": 600}
# A decoder of the user's own: pictures take long while there is a file "slow", and wait for the end of a file "held".
PACED = """
import pathlib, time
from pipeline.data.media.image import BUILT_IN
FOLDER = pathlib.Path({folder!r})

def image(source, spec, **times):
    if (FOLDER / "slow").exists():
        time.sleep({seconds})
    while (FOLDER / "held").exists():
        time.sleep(0.02)
    return BUILT_IN["pillow"](source, spec, **times)
"""
# Seconds for an event to have its effect.
_LIMIT_S = 300.0


class Job:
    """A run that is submitted to a cluster, again and again."""

    def __init__(self, head: Head, config: str, run_dir: Path, settings: dict[str, Any]):
        self.run_dir = run_dir
        self._head, self._number = head, 0
        self._command = ["python", str(ROOT / "jobs/pretrain.py"), "--config", config, "--run-dir", str(run_dir)]
        self._command += [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]

    @property
    def _id(self) -> str:
        return f"{self.run_dir.name}-{self._number}"

    def submit(self, *, wait: bool = False) -> str:
        """Submits it. Returns what the command says; of the whole run if it waits. Raises RuntimeError on failure."""
        self._number += 1
        options = ["--runtime-env", str(ROOT / "deploy/job.yaml"), f"--submission-id={self._id}"]
        done = self._ray("submit", *options, *([] if wait else ["--no-wait"]), "--", *self._command)
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:])
        return done.stdout

    def stop(self) -> str:
        """Stops it by ``ray job stop``. Returns all that it has said."""
        self._ray("stop", self._id)
        return self.log()

    def log(self) -> str:
        """What it has said since it was submitted last."""
        return self._ray("logs", self._id).stdout

    def _ray(self, verb: str, *arguments: str) -> Any:
        return self._head.ray("job", verb, "--address", self._head.dashboard, *arguments)

    def wait(self, ready: Callable[[], Any]) -> float:
        """Seconds until ``ready()``. Raises RuntimeError after _LIMIT_S."""
        began = time.monotonic()
        while not ready():
            if time.monotonic() - began > _LIMIT_S:
                raise RuntimeError(f"not ready after {_LIMIT_S:.0f} s; {self.log()[-3000:]}")
            time.sleep(0.05)
        return round(time.monotonic() - began, 1)

    def goes_on(self, steps: int = 3) -> None:
        """Waits for some steps more."""
        before = last_step(self.run_dir)
        self.wait(lambda: last_step(self.run_dir) >= before + steps)


@contextlib.contextmanager
def held(job: Job) -> Iterator[None]:
    """Holds up every picture inside the block."""
    path = job.run_dir.parent / "held"
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def story(head: Head, job: Job, machines: list[Machine], *, slow_steps: bool) -> dict:
    """Seconds that each event of the story took until its effect. machines: of the workers, which join.

    slow_steps: whether steps take long even if pictures do not.
    """
    job.submit()
    for machine in machines:
        machine.await_joined()
    found = {"workers' machines there, until the first step": job.wait(lambda: last_step(job.run_dir))}
    say(f"{found}; a machine for decoding joins")
    began = time.monotonic()
    with held(job):
        decode = head.machine(*DECODE)
    job.wait(lambda: decode.runs("ray::Map"))
    found["joined, until it decodes"] = round(time.monotonic() - began, 1)
    job.goes_on()
    job.wait(lambda: decode.runs("ray::Map"))
    say(f"{found}; it dies after step {last_step(job.run_dir)}")
    since = time.time()
    decode.die()
    job.wait(lambda: went_after(job.run_dir, since))
    found["decoding lost, until the next step"] = round(went_after(job.run_dir, since).at - since, 1)
    job.goes_on()
    say(f"{found}; the machine of a worker dies after step {last_step(job.run_dir)}, and one joins")
    since = time.time()
    if slow_steps:
        # The next step waits for its pictures.
        (job.run_dir.parent / "slow").unlink()
    machines.pop().die()
    with held(job):
        machines.append(head.machine(*TRAINER))
    job.wait(lambda: went_after(job.run_dir, since))
    found["trainer lost, until the next step"] = round(went_after(job.run_dir, since).at - since, 1)
    job.goes_on()
    began = time.monotonic()
    with held(job):
        said = job.stop()
    found["stopped"] = round(time.monotonic() - began, 1)
    done = last_step(job.run_dir)
    if f"stopped after step {done}, state saved" not in said:
        raise RuntimeError(f"not stopped as it must be: {said[-3000:]}")
    say(f"{found}; stopped after step {done}, submitted again")
    return found | {"steps at the stop": done}


def run(folder: Path, config: str, settings: dict[str, Any], *, slow_steps: bool = False, **environment: str) -> dict:
    """The story, its run ended, and another one left alone; "unequal": a line for each part in which they differ.

    folder: the decoder's files appear in it. environment: of all processes.
    """
    settings = SETTINGS | settings
    # The head has a CPU to decode with.
    with ray_head(*DECODE, **environment) as head, contextlib.ExitStack() as stack:
        machines = [Machine(head, *TRAINER) for _ in range(2)]
        stack.callback(lambda: [machine.die() for machine in machines])
        (folder / "slow").touch()
        job = Job(head, config, folder / "run", settings)
        found = story(head, job, machines, slow_steps=slow_steps)
        (folder / "slow").unlink(missing_ok=True)
        began = time.time()
        said = job.submit(wait=True)
        again = went_after(job.run_dir, began)
        found["submitted again, until the next step"] = again and round(again.at - began, 1)
        if f"resuming {job.run_dir} after step {found['steps at the stop']} of" not in said:
            raise RuntimeError(f"not resumed as it must be: {said[-3000:]}")
        say(f"{found}; a run that is left alone")
        alone = Job(head, config, folder / "alone", settings)
        alone.submit(wait=True)
    steps = [record["step"] for record in records(job.run_dir)]
    once = steps == list(range(1, len(steps) + 1))
    return found | {"steps": len(steps), "each once": once, "unequal": unequal(bits(job.run_dir), bits(alone.run_dir))}


def paced_decoder(folder: Path, seconds: float) -> str:
    """Writes the decoder of the user's own. Returns the PYTHONPATH of the cluster's processes, which import it."""
    path = folder / "own.py"
    path.write_text(PACED.format(folder=str(folder), seconds=seconds))
    # This process reads the recipe too, with the parameters.
    spec = importlib.util.spec_from_file_location("own", path)
    sys.modules["own"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["own"])
    return f"{ROOT}:{folder}"


def toy(folder: Path, corpus: Path, *, num_steps: int, **environment: str) -> dict:
    """The story of the recipe of the tests. folder: new."""
    recipe = quick_recipe(corpus, folder / "compiled", num_steps=num_steps)
    recipe["data_sets"]["digits"]["image"]["decoder"] = "own:image"
    recipe["cluster"]["block_steps"] = 1
    for data_set in recipe["data_sets"].values():
        # Nothing is evaluated at the end.
        del data_set["held_out"]
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    path = paced_decoder(folder, 0.4)
    return run(folder, str(folder / "toy.yaml"), {}, PYTHONPATH=path, **environment)


def demo(folder: Path, *, num_steps: int) -> dict:
    """The story of the demo. folder: new."""
    settings = {"train.num_steps": num_steps, "train.checkpoint_every": 5, "train.log_samples": "true"}
    settings |= {"logging.progress": "none", "cluster.compile_cache": folder / "compiled", "evaluate": "[]"}
    settings |= {f"data_sets.{name}.image.decoder": "own:image" for name in ("digits", "emoji")}
    settings |= {f"data_sets.{name}.held_out": "{}" for name in ("digits", "emoji", "moving")}
    cache = {"IMP_CACHE": os.environ["IMP_CACHE"]} if "IMP_CACHE" in os.environ else {}
    # Of 32 pictures a worker, in half of the steps.
    return run(folder, "demo", settings, slow_steps=True, PYTHONPATH=paced_decoder(folder, 0.4), **cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="toy", choices=("toy", "demo"))
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    # The cluster's processes would outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.config == "demo":
            found = demo(folder, num_steps=args.steps)
        else:
            from pipeline.data.demo import build

            found = toy(folder, build(folder / "corpus", limit=48, progress=False), num_steps=args.steps)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
