"""A Ctrl-C within an exchange comes at its end, and everything is as it was afterwards."""

import signal
import threading
from collections.abc import Iterator

import pytest

from lightning_grad.strategies._collectives import interrupts_deferred


@pytest.fixture(autouse=True)
def _python_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_arrives_at_the_end():
    done = []

    def work() -> None:
        with interrupts_deferred():
            interrupt()
            done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_many_are_one():
    seen = []
    signal.signal(signal.SIGINT, lambda *arguments: seen.append(arguments))
    with interrupts_deferred():
        interrupt()
        interrupt()
        assert seen == []
    assert [number for number, _ in seen] == [signal.SIGINT]


def test_without_one_nothing_happens():
    with interrupts_deferred():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_nested_blocks_it_arrives_at_the_end_of_the_outer_one():
    done = []

    def work() -> None:
        with interrupts_deferred():
            with interrupts_deferred():
                interrupt()
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_is_kept_beside_the_interrupt():

    def work() -> None:
        with interrupts_deferred():
            interrupt()
            raise ValueError("of the block")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_alone_puts_the_handler_back():
    with pytest.raises(ValueError, match="of the block"), interrupts_deferred():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_no_function_stays(ignored):
    """Lightning ignores Ctrl-C while it shuts down."""
    signal.signal(signal.SIGINT, ignored)
    with interrupts_deferred():
        assert signal.getsignal(signal.SIGINT) is ignored
        if ignored is signal.SIG_IGN:
            interrupt()
    assert signal.getsignal(signal.SIGINT) is ignored


def test_another_thread_changes_nothing():
    seen: list[object] = []

    def work() -> None:
        try:
            with interrupts_deferred():
                seen.append(signal.getsignal(signal.SIGINT))
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
