"""One table of all presets: what they are made of, keep, compute and send. Nothing is trained; the optimizers step.

    python -m benchmarks.optimizer_table [PRESET …] [--write]

State is read from the rules. Work is counted while an optimizer of meta tensors steps one decoder layer of LLaMA-60M
(four 512×512 and three 1376×512 matrices, rank 128; a preset that fixes its rank keeps it), traffic by its simulated
ranks of 8, in the mean over them. `--write` puts the table into docs/optimizers.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import optimizers
from harness.plan.op_counter import OpCounter
from optimizers.composition import composition
from optimizers.layouts.layout import Layout
from optimizers.layouts.simulated import SimulatedReplicas, SimulatedShards, simulated_slices
from optimizers.optimizer import Optimizer
from optimizers.presets import load_rule

PAGE = Path(__file__).resolve().parents[1] / "docs" / "optimizers.md"
BEGIN, END = "<!-- python -m benchmarks.optimizer_table --write -->", "<!-- end of the table -->"
SHAPES = ((512, 512),) * 4 + ((1376, 512),) * 2 + ((512, 1376),)
RANK, RANKS = 128, 4
ENGINES = ("ddp", "fsdp2", "zero1")
_LONG, _SHORT, _R = 1009, 503, 31
_SYMBOLS = {_LONG: "long", _SHORT: "short", _R: "r"}
HEADS = (
    "preset",
    "composition",
    "state of a matrix",
    "GFLOP a step",
    "a refresh",
    *(f"MB sent, {engine}" for engine in ENGINES),
    "source",
)


class Costs(NamedTuple):
    """What an ordinary step and a later refresh cost; equal where there is no refresh."""

    step: float
    refresh: float


def state(name: str) -> str:
    """Return the numbers that a preset keeps of one matrix, in terms of its long and short side and the rank."""
    if optimizers.PRESETS[name].rule == "adamw":
        return "2·long·short"
    options = {**optimizers.resolve(name)}
    if options.get("rank", 1) is None:
        options["rank"] = _R
    terms: dict[str, int] = {}
    for shape in load_rule(optimizers.PRESETS[name].rule).state((_LONG, _SHORT), options).values():
        term = "·".join(sorted((_SYMBOLS.get(side, str(side)) for side in shape), key=_order)) or "1"
        term = term.removeprefix("1·")
        terms[term] = terms.get(term, 0) + 1
    return " + ".join(
        term if count == 1 else str(count) if term == "1" else f"{count}·{term}"
        for term, count in terms.items()
    )


def _order(symbol: str) -> int:
    return ["r", "long", "short"].index(symbol) if symbol in ("r", "long", "short") else -1


def work(name: str) -> Costs:
    """Return the FLOPs of products and decompositions of one layer."""
    optimizer, _ = _built(name, None, 0)
    counts = []
    for _ in range(3):
        with OpCounter() as counted:
            optimizer.step()
        counts.append(sum(counted.flops.values()))
    # A step without a refresh, then the second refresh: the first one of a basis that is moved on is another.
    return Costs(counts[1], counts[2])


def traffic(name: str, engine: str) -> Costs:
    """Return the bytes that a rank sends for one layer, in the mean over the ranks."""
    totals = [0.0, 0.0]
    for rank in range(RANKS):
        optimizer, _ = _built(name, engine, rank)
        sent = [0.0]
        for _ in range(3):
            optimizer.step()
            sent.append(float(sum(optimizer.bytes_sent().values())))
        totals[0] += (sent[2] - sent[1]) / RANKS
        totals[1] += (sent[3] - sent[2]) / RANKS
    return Costs(*totals)


def _built(name: str, engine: str | None, rank: int) -> tuple[Optimizer, nn.ParameterList]:
    """Return an optimizer of meta tensors that refreshes in every second step, or as often as its preset says."""
    layer = nn.ParameterList([nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES])
    options: dict[str, Any] = {"lr": 1e-3}
    preset: Mapping[str, Any] = optimizers.resolve(name)
    if "rank" in preset and preset["rank"] is None:
        options["rank"] = RANK
    if preset.get("refresh_interval", 1) != 1:
        options |= {"refresh_interval": 2, "refresh_offset": 0}
    if "orthogonalizer_dtype" in preset:
        options["orthogonalizer_dtype"] = "float32"
    pairs = [(f"layers.0.{i}.weight", p) for i, p in enumerate(layer)]
    built = optimizers.build(name, pairs, layout="partitioned", **options)
    assert isinstance(built, Optimizer)
    built.attach(_layout(built, engine, rank))
    built.found_inf = torch.zeros((), device="meta")
    for p in layer:
        p.grad = torch.empty_like(p)
    return built, layer


def _layout(built: Optimizer, engine: str | None, rank: int) -> Layout:
    if engine == "fsdp2":
        return SimulatedShards({id(p): 0 for group in built.parameters_of_groups for p in group}, rank, RANKS)
    if engine == "zero1":
        layout = simulated_slices(built.parameters_of_groups, 1, rank, RANKS)
        for group, tensor in zip(built.param_groups, layout.tensors):
            group["params"] = [tensor]
        return layout
    return SimulatedReplicas("replicated", rank, RANKS if engine else 1)


def row(name: str) -> list[str]:
    """Return the cells of one preset."""
    flops = work(name)
    sent = [traffic(name, engine) for engine in ENGINES]
    has_refresh = "refresh_interval" in optimizers.PRESETS[name].options
    return [
        f"`{name}`",
        composition(name),
        state(name),
        _gigaflops(flops.step),
        _gigaflops(flops.refresh) if has_refresh else "–",
        *(_megabytes(costs) for costs in sent),
        optimizers.PRESETS[name].source,
    ]


def _gigaflops(count: float) -> str:
    """Return the count, or a dash: elementwise rules, and exact factors of whole matrices, which are one operator."""
    return f"{count / 1e9:.3g}" if count else "–"


def _megabytes(costs: Costs) -> str:
    step, refresh = (f"{value / 1e6:.3g}" for value in costs)
    return step if step == refresh else f"{step}; {refresh}"


def table(names: Sequence[str] | None = None) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield f"| {' | '.join(HEADS)} |"
    yield "|" + "---|" * len(HEADS)
    for name in names or optimizers.PRESETS:
        yield f"| {' | '.join(row(name))} |"


def written(page: Path = PAGE) -> dict[str, str]:
    """Return preset → line of the table on the page."""
    text = page.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def write(page: Path = PAGE) -> None:
    """Replace the table on the page."""
    text = page.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(before + BEGIN + "\n" + "\n".join(table()) + "\n" + after, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("presets", nargs="*", choices=[*optimizers.PRESETS, []], metavar="PRESET")
    parser.add_argument(
        "--write", action="store_true", help="put the table of all presets into docs/optimizers.md"
    )
    arguments = parser.parse_args(argv)
    if arguments.write:
        write()
    else:
        print("\n".join(table(arguments.presets)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
