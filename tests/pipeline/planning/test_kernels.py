"""Cycles of a kernel, from the schedule that a compiler dumps."""

import jax
import jax.numpy as jnp
import pytest

from model import tpu_attention
from model.config import ModelConfig
from pipeline.planning import kernels
from pipeline.planning.program import Kernel, read_program, traced_flops

# Two bundles before the loop over the grid, three in it, of which two in the loop over heads; one after it.
SCHEDULE = """\
= control target key start
LH: loop header

     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1   :  { %s2 = sadd.s32 1, %s1 }
   0x2 LB: > { %s3 = smov 0 }
   0x3 LB: > > { %v4 = vld [vmem:[%s5]]  ;;  %v6 = vadd.f32 %v4, %v4 }
   0x4   : > > { %7 = vst [vmem:[%s5]] %v6 }
   0x5   :  { %8 = vsyncpa [#allocation8], 1 }
"""
TEXT = """\
ENTRY %main (p: bf16[8,3,256,128]) -> bf16[8,256,128] {
  %attention_forward.7 = bf16[8,256,128]{2,1,0:T(8,128)(2,1)} custom-call(%p, %q), custom_call_target="tpu_custom_call"
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "schedules", lambda: tmp_path)
    return tmp_path


def test_bundles_are_counted_by_the_loops_around_them():
    assert kernels.bundles_by_depth(SCHEDULE) == {0: 3, 1: 1, 2: 2}


@pytest.mark.parametrize(("device", "cores"), [("v4", 2), ("v5e", 1)])
def test_cycles_are_bundles_times_the_rounds_of_their_loops(folder, device, cores):
    config = ModelConfig(width=256, depth=1, num_heads=4, mlp_dim=8)
    (kernel,) = read_program(TEXT).kernels
    assert kernel == Kernel("attention_forward.7", tpu_attention.FORWARD, (8, 256, 128), 1.0)
    (folder / "12-attention_forward.7-01-final_bundles.txt").write_text(SCHEDULE)
    (folder / "12-attention_forward.7-00-schedule-analysis_final_bundles.txt").write_text("total: 6")
    # Four heads of a sample are one step, two rounds of two heads; eight samples are eight steps.
    expected = 3 + 8 / cores * (1 + 2 * 2)
    assert kernels.cycles([kernel], config, device) == {tpu_attention.FORWARD: expected}
    # One that is alike and has no schedule of its own costs as much each time.
    alike = Kernel("attention_forward.9", tpu_attention.FORWARD, (8, 256, 128), 3.0)
    assert kernels.cycles([kernel, alike], config, device) == {tpu_attention.FORWARD: 4 * expected}
    other = Kernel("attention_forward.9", tpu_attention.FORWARD, (8, 256, 256), 1.0)
    assert kernels.cycles([kernel, other], config, device) is None


def test_products_of_a_kernel_count_in_every_step_of_its_grid_and_round_of_its_loops():
    qkv = jax.ShapeDtypeStruct((8, 3, 256, 128), jnp.bfloat16)
    trace = jax.make_jaxpr(lambda qkv: tpu_attention.attend(qkv, None, None, num_heads=4))(qkv)
    # Scores and values of 8 samples and 4 heads over 128 x 128, each with 64 + 16 rows.
    assert traced_flops(trace) == 2 * 8 * 4 * (2 * 128 * 128 * 80)
