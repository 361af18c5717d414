"""Run code under test in one known environment, and restore the caller's."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from lightning_grad.data.random_streams import random_streams_kept


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Use one thread, and hide warnings, logs and what is printed; then restore these, random states and much else.

    ``seed_everything`` writes environment variables, and a callback may change the rest.
    """
    threads, logs, folder = torch.get_num_threads(), logging.root.manager.disable, Path.cwd()
    variables = dict(os.environ)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with random_streams_kept(), interruptible(), hidden():
                yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(logs)
        _restore_variables(variables)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        os.chdir(folder)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hide what is printed in the block: progress bars of many fits, mostly."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Collect the text of each warning of the block."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts += [str(warning.message) for warning in caught]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Restore the handler of Ctrl-C after the block: Lightning ignores SIGINT once Ctrl-C has ended a fit."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)


def _restore_variables(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
