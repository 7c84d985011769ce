"""List the files and functions of this project that one optimizer step enters, in the order of first entry.

    python -m benchmarks.step_walk [--preset sumo] [--ranks 1] [--refresh] [--json]

The list shows what a reader must open to follow one step under FSDP2: a profile hook records each function of
the project that `optimizer.step()` calls, on rank 0 of gloo processes. The step is an ordinary one; with
--refresh it refreshes every subspace.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import optimizers
from harness.verify.pool import RankPool

ROOT = Path(__file__).resolve().parents[1]


def walk(call: Callable[[], object]) -> dict[str, list[str]]:
    """Return file → functions of this project that `call` enters, both in the order of first entry."""
    entered: dict[str, dict[str, None]] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and ".venv" not in path.parts:
            functions = entered.setdefault(str(path.relative_to(ROOT)), {})
            # Comprehensions and lambdas are read with the function around them.
            if not frame.f_code.co_name.startswith("<"):
                functions[frame.f_code.co_qualname] = None

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {path: list(functions) for path, functions in entered.items()}


def _walk_of_a_step(preset: str, is_refresh: bool, ranks: int) -> dict[str, list[str]]:
    torch.manual_seed(0)
    # Hidden matrices only: what AdamW does for the rest of a model is another walk.
    model = nn.Sequential(nn.Linear(32, 24, bias=False), nn.Linear(24, 32, bias=False))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
    has_subspace = "rank" in optimizers.resolve(preset)
    options: dict[str, Any] = (
        {"rank": 4, "refresh_interval": 1 if is_refresh else 100} if has_subspace else {}
    )
    optimizer: Any = optimizers.build(preset, model.named_parameters(), modules=model, **options)
    entered: dict[str, list[str]] = {}
    for _ in range(3):  # the first step allocates and renews every subspace
        model(torch.randn(8, 32)).square().mean().backward()
        entered = walk(optimizer.step)
        optimizer.zero_grad()
    return entered


def measure(preset: str = "sumo", ranks: int = 1, is_refresh: bool = False) -> dict[str, list[str]]:
    """Return file → functions that one step of `preset` enters under FSDP2; one rank runs in this process."""
    if ranks == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            return _walk_of_a_step(preset, is_refresh, ranks)
        finally:
            dist.destroy_process_group()
    with TemporaryDirectory() as folder, closing(RankPool(ranks, Path(folder))) as pool:
        return pool.run("benchmarks.step_walk:_walk_of_a_step", preset, is_refresh, ranks)[0]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="sumo")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--refresh", action="store_true", help="a step that renews every subspace")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    entered = measure(arguments.preset, arguments.ranks, arguments.refresh)
    functions = sum(len(names) for names in entered.values())
    if arguments.json:
        document = {"schema_version": 1, "files": len(entered), "functions": functions, "entered": entered}
        print(json.dumps(document))
        return 0
    for path, names in entered.items():
        print(f"{path}: {', '.join(names)}")
    print(f"\n{len(entered)} files, {functions} functions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
