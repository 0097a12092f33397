"""CPUs and memory of a container are those that it is given, not those of the machine below it."""

import os

import pytest

from pipeline import host_memory

CPUS = len(os.sched_getaffinity(0))
BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({}, 64, BYTES),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, 64, BYTES),
        ({"cpu.max": "150000 100000\n", "memory.max": "1000000000\n"}, 2, 1_000_000_000),
        ({"cpu.max": "10000 100000\n"}, 1, BYTES),
        ({"cpu.max": "9900000 100000\n"}, 64, BYTES),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64, BYTES),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3, BYTES),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 64, BYTES),
        ({"memory/memory.limit_in_bytes": "2000000000\n"}, 64, 2_000_000_000),
    ],
)
def test_limits_of_a_container(tmp_path, monkeypatch, files, cpus, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert (host_memory.machine_cpus(), host_memory.machine_bytes()) == (cpus, memory)


def test_a_machine_without_a_limit_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    assert (host_memory.machine_cpus(), host_memory.machine_bytes()) == (CPUS, BYTES)


def test_memory_that_is_taken(tmp_path, monkeypatch):
    assert 0 < host_memory.used_share() < 1
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("960000000\n")
    assert host_memory.used_share() == 0.96
    # Cached files give way to what needs the room.
    (tmp_path / "memory.stat").write_text("anon 400000000\ninactive_file 460000000\nactive_file 1\n")
    assert host_memory.used_share() == 0.5
    # No limit of its own: others fill the machine too.
    (tmp_path / "memory.max").write_text("max\n")
    assert 0 < host_memory.used_share() < 1 and host_memory.used_share() != 0.96
