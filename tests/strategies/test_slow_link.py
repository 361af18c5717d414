"""On a link of 1 Gbit/s: what crosses the wire, ranks that agree, and a harness that leaves nothing. Nothing about speed."""

import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import slow_link
from benchmarks.slow_link import Perceptron, digest, measure, noise, why_unavailable

WIDTHS = (4096, 512)  # 2.1 M weights, and few biases, which always go dense
FEWER = 300


@pytest.fixture
def root():
    if reason := why_unavailable():
        pytest.skip(reason)


class Forked:
    """Runs what a link would run in new interpreters in forked processes, which have imported everything.

    Args:
        link: In whose namespaces they run.
        folder: Where they write what they print.
    """

    def __init__(self, link: slow_link.Link, folder: Path) -> None:
        self.link, self.folder = link, folder

    def run(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> list[str]:
        assert command[-2] == slow_link.CHILD
        context = multiprocessing.get_context("fork")
        outs = [self.folder / f"{rank}.txt" for rank in range(slow_link.RANKS)]
        processes = [
            context.Process(
                target=_train, args=(name, {**env, **self.link.variables(rank)}, command[-1], outs[rank]), daemon=True
            )
            for rank, name in enumerate(self.link.names)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60.0)
        assert [process.exitcode for process in processes] == [0, 0], [out.read_text() for out in outs]
        return [out.read_text() for out in outs]


def _train(namespace: str, variables: dict[str, str], task: str, out: Path) -> None:
    """Train in a network namespace, and leave without what belongs to the test runner."""
    code = 1
    with out.open("w") as file, contextlib.redirect_stdout(file):
        try:
            with open(f"/run/netns/{namespace}") as entry:
                assert ctypes.CDLL(None).setns(entry.fileno(), 0) == 0
            os.environ |= variables
            slow_link._train(task)
            code = 0
        except BaseException:
            print(traceback.format_exc())
    os._exit(code)


def namespaces() -> list[str]:
    """Return the namespaces that this process has made and not deleted."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"slow-{os.getpid()}-*")) if folder.exists() else []


@pytest.mark.needs_root
@pytest.mark.usefixtures("root")
def test_dgc_sends_300_times_less_than_ddp_over_the_wire_and_ranks_agree(tmp_path):
    with slow_link.slow_link(1000.0) as link:
        assert namespaces() == sorted(link.names)
        # It raises unless the ranks end with equal weights.
        sparse = measure(Forked(link, tmp_path), "dgc", steps=2, settle=0, widths=WIDTHS)
    ddp = 4 * (WIDTHS[0] + 1) * WIDTHS[1] / 1e6  # of two ranks, each sends at least its gradients
    pairs_and_biases = 8 * math.ceil(1e-3 * WIDTHS[0] * WIDTHS[1]) + 4 * WIDTHS[1]
    assert pairs_and_biases / 1e6 <= sparse.megabytes < ddp / FEWER
    assert namespaces() == []


def test_ranks_that_do_not_agree_in_the_end_are_an_error():
    class Told:
        def run(self, command, env, timeout_s):
            assert json.loads(command[-1])["widths"] == [8, 4]
            return [json.dumps({"milliseconds": [1.0], "sent": [2], "weights": weights}) for weights in self.weights]

    link = Told()
    link.weights = ["a", "a"]
    assert measure(link, "ddp", widths=(8, 4)).milliseconds == 1.0
    link.weights = ["a", "b"]
    with pytest.raises(RuntimeError, match="different weights"):
        measure(link, "ddp", widths=(8, 4))
    # Agreement says something: gradients differ, and one entry more or less shows.
    assert not torch.equal(noise(WIDTHS, 0)[0], noise(WIDTHS, 1)[0])
    module = Perceptron((8, 4))
    before = digest(module)
    module.layers[0].weight.data[0, 0] += 1e-6
    assert digest(module) != before


@pytest.mark.needs_root
@pytest.mark.usefixtures("root")
def test_what_still_runs_ends_with_the_link():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with slow_link.slow_link(1000.0) as link:
        process = subprocess.Popen(["ip", "netns", "exec", link.names[0], *command])
        with pytest.raises(TimeoutError, match="more than 0"):
            link.run(command, {}, timeout_s=0.3)
    assert process.wait(5) != 0
    assert namespaces() == []
