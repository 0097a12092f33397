"""Graphs are compiled in order, a step waits for its own alone, and one that is not on the list raises an alarm."""

import threading

import pytest

from model.structure import InputShape, Structure
from pipeline.train.compiler import StepCompiler


def structure(batch: int) -> Structure:
    return Structure((("nce", 1.0),), batch, (InputShape("vision", 4, 768, 3), InputShape("text", 8, 0, 1)))


A, B, C, OTHER = (structure(batch) for batch in (2, 4, 8, 16))


def test_graphs_are_compiled_in_order_unless_a_step_waits_for_one():
    order, begun, go_on = [], threading.Event(), threading.Event()

    def compile_one(what):
        order.append(what)
        begun.set()
        go_on.wait(200)
        return what.global_batch_size

    built = []
    compiler = StepCompiler(compile_one, [A, B, C], on_compiled=lambda: built.append(1))
    assert begun.wait(200)
    assert compiler.ready(A) is None and compiler.busy
    waiting = threading.Thread(target=compiler.get, args=(C,))
    waiting.start()
    while C in compiler._next and compiler._next[0] is not C:
        pass
    go_on.set()
    assert [compiler.get(s) for s in (A, B, C)] == [2, 4, 8]
    waiting.join()
    compiler.close()
    assert order == [A, C, B] and len(built) == 3
    assert (compiler.num_compiled, compiler.new_alarms(), compiler.busy) == (3, [], False)


def test_a_graph_that_is_not_on_the_list_raises_an_alarm_once(caplog):
    compiler = StepCompiler(lambda what: what.global_batch_size, [A])
    assert compiler.get(A) == 2
    # The thread has nothing left to do and ends; it starts anew for what was not planned.
    compiler._thread.join()
    assert compiler.get(OTHER) == compiler.get(OTHER) == 16
    assert compiler.new_alarms() == [
        "compiled a graph that was not on the list: nce of 16 x (4 vision tokens, 8 text tokens)"
    ]
    assert compiler.new_alarms() == [] and compiler.alarms == [OTHER]
    assert "not on the list" in caplog.text
    compiler.close()


def test_a_compile_that_fails_reaches_the_step_that_waits():
    def fail(what):
        raise ValueError("no memory for this one")

    compiler = StepCompiler(fail, [A])
    with pytest.raises(ValueError, match="no memory for this one"):
        compiler.get(A)
    compiler.close()


def test_a_wait_for_a_graph_can_be_left():
    go_on = threading.Event()
    compiler = StepCompiler(lambda what: go_on.wait(200), [A])
    assert compiler.get(A, leave=lambda: True) is None
    go_on.set()
    assert compiler.get(A) is True
    compiler.close()


def test_a_graph_is_awaited_first_of_all_on_the_list_or_not():
    order, go_on, leaves = [], threading.Event(), threading.Event()

    def compile_one(what):
        order.append(what)
        go_on.wait(200)

    compiler = StepCompiler(compile_one, [A, B, C])
    while not order:
        pass
    compiler.await_graph(C, lambda: True)
    waiting = threading.Thread(target=compiler.await_graph, args=(OTHER, leaves.is_set))
    waiting.start()
    while OTHER not in compiler._next:
        pass
    go_on.set()
    waiting.join()
    compiler.get(B)
    compiler.close()
    assert order == [A, OTHER, C, B]
