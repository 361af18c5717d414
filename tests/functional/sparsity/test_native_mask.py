"""The kernel in C, bit for bit against torch, and what replaces it where it cannot be compiled."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from lightning_grad.functional import nm_mask
from lightning_grad.functional.sparsity import _chunked_mask, _native_mask
from tests.functional.sparsity.test_joined_masks import whole
from tests.functional.sparsity.test_nm_sparsity import draw


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(_native_mask.VARIABLE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_native_mask, "_kernels", {})
    return tmp_path / "lightning_grad"


@pytest.mark.skipif(not shutil.which((os.environ.get("CC") or "cc").split()[0]), reason="needs a C compiler")
def test_the_kernel_runs_and_changes_no_bit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for weight, m in ((draw((6, 40, 3)), 4), (draw((8, 80))[:, ::2], 4), (draw((2, 64)), 64)):  # left to torch
        assert torch.equal(nm_mask(weight, 2, m), whole(weight, 2, m))
    assert not cache.exists()
    monkeypatch.delattr(_chunked_mask, "_select")  # from here on, torch's way would raise
    some = random.Random(0)
    for m, dtype in [(m, dtype) for m in (2, 4, 7, 16) for dtype in (torch.float32, torch.float64)]:
        for kind in ("normal", "ties", "special") * 3:
            weight, n = draw((some.randrange(400), some.randint(1, 3) * m), dtype, kind), some.randrange(1, m)
            mask, expected = nm_mask(weight, n, m), whole(weight, n, m)
            assert torch.equal(mask, expected)
            assert (mask.dtype, mask.stride()) == (expected.dtype, expected.stride())
    assert [file.suffix for file in cache.iterdir()] == [".so"] * 8
    _native_mask._kernels.clear()
    monkeypatch.delattr("subprocess.run")  # the next process finds the files
    assert torch.equal(nm_mask(weight, 1, 16), whole(weight, 1, 16))


@pytest.mark.parametrize("setting", ["CC=/bin/false", "CC=no-cc", "XDG_CACHE_HOME=/dev/null"])
def test_a_kernel_that_fails_is_named_once(cache: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(*setting.split("="))
    with pytest.warns(UserWarning, match=rf"computes the masks: .*{setting.split('=')[1]}(.|\n)*Set CC to a C"):
        mask = nm_mask(weight := draw((9, 8)), 1, 4)
    assert torch.equal(mask, whole(weight, 1, 4))
    assert torch.equal(nm_mask(weight, 1, 8), whole(weight, 1, 8))  # a second warning would be an error
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    _native_mask._kernels.clear()
    nm_mask(weight, 1, 4)  # other ranks do not warn
