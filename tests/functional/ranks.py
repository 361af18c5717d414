"""Two gloo ranks on one machine, for functions that take DTensors."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which DTensor would import, here once and not in each rank
import torch.distributed as dist
import torch.distributed.tensor
import torch.multiprocessing as mp

LIMIT = 60.0


def _work(rank: int, check: Callable[[int, Any], None], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    method = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", method, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT))
    try:
        check(rank, dist.init_device_mesh("cpu", (2,)))
        dist.barrier()
    except BaseException:
        Path(folder, f"error-of-rank-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def on_two_ranks(check: Callable[[int, Any], None], folder: Path) -> None:
    """Run ``check(rank, mesh)`` on two forked ranks; an error on either is raised here, and no process stays."""
    context = mp.start_processes(_work, (check, str(folder)), nprocs=2, join=False, start_method="fork")
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < deadline, "the ranks did not finish"
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        # Which rank is noticed first is chance: the other may only have lost its peer.
        raise AssertionError("\n".join(path.read_text() for path in folder.glob("error-of-rank-*"))) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
