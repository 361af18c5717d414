"""Reading back what an offline W&B run has logged: the file is a LevelDB log, 32 KiB blocks, of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 2**15
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        if kind == 0:
            return
        piece = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        parts = piece if kind in (_WHOLE, _FIRST) else parts + piece
        if kind in (_WHOLE, _LAST):
            yield parts


def read_history(save_dir: Path) -> list[dict[str, Any]]:
    """Return the rows that the only run under a folder has logged."""
    from wandb.proto import wandb_internal_pb2

    (path,) = save_dir.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for raw in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
