"""`optbench plan [key=value …] [--world-size N] [--json]`: what a run would hold and send, before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from harness.config import checks, compose
from harness.config.errors import InputError
from harness.config.schema import SCHEMA_VERSION, RunConfig


def main(argv: Sequence[str]) -> int:
    """Print the plan of the worst rank; exit code 0.

    Raises:
        InputError: bad input.
    """
    words, world_size, as_json = _words(argv)
    config = checks.check(compose.load(_overrides(words, world_size)), environ={})
    found = plan(config)
    if as_json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, **found}, indent=2))
    else:
        _show(config, found)
    return 0


def plan(config: RunConfig) -> dict[str, Any]:
    """`per_rank` {kind: bytes}, `traffic_per_step` {kind: bytes}, each the worst rank's, `flops_per_step`
    {kind: n}, and `fits`: None, because activations are not planned."""
    import torch

    from harness import model
    from harness.plan import rank as ranks
    from harness.plan.state import held_bytes
    from harness.plan.traffic import sent_bytes
    from harness.probes.flops import FlopCount

    assert config.world_size is not None
    held: dict[str, int] = {}
    sent: dict[str, float] = {}
    looked_at = ranks.ranks_to_look_at(config.world_size)
    try:
        for rank in looked_at:
            planned = ranks.simulate(config, rank)
            for kind, size in held_bytes(config, planned).items():
                held[kind] = max(held.get(kind, 0), size)
            for kind, size in sent_bytes(config, planned).items():
                sent[kind] = max(sent.get(kind, 0.0), size)
    except ValueError as error:
        raise InputError("optimizer.target", config.optimizer.target, str(error)) from error
    network = model.build(
        config.model,
        seed=0,
        precision=config.precision,
        device="meta",
        trust_remote_code=config.trust_remote_code,
    )
    flops = FlopCount.of(
        network, seq_len=config.seq_len, precision=config.precision, device=torch.device("cpu")
    )
    tokens = config.batch_size * config.seq_len
    return {
        "world_size": config.world_size,
        "engine": config.engine.name,
        "ranks_looked_at": list(looked_at),
        "per_rank": held,
        "traffic_per_step": {kind: round(size) for kind, size in sent.items()},
        "flops_per_step": {"forward_backward": flops.per_token * tokens},
        "fits": None,
    }


def _words(argv: Sequence[str]) -> tuple[list[str], int | None, bool]:
    words, world_size, rest = [], None, list(argv)
    as_json = "--json" in rest
    while rest:
        word = rest.pop(0)
        if word == "--json":
            continue
        name, equals, value = word.partition("=")
        if name != "--world-size":
            words.append(word)
            continue
        text = value if equals else (rest.pop(0) if rest else "")
        if not text.isdecimal() or int(text) < 1:
            raise InputError("--world-size", text, "is no number of processes", allowed="1, 2, 3, …")
        world_size = int(text)
    return words, world_size, as_json


def _overrides(words: Sequence[str], world_size: int | None) -> list[str]:
    if world_size is None:
        return list(words)
    given = {word.partition("=")[0] for word in words}
    overrides = [*words, f"world_size={world_size}"]
    if "batch_size" not in given:
        # One sequence a process, where the default batch is smaller than the cluster.
        default = RunConfig().batch_size
        overrides.append(f"batch_size={max(default, world_size) // world_size * world_size}")
    return overrides


def _show(config: RunConfig, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"{config.model.name}, {config.optimizer.name}, {config.engine.name} on {config.world_size}"
    table = Table(title=f"{title} process(es): the worst rank", title_justify="left")
    for column in ("what", "MiB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for kind, size in found["per_rank"].items():
        table.add_row(f"holds {kind}", f"{size / 2**20:,.2f}")
    table.add_section()
    for kind, size in found["traffic_per_step"].items():
        table.add_row(f"sends a step: {kind}", f"{size / 2**20:,.2f}")
    console.print(table)
    looked = found["ranks_looked_at"]
    if len(looked) < found["world_size"]:
        console.print(f"Looked at ranks {', '.join(map(str, looked))}.")
    console.print("Activations and the engine's buffers are not counted.")
