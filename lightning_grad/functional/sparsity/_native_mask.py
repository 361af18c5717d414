"""Masks on a CPU by the kernel in ``nm_mask.c``, if ``LIGHTNING_GRAD_NATIVE=1``; it passes over the weight once."""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIABLE = "LIGHTNING_GRAD_NATIVE"
_WAY_OUT = f"Set CC to a C compiler, or XDG_CACHE_HOME to a folder that allows execution, or unset {VARIABLE}."
_LARGEST_GROUP = 32  # the kernel compares all pairs; for larger groups, the network is as fast
_CPU_FLAGS = {"AVX2": ["-mavx2"], "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}
_kernels: dict[tuple[int, torch.dtype], Any] = {}  # None for the kernel that failed


def native_mask(grouped: Tensor, n: int) -> Tensor | None:
    """Return what ``chunked_mask`` does; ``None`` if the kernel is off, failed, or does not take the shape."""
    groups, m, positions = grouped.shape
    takes = positions == 1 and m <= _LARGEST_GROUP and grouped.is_contiguous()
    kernel = _kernel(m, grouped.dtype) if takes and os.environ.get(VARIABLE, "0") not in ("", "0") else None
    if kernel is None:
        return None
    mask = grouped.new_empty(grouped.shape)
    kernel(*(ctypes.c_void_p(each.data_ptr()) for each in (grouped, mask)), ctypes.c_longlong(groups), n)
    return mask


def _kernel(m: int, dtype: torch.dtype) -> Any:
    """Load a kernel once; after the first failure, warn on rank 0 and try no other."""
    if (m, dtype) not in _kernels and None not in _kernels.values():
        try:
            _kernels[m, dtype] = ctypes.CDLL(str(_compiled(m, dtype))).nm_mask
        except Exception as error:  # no compiler, no home, a folder that allows no writing or no execution ...
            _kernels[m, dtype] = None
            said = f"{VARIABLE} is set, but torch computes the masks: {error} {getattr(error, 'stderr', None) or ''}\n"
            ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
            if not ranks or torch.distributed.get_rank() == 0:
                warnings.warn(said + _WAY_OUT, stacklevel=2)
    return _kernels.get((m, dtype))


def _compiled(m: int, dtype: torch.dtype) -> Path:
    """Return the file of a kernel in the cache, compiled if necessary; several processes may do so at once."""
    source, real = Path(__file__).with_name("nm_mask.c"), "float" if dtype == torch.float32 else "double"
    flags = ["-O3", "-std=c99", "-shared", "-fPIC", *_CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]
    command = [*(os.environ.get("CC") or "cc").split(), *flags, f"-DM={m}", f"-DREAL={real}"]
    key = hashlib.sha256(repr((source.read_text(), command, platform.machine())).encode()).hexdigest()
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_grad", f"nm_mask-{key[:16]}.so")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            built = f"{scratch}/nm_mask.so"
            subprocess.run([*command, "-o", built, str(source)], check=True, capture_output=True, text=True, timeout=60)
            os.replace(built, file)
    return file
