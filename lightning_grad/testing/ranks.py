"""Ranks on one machine: forked processes in a gloo group, which return results and errors."""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_LIMIT = 90.0  # seconds; normal runs take less than a tenth of it


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any, limit: float = _LIMIT) -> list[Any]:
    """Call ``work(*arguments)`` on every rank, and return the results of all ranks.

    The environment is like that of ``torchrun``, so a Trainer starts no processes itself, and several fits can run one
    after the other. The process group uses a file store, so no port is needed.

    Args:
        ranks: Number of ranks.
        work: The function.
        *arguments: Its arguments.
        limit: Seconds after which ranks that have not ended are killed. A collective waits for a third of it.

    Raises:
        AssertionError: With the tracebacks, if a rank raised an error or did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        given = (ranks, folder, limit, work, arguments)
        processes = [context.Process(target=_be_rank, args=(rank, *given), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            _join(processes, limit)
        finally:
            _kill(processes)
        files = [Path(folder, f"{rank}.pt") for rank in range(ranks)]
        lost = {"error": "did not end, or was killed"}
        results = [torch.load(file, weights_only=False) if file.exists() else lost for file in files]
    errors = [f"--- rank {rank} ---\n{result['error']}" for rank, result in enumerate(results) if "error" in result]
    if errors:
        raise AssertionError("\n".join(errors))
    return [result["value"] for result in results]


def _be_rank(rank: int, ranks: int, folder: str, limit: float, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # looking for garbage among the objects of the parent process would copy their pages
    # Without OMP_NUM_THREADS Lightning gives a single rank all cores, and small operations then wait for threads.
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result: dict[str, Any] = {}
    try:
        store, wait = f"file://{folder}/store", timedelta(seconds=limit / 3)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=wait)
        result["value"] = work(*arguments)
    except BaseException:  # also report SystemExit and KeyboardInterrupt
        result = {"error": traceback.format_exc()}
    torch.save(result, f"{folder}/{rank}.pt")
    os._exit(0)  # skip the exit handlers of the test runner, which belong to the parent process


def _join(processes: list[Any], limit: float) -> None:
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))


def _kill(processes: list[Any]) -> None:
    """End ranks that hang, or that Ctrl-C left behind."""
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
