# ruff: noqa: E501
"""What is read from a compiled program's text, and counted in its trace."""

import jax
import jax.numpy as jnp
import pytest

from pipeline.planning.program import read_program, traced_flops

# Two layers in a loop: a fusion of 100 cycles, an exchange of 4 x 8 bfloat16; outside it a sum over devices of 16 floats.
TEXT = """\
HloModule step

%fused (p.0: bf16[4,8]) -> bf16[4,8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[4,8]{1,0} copy(%p.0), backend_config={"window_config":{"estimated_cycles":"7"}}
}

%body (arg.0: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg.0 = (s32[], bf16[4,8]{1,0:T(8,128)}) parameter(0)
  %f.1 = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/while/body/attention/mul"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %a.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-to-all(%f.1), channel_id=1, dimensions={0}
  ROOT %t.1 = (s32[], bf16[4,8]{1,0}) tuple(%i, %a.1)
}

%condition (arg.1: (s32[], bf16[4,8])) -> pred[] {
  %arg.1 = (s32[], bf16[4,8]{1,0:T(8,128)}) parameter(0)
  %constant.3 = s32[]{:T(128)} constant(2)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %constant.3), direction=LT
}

ENTRY %main (p: bf16[4,8]) -> f32[16] {
  %w.1 = (s32[], bf16[4,8]{1,0:T(8,128)}) while(%tuple.1), condition=%condition, body=%body
  %g.1 = (f32[2]{0}, f32[16]{0:T(128)}) all-gather-start(%s), channel_id=3, dimensions={0}
  %g.2 = f32[16]{0:T(128)} all-gather-done(%g.1)
  %u.1 = f32[16]{0:T(128)} fusion(%g.2), kind=kLoop, calls=%other, metadata={op_name="jit(step)/optimizer/add"}, backend_config={"window_config":{"estimated_cycles":"50"}}
  ROOT %r.1 = (f32[16]{0:T(128)}, pred[4]{0}) all-reduce(%u.1, %p.1), channel_id=2, to_apply=%add
}
"""


def test_loops_count_as_often_as_they_run_and_fusions_once():
    program = read_program(TEXT)
    assert program.cycles == 2 * 100 + 50 and program.unknown_loops == 0
    assert program.scopes == {"attention": 200, "optimizer": 50}


def test_collectives_are_counted_by_kind_with_the_bytes_of_their_results():
    assert read_program(TEXT).collectives == {
        "all-to-all": [2, 2 * 4 * 8 * 2],
        "all-gather": [1, 16 * 4],
        "all-reduce": [1, 16 * 4 + 4],
    }


def test_gathers_are_counted_by_the_size_of_what_is_gathered():
    assert read_program(TEXT).gathers == {16: 64}
    combined = """\
ENTRY %main (p: bf16[4,8]) -> f32[16] {
  %g.1 = ((f32[2]{0}, bf16[1,8]{1,0}), (f32[16]{0}, bf16[8,8]{1,0})) all-gather-start(%a, %b), dimensions={0}
  %g.2 = (f32[16]{0}, bf16[8,8]{1,0}) all-gather(%a, %b), dimensions={0}
}
"""
    program = read_program(combined)
    assert program.gathers == {16: 2 * 64, 64: 2 * 128} and program.collectives == {"all-gather": [2, 2 * (64 + 128)]}


def test_a_loop_of_unknown_length_is_said():
    program = read_program(TEXT.replace("constant(2)", "parameter(1)"))
    assert program.unknown_loops == 1 and program.cycles == 150


def test_flops_of_a_trace():
    def step(x, weights):
        def layer(x, w):
            return jax.checkpoint(lambda x: jnp.sin(x @ w))(x), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    x, weights = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    product = 2 * 4 * 8 * 8
    assert traced_flops(jax.make_jaxpr(step)(x, weights)) == 3 * product
    # Forward, forward again, and a product for each of the two gradients.
    assert traced_flops(jax.make_jaxpr(jax.grad(step, argnums=(0, 1)))(x, weights)) == 3 * 4 * product


def test_a_program_of_this_machine_is_read():
    """The loop's rounds as the CPU's compiler writes them."""

    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ x), x)

    text = jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text()
    assert "while" in text and read_program(text).unknown_loops == 0


@pytest.mark.parametrize("text", ["", "HloModule empty\n", "ENTRY %main () -> f32[] {\n}\n"])
def test_an_empty_program_costs_nothing(text):
    program = read_program(text)
    assert (program.cycles, program.collectives) == (0, {})
