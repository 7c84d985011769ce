"""Read an offline W&B file (run-….wandb) without wandb's own reader, which it no longer ships.

The file is a 7-byte header and a LevelDB log: blocks of 32,768 bytes, records of <crc:4 length:2 type:1>, type 1
whole, 2 first, 3 middle, 4 last; each whole record is a `wandb_internal_pb2.Record`.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

HEADER = 7
BLOCK = 32768
WITHIN_S = 30


def written(path: Path) -> list[Any]:
    """The protobuf records that are whole in the file now; one whose end is not yet written ends the list."""
    from wandb.proto import wandb_internal_pb2 as protocol

    data = path.read_bytes()
    if len(data) < HEADER:
        return []
    assert data[:4] == b":W&B"
    position, whole, found = HEADER, b"", []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 or position + 7 + length > len(data):
            break
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = protocol.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def records(path: Path) -> list[Any]:
    """The protobuf records of a run that has ended, its `exit` among them.

    wandb-core, a process of its own, writes the file, and on a busy machine is not done when the run is.
    """
    until = time.monotonic() + WITHIN_S
    while True:
        found = written(path)
        kinds = [record.WhichOneof("record_type") for record in found]
        if "exit" in kinds:
            return found
        assert time.monotonic() < until, f"no exit record in {path} within {WITHIN_S} s, only {kinds}"
        time.sleep(0.1)


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def config(path: Path) -> dict[str, Any]:
    """The run's configuration."""
    values: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            for item in record.run.config.update:
                values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return values


def run_record(path: Path) -> Any:
    """The record that names the run."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")
