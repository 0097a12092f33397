import jax
import pytest

from pipeline.train import devices


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("TPU v4 lite", None),
        ("TPU v3", None),
    ],
)
def test_peak_of_a_kind(kind, peak):
    assert devices.peak_flops(kind) == peak


def test_a_compile_cache_that_cannot_be_made_is_left_out(tmp_path, capsys):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    devices.use_compile_cache(str(tmp_path / "file/compiled"))
    assert jax.config.jax_compilation_cache_dir == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled steps are not kept for later runs (cluster.compile_cache): ")


class Device:
    def __init__(self, **stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats or None


def test_memory(monkeypatch):
    """The fullest device; nothing of devices that do not say."""
    found = devices.memory()
    assert set(found) == {"rss_bytes"} and 50e6 < found["rss_bytes"] < 1e12
    mine = [Device(bytes_in_use=5, peak_bytes_in_use=9), Device(bytes_in_use=7, peak_bytes_in_use=8), Device()]
    monkeypatch.setattr(jax, "local_devices", lambda: mine)
    assert devices.memory() | {"rss_bytes": 0} == {"rss_bytes": 0, "device_bytes": 7, "device_peak_bytes": 9}
