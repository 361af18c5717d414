"""Steps back run last in first out, once, and all of them."""

import functools

import pytest

from lightning_grad.core.undo import UndoList


def test_steps_run_last_in_first_out() -> None:
    ran: list[int] = []
    undo = UndoList()
    for step in range(4):
        undo.push(functools.partial(ran.append, step))
    assert len(undo) == 4
    undo.run()
    assert ran == [3, 2, 1, 0]


def test_running_twice_does_nothing_more() -> None:
    ran: list[int] = []
    undo = UndoList()
    undo.push(lambda: ran.append(1))
    undo.run()
    undo.run()
    assert ran == [1]
    assert len(undo) == 0


def test_list_serves_again_after_it_has_run() -> None:
    ran: list[str] = []
    undo = UndoList()
    undo.push(lambda: ran.append("first fit"))
    undo.run()
    undo.push(lambda: ran.append("second fit"))
    undo.run()
    assert ran == ["first fit", "second fit"]


def test_failing_step_warns_and_the_others_run() -> None:
    ran: list[str] = []
    undo = UndoList()
    undo.push(lambda: ran.append("before"))
    undo.push(lambda: 1 / 0)
    undo.push(lambda: ran.append("after"))
    with pytest.warns(UserWarning, match="could not undo .*ZeroDivisionError: division by zero"):
        undo.run()
    assert ran == ["after", "before"]
    undo.run()
    assert ran == ["after", "before"]


def test_step_pushed_while_running_runs_too() -> None:
    ran: list[str] = []
    undo = UndoList()
    undo.push(lambda: undo.push(lambda: ran.append("pushed late")))
    undo.run()
    assert ran == ["pushed late"]


def test_interrupt_is_not_swallowed() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    undo = UndoList()
    undo.push(interrupt)
    with pytest.raises(KeyboardInterrupt):
        undo.run()
