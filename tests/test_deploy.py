"""cluster.yaml and deploy/ hold together. Starts no Ray and imports none: only its wheel's schema is read."""

import json
import math
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILES = ["cluster.yaml", "deploy/rayjob.yaml", "deploy/Dockerfile", "deploy/README.md"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load(read("cluster.yaml"))


@pytest.fixture(scope="module")
def rayjob():
    return yaml.safe_load(read("deploy/rayjob.yaml"))


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


def test_cluster_is_valid_against_rays_schema(cluster):
    schema = Path(find_spec("ray").origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))


def test_head_takes_no_work_and_hides_the_dashboard(cluster):
    assert node_type(cluster, cluster["head_node_type"])["resources"] == {"CPU": 0}
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_decode_pool_has_cpus_only_and_may_be_empty(cluster):
    decode = node_type(cluster, "decode")
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


def test_worker_limits_add_up_and_idle_machines_go(cluster):
    types = cluster["available_node_types"].values()
    assert cluster["max_workers"] == sum(t.get("max_workers", 0) for t in types)
    assert 1 <= cluster["idle_timeout_minutes"] <= 30


def test_every_node_asks_for_the_token(cluster):
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]


def test_mounted_files_exist(cluster):
    local = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert local
    assert [path for path in local if not (ROOT / path).exists()] == []


def test_all_that_a_build_of_the_package_reads_is_shipped(cluster):
    needed = {"pyproject.toml", "setup.py", "LICENSE", "NOTICE", "model", "pipeline", "configs"}
    assert needed <= set(cluster["file_mounts"].values())
    before, install, _ = read("deploy/Dockerfile").partition("RUN pip install")
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", before, re.MULTILINE) for word in line.split()}
    assert install and needed <= copied


def test_ray_is_pinned_to_one_version_that_the_project_allows(rayjob):
    dependencies = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    allowed = next(r for r in map(Requirement, dependencies) if r.name == "ray").specifier
    pins = {pin for name in FILES for pin in re.findall(r"ray\[[\w,]+\]==([\d.]+)|RAY_VERSION=([\d.]+)", read(name))}
    versions = {version for pin in pins for version in pin if version}
    versions.add(rayjob["spec"]["rayClusterSpec"]["rayVersion"])
    assert len(versions) == 1
    assert allowed.contains(versions.pop())


def test_extras_exist():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    used = {e for name in FILES for found in re.findall(r"imp\[([\w,]+)\]|EXTRAS=([\w,]+)", read(name)) for e in found}
    assert {extra for part in used if part for extra in part.split(",")} == {"demo", "cuda", "tpu"} <= set(extras)


def test_rayjob_runs_the_demo_on_a_slice_of_several_hosts(rayjob):
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    command = shlex.split(rayjob["spec"]["entrypoint"])
    expected = "python jobs/pretrain.py --config configs/demo.yaml --run-dir /mnt/runs/demo"
    assert command[:6] == shlex.split(expected)
    spec = rayjob["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"

    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    pods = [spec["headGroupSpec"]["template"]["spec"], *(group["template"]["spec"] for group in groups.values())]
    for pod in pods:
        assert pod["containers"][0]["image"] == pods[0]["containers"][0]["image"]
        assert [m["mountPath"] for m in pod["containers"][0]["volumeMounts"]] == ["/mnt/runs"]
        assert pod["volumes"][0]["persistentVolumeClaim"]
        assert pod["securityContext"]["runAsNonRoot"]
    assert groups["decode"]["minReplicas"] == 0 < groups["decode"]["maxReplicas"]
    assert set(groups["decode"]["template"]["spec"]["containers"][0]["resources"]["limits"]) == {"cpu", "memory"}

    hosts, pod = groups["tpu"]["numOfHosts"], groups["tpu"]["template"]["spec"]
    per_host = int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert hosts > 1
    assert chips(topology) == hosts * per_host
    settings = overrides(rayjob["spec"]["entrypoint"])
    assert settings["num_workers"] == str(hosts)
    assert settings["accelerators_per_worker"] == str(per_host)
    assert settings["topology"] == topology


@pytest.mark.parametrize("name", FILES)
def test_what_is_mentioned_exists(name):
    text = read(name)
    paths = set(re.findall(r"(?<![\w/])(?:configs|jobs|deploy)/[\w.-]+\.\w+|(?<![\w/])cluster\.yaml", text))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert set(overrides(text)) <= cluster_settings()


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
