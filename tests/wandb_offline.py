"""Reading back what an offline W&B run has logged: the file is a LevelDB log, 32 KiB blocks, of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[bytes]:
    """Yield the records of an offline run: a log in blocks of 32 KiB, a record split into chunks at their ends."""
    data, position, whole = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        if not kind:
            return
        position += HEADER
        whole += data[position : position + size]
        position += size
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield whole
            whole = b""


def parsed(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run that is finished."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # the service that writes the file may lag behind the end of the run
    for raw in records(path):
        record = Record()
        record.ParseFromString(raw)
        yield record


def items(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a history row, a config or a summary."""
    for item in part:
        yield "/".join(item.nested_key) or item.key, json.loads(item.value_json)


def read_history(save_dir: Path) -> list[dict[str, Any]]:
    """Return the rows that the only run under a folder has logged."""
    (path,) = save_dir.glob("wandb/offline-run-*/run-*.wandb")
    return [dict(items(row.history.item)) for row in parsed(path) if row.HasField("history")]
