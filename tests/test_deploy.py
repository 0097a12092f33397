"""cluster.yaml and deploy/ hold together. Starts no Ray and imports none: only its wheel's schema is read."""

import contextlib
import copy
import json
import math
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from tests.kuberay_schema import RAY_JOB

ROOT = Path(__file__).resolve().parent.parent
LAUNCHED = ["cluster.yaml", "deploy/aws.yaml"]
RAY_JOBS = ["deploy/kuberay-gpu.yaml", "deploy/kuberay-tpu.yaml"]
PAGES = [f"docs/runbooks/{name}.md" for name in ("submit", "aws", "kuberay-gpu", "kuberay-tpu", "slurm")]
FILES = [*LAUNCHED, *RAY_JOBS, "deploy/slurm.sh", "deploy/job.yaml", "deploy/Dockerfile", "deploy/README.md", *PAGES]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=LAUNCHED)
def launched(request):
    """Each file of ``ray up``."""
    return yaml.safe_load(read(request.param))


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load(read("cluster.yaml"))


@pytest.fixture(scope="module", params=RAY_JOBS)
def ray_job(request):
    """Each RayJob of KubeRay."""
    return yaml.safe_load(read(request.param))


def cluster_settings():
    """The keys that a recipe takes below `cluster`."""
    schema = json.loads(read("configs/recipe.schema.json"))
    return set(schema["$defs"]["ClusterSettings"]["properties"])


def overrides(text):
    """{KEY: VALUE} of each --set cluster.KEY=VALUE."""
    return dict(re.findall(r"--set cluster\.(\w+)=(\S+)", text))


def chips(topology):
    return math.prod(int(n) for n in topology.split("x"))


def node_type(cluster, name):
    return cluster["available_node_types"][name]


