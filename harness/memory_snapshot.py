"""What filled a GPU: a snapshot of torch's allocator where memory runs out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MAX_ENTRIES = 100_000
"""Last allocations and frees whose Python stacks are kept; each takes some kilobytes of host memory."""


@contextmanager
def snapshot_when_out(folder: Path, rank: int, *, enabled: bool) -> Iterator[None]:
    """Record allocations; where CUDA memory runs out, write ``<folder>/memory/rank<k>.pickle`` and pass the error on.

    The file is for the viewer at pytorch.org/memory_viz. A stack costs about 2 µs per allocation (torch's own figure).

    Args:
        folder: the run folder.
        rank: of this process.
        enabled: False: do nothing.
    """
    if not enabled:
        yield
        return
    # Not C++ frames, which cost milliseconds each when they are written.
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError:
        path = folder / "memory" / f"rank{rank}.pickle"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except (OSError, RuntimeError, MemoryError) as error:
            # The error that matters is the one that is passed on.
            print(f"warning: no memory snapshot ({error})", file=sys.stderr, flush=True)
        else:
            print(f"memory snapshot: {path}", file=sys.stderr, flush=True)
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
