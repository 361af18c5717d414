"""Run code under test in one known environment, and restore the caller's."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Use one thread, and hide warnings and logs; then restore these, random states and the handler of Ctrl-C.

    Lightning ignores SIGINT after the Ctrl-C that ends a fit, and ``seed_everything`` writes environment variables.
    """
    threads, logs = torch.get_num_threads(), logging.root.manager.disable
    variables, states = dict(os.environ), _random_states()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(logs)
        _restore_variables(variables)
        _restore_random_states(states)
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _restore_variables(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _random_states() -> dict[str, Any]:
    numpy = sys.modules.get("numpy")
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    return states if numpy is None else {**states, "numpy": numpy.random.get_state()}


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