def test_cluster_is_valid_against_rays_schema(launched):
    schema = Path(find_spec("ray").origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(launched, json.loads(schema.read_text(encoding="utf-8")))


def test_head_takes_no_work_and_hides_the_dashboard(launched):
    assert node_type(launched, launched["head_node_type"])["resources"] == {"CPU": 0}
    assert "--dashboard-host=127.0.0.1" in launched["head_start_ray_commands"][-1]


def test_decode_pool_has_cpus_only_and_may_be_empty(launched):
    decode = node_type(launched, "decode")
    assert set(decode["resources"]) == {"CPU"}
    assert decode["min_workers"] == 0 < decode["max_workers"]


@pytest.mark.parametrize(("name", "resource", "extra"), [("gpu_trainer", "GPU", "cuda"), ("tpu_trainer", "TPU", "tpu")])
def test_trainers_have_their_accelerator_and_its_packages(cluster, name, resource, extra):
    trainer = node_type(cluster, name)
    assert trainer["resources"][resource] > 0
    assert trainer["min_workers"] == 0 < trainer["max_workers"]
    assert f"[demo,{extra}]" in trainer["worker_setup_commands"][-1]
    # They replace setup_commands: all but the last are the same.
    assert trainer["worker_setup_commands"][:-1] == cluster["setup_commands"][:-1]
    comment = re.search(rf"--set .*accelerator={resource.lower()}.*accelerators_per_worker=(\d+)", read("cluster.yaml"))
    assert int(comment[1]) == trainer["resources"][resource]


def test_tpu_slice_of_the_launcher_is_one_host(cluster):
    trainer = node_type(cluster, "tpu_trainer")
    assert chips(trainer["node_config"]["acceleratorConfig"]["topology"]) == trainer["resources"]["TPU"] <= 8


def test_worker_limits_add_up_and_idle_machines_go(launched):
    types = launched["available_node_types"].values()
    assert launched["max_workers"] == sum(t.get("max_workers", 0) for t in types)
    assert 1 <= launched["idle_timeout_minutes"] <= 30


def test_every_node_asks_for_the_token(launched):
    assert launched["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (launched["head_start_ray_commands"], launched["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]


def test_mounted_files_exist(launched):
    local = [path for path in launched["file_mounts"].values() if not path.startswith("~")]
    assert local
    assert [path for path in local if not (ROOT / path).exists()] == []


def test_all_that_a_build_of_the_package_reads_is_shipped(launched):
    needed = {"pyproject.toml", "setup.py", "LICENSE", "NOTICE", "model", "pipeline", "configs"}
    assert needed <= set(launched["file_mounts"].values())
    before, install, _ = read("deploy/Dockerfile").partition("RUN pip install")
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", before, re.MULTILINE) for word in line.split()}
    assert install and needed <= copied


def test_ray_is_pinned_to_one_version_that_the_project_allows():
    dependencies = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    allowed = next(r for r in map(Requirement, dependencies) if r.name == "ray").specifier
    pins = {pin for name in FILES for pin in re.findall(r"ray\[[\w,]+\]==([\d.]+)|RAY_VERSION=([\d.]+)", read(name))}
    versions = {version for pin in pins for version in pin if version}
    versions |= {yaml.safe_load(read(name))["spec"]["rayClusterSpec"]["rayVersion"] for name in RAY_JOBS}
    assert len(versions) == 1
    assert allowed.contains(versions.pop())


def test_extras_exist():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    used = {e for name in FILES for found in re.findall(r"imp\[([\w,]+)\]|EXTRAS=([\w,]+)", read(name)) for e in found}
    assert {extra for part in used if part for extra in part.split(",")} == {"demo", "cuda", "tpu"} <= set(extras)


def groups_of(ray_job):
    return {group["groupName"]: group for group in ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def test_a_ray_job_has_no_field_that_kuberay_lacks(ray_job):
    jsonschema.validate(ray_job, RAY_JOB)
    misspelt = copy.deepcopy(ray_job)
    misspelt["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(misspelt, RAY_JOB)


def test_a_ray_job_runs_the_demo_and_has_time_to_save(ray_job):
    command = shlex.split(ray_job["spec"]["entrypoint"])
    expected = "python jobs/pretrain.py --config configs/demo.yaml --run-dir /mnt/runs/demo"
    assert command[:6] == shlex.split(expected)
    spec = ray_job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in head["env"]


def test_pods_of_a_ray_job_share_the_image_and_the_runs(ray_job):
    groups = groups_of(ray_job)
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]
    pods = [head["template"]["spec"], *(group["template"]["spec"] for group in groups.values())]
    for pod in pods:
        assert pod["containers"][0]["image"] == pods[0]["containers"][0]["image"]
        assert [m["mountPath"] for m in pod["containers"][0]["volumeMounts"]] == ["/mnt/runs"]
        assert pod["volumes"][0]["persistentVolumeClaim"]
        assert pod["securityContext"]["runAsNonRoot"]
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
    assert groups["decode"]["minReplicas"] == 0 < groups["decode"]["maxReplicas"]
    assert set(groups["decode"]["template"]["spec"]["containers"][0]["resources"]["limits"]) == {"cpu", "memory"}


def test_a_tpu_slice_is_whole():
    ray_job = yaml.safe_load(read("deploy/kuberay-tpu.yaml"))
    group = groups_of(ray_job)["tpu"]
    hosts, pod = group["numOfHosts"], group["template"]["spec"]
    per_host = int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert hosts > 1
    assert chips(topology) == hosts * per_host
    settings = overrides(ray_job["spec"]["entrypoint"])
    assert settings["num_workers"] == str(hosts)
    assert settings["accelerators_per_worker"] == str(per_host)
    assert settings["topology"] == topology


def test_gpu_pods_and_workers_agree():
    ray_job = yaml.safe_load(read("deploy/kuberay-gpu.yaml"))
    groups = groups_of(ray_job)
    gpus = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    settings = overrides(ray_job["spec"]["entrypoint"])
    assert settings["accelerators_per_worker"] == gpus
    assert json.loads(settings["num_workers"]) == [groups["gpu"]["minReplicas"], groups["gpu"]["maxReplicas"]]
    cpus = int(groups["decode"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert json.loads(settings["decode_cpus"])[1] == groups["decode"]["maxReplicas"] * cpus


def test_ray_job_stop_leaves_time_to_save(launched):
    assert "RAY_JOB_STOP_WAIT_TIME_S=120" in launched["head_start_ray_commands"][-1]
    assert yaml.safe_load(read("deploy/job.yaml")) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}


@pytest.mark.parametrize("name", [*LAUNCHED, *RAY_JOBS, "deploy/slurm.sh"])
def test_costs_are_said_with_region_and_date(name):
    comments = [line.lstrip("# ") for line in read(name).splitlines() if line.startswith("#")]
    said = " ".join(comments).partition("Costs:")[2][:400]
    assert re.search(r"list price", said) and re.search(r"\bus-\w+-?\d", said) and re.search(r"\b2026\b", said)


@pytest.mark.parametrize("name", FILES)
def test_what_is_mentioned_exists(name):
    text = read(name)
    paths = set(re.findall(r"(?<![\w/])(?:configs|jobs|deploy|docs)/[\w./-]+\.\w+|(?<![\w/])cluster\.yaml", text))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert set(overrides(text)) <= cluster_settings()


# Programs of SLURM and of Ray, and the run, as the script sees them; each notes how it was called.
STUBS = {
    "scontrol": """
if [ "$1" = show ]; then echo first; echo second; else echo "scontrol $*" >> "$CALLS"; fi""",
    "srun": """
while [ "$1" != bash ]; do shift; done
SLURM_PROCID=0 "$@" & SLURM_PROCID=1 "$@" & wait""",
    "ray": """
if [ "$1" = start ]; then echo "ray $*" >> "$CALLS"; exec sleep 60; fi
grep -q "ray start --head" "$CALLS" """,
    "python": """
trap 'echo "saved" >> "$CALLS"; exit 75' TERM
echo "python $*" >> "$CALLS"
while true; do sleep 0.05; done""",
}


@pytest.mark.parametrize(("signal_name", "requeued"), [("USR1", True), ("TERM", False)])
def test_a_slurm_job_starts_ray_everywhere_and_saves_before_it_ends(tmp_path, signal_name, requeued):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash{text}\n")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "48", "SLURM_GPUS_ON_NODE": "4", "CALLS": str(calls)}
    job = subprocess.Popen(
        ["bash", ROOT / "deploy/slurm.sh", "--config", "mine.yaml", "--run-dir", "/shared/run"],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while len(calls.read_text().splitlines()) < 3:
            assert job.poll() is None and time.monotonic() < deadline, calls.read_text()
            time.sleep(0.05)
        job.send_signal(getattr(signal, f"SIG{signal_name}"))
        assert job.wait(timeout=200) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    lines = calls.read_text().splitlines()
    common = "--num-cpus=48 --num-gpus=4 --disable-usage-stats --block"
    port = 20000 + 123456 % 20000
    assert set(lines[:3]) == {
        f"ray start --head --port={port} --dashboard-host=127.0.0.1 {common}",
        f"ray start --address=first:{port} {common}",
        f"python jobs/pretrain.py --set cluster.num_workers=2 --set cluster.address=first:{port} "
        "--set cluster.accelerator=gpu --set cluster.accelerators_per_worker=4 "
        "--config mine.yaml --run-dir /shared/run",
    }
    assert lines[3:] == ["saved", *["scontrol requeue 123456"] * requeued]


def test_image_is_slim_and_not_root():
    lines = read("deploy/Dockerfile").splitlines()
    assert "FROM python:3.12-slim" in lines
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]


@pytest.mark.parametrize("name", [*FILES, "NOTICE"])
def test_no_secrets(name):
    text = read(name)
    assert not re.search(r"-----BEGIN|PRIVATE KEY|AKIA[0-9A-Z]{16}|\bgh[pousr]_\w{20}|\bAIza[\w-]{30}", text)
    # The token comes from a file or a Secret, never from these files.
    assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]\s*[^$\s]", text)
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)


def test_license_and_notice():
    license_text, notice = read("LICENSE"), read("NOTICE")
    assert "Version 2.0, January 2004" in license_text
    assert "END OF TERMS AND CONDITIONS" in license_text
    for part in ("OpenMoji", "CC BY-SA 4.0", "UCI Machine Learning Repository", "emoji, BSD"):
        assert part in notice
