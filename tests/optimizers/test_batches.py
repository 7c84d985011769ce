"""Batching: few kernels however many layers, no wait for the device, bounded transients, compiled rule
functions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optimizers
from optimizers import Update, presets
from optimizers.fused_projections import Block
from optimizers.interfaces import MatrixRef
from optimizers.layouts import batches
from optimizers.layouts.batches import make_batch_states
from optimizers.layouts.layout import Unsharded, answer
from optimizers.layouts.shard_views import chunk, shard_view_of
from optimizers.linalg.requests import drive
from optimizers.presets import PRESETS, names, resolve
from optimizers.rules.parts.building_blocks import scale

pytestmark = pytest.mark.usefixtures("blind_host")  # these tests are of accelerators


class Recorder(TorchDispatchMode):
    """Counts the operators that reach the dispatcher and remembers the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value._base is None:
                self.largest = max(self.largest, value.numel() * value.element_size())
        return result


def net(layers: int) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (24, 16), (16, 24), (16,)] * layers
    return [(f"layers.{i}.w", nn.Parameter(torch.randn(s))) for i, s in enumerate(shapes)]


def recorded(preset: str, layers: int, steps: int = 2, **more: Any) -> Recorder:
    """The last of some steps; the one before was a refresh."""
    named = net(layers)
    known = resolve(preset)
    wanted: dict[str, Any] = {"rank": 4, "refresh_interval": 100, **more}
    optimizer: Any = optimizers.build(preset, named, **{k: v for k, v in wanted.items() if k in known})
    optimizer.found_inf = torch.zeros(())
    recorder = Recorder()
    for t in range(steps):
        for _, p in named:
            p.grad = torch.randn(p.shape)
        if t == steps - 1:
            with recorder:
                optimizer.step()
        else:
            optimizer.step()
    return recorder


@pytest.mark.parametrize("preset", ["sumo", "sumo_ns5", "muon", "muon_svd", "galore", "adamw"])
def test_the_number_of_kernels_does_not_grow_with_the_layers(preset: str) -> None:
    few, many = recorded(preset, 2), recorded(preset, 12)
    assert sum(few.calls.values()) == sum(many.calls.values())


@pytest.mark.parametrize("preset", ["sumo", "galore"])
def test_nor_in_a_refresh_step(preset: str) -> None:
    few, many = recorded(preset, 2, steps=1), recorded(preset, 12, steps=1)
    # The test matrices are drawn one by one, each from a generator of its own: four operators a matrix.
    grown = {op: many.calls[op] - few.calls[op] for op in many.calls if many.calls[op] != few.calls[op]}
    assert sum(grown.values()) <= 4 * 4 * 10


def test_control_a_loop_over_matrices_grows() -> None:
    def loop(layers: int) -> int:
        named = [(n, p) for n, p in net(layers) if p.ndim == 2]
        optimizer = torch.optim.Muon([p for _, p in named])
        for _, p in named:
            p.grad = torch.randn(p.shape)
        recorder = Recorder()
        with recorder:
            optimizer.step()
        return sum(recorder.calls.values())

    assert loop(12) > 5 * loop(2)


@pytest.mark.parametrize("preset", sorted(set(names())))
def test_the_host_never_asks_the_device_for_a_number(preset: str) -> None:
    """`.item()` and truth values are `_local_scalar_dense`; lists of indices would be `nonzero` or
    `index`."""
    seen = recorded(preset, 3).calls
    assert not [op for op in seen if "nonzero" in op or "_local_scalar_dense" in op]


@pytest.mark.parametrize("preset", ["sumo", "muon", "galore"])
def test_no_transient_is_larger_than_one_batch(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 3 * 24 * 16 * 4
    monkeypatch.setitem(batches.BATCH_BYTES, "cpu", limit)
    seen = recorded(preset, 12)
    # fp64 copies of a moment are twice as wide as the fp32 gradient.
    assert seen.largest <= 2 * limit


def test_stack_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        named = net(3)
        optimizer: Any = optimizers.build("sumo", named, rank=4, refresh_interval=2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for _, p in named:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return [p.detach() for _, p in named]

    together = run()
    monkeypatch.setitem(batches.BATCH_BYTES, "cpu", 1)
    for a, b in zip(together, run()):
        # Batched and single products may sum in another order: fp32 rounding over four steps.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_all_ranks_make_the_same_batches(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and experts lie whole on one rank and have no rows on the others, which take part all the same."""
    monkeypatch.setitem(batches.BATCH_BYTES, "cpu", 3 * 8 * 16 * 4)
    ranks, count = 3, 4

    def sizes(rank: int) -> list[int]:
        matrices = []
        for layer in range(5):
            for i in range(count):
                start, name = i * 8, f"{layer}.{i}"
                if stacked:
                    weight = torch.empty(count, 8, 16)
                    block, length = Block(name, (8, 16), name, expert=i), count
                else:
                    weight = torch.empty(count * 8, 16)
                    block, length = Block(name, (8, 16), name, dim=0, start=start, length=8), count * 8
                views = [shard_view_of(block, 0, chunk(length, ranks, q)) for q in range(ranks)]
                view = replace(views[rank], shard_bounds=tuple((v.start, v.shape[0]) for v in views))
                matrices.append(MatrixRef(weight, block, name, 0, view))
        return [len(state.matrices) for state in make_batch_states(matrices, {}, lambda _: {})]

    made = [sizes(rank) for rank in range(ranks)]
    assert made[0] == made[1] == made[2]
    assert sum(made[0]) == 5 * count
    # A whole matrix is 8 by 16: three fill a batch where one rank holds all of it, as of the first.
    assert made[0][0] == 3


def test_state_follows_the_parameters_to_another_dtype() -> None:
    layer = nn.Linear(16, 8, bias=False)
    optimizer: Any = optimizers.SUMO(layer.parameters(), rank=2)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    moment = optimizer.state[layer.weight]["moment"].clone()
    layer.to(torch.bfloat16)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[layer.weight]["moment"], 0.95 * moment)


def test_autocast_and_outer_grad_mode_do_not_reach_the_step() -> None:
    a, b = net(1), net(1)
    one: Any = optimizers.build("sumo", a, rank=4)
    two: Any = optimizers.build("sumo", b, rank=4)
    for (_, p), (_, q) in zip(a, b):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    one.step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        two.step()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(a, b))


@pytest.mark.parametrize("preset", ["sumo", "galore", "muon", "sumo_ns5"])
def test_a_rule_compiles_and_a_schedule_recompiles_nothing(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate never enters a rule. Traced by dynamo, run without a code generator.

    Dynamo does not trace `yield from`: a rule that requests sums is one graph per function that it calls.
    """
    rule = presets.load_rule(PRESETS[preset].rule)
    graphs: list[torch.fx.GraphModule] = []
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def alone(update: Any) -> Update:
        return update if isinstance(update, Update) else drive(update, lambda r: answer([r], Unsharded())[0])

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda batch: alone(rule.update(batch)),
        backend=backend,
        fullgraph=preset == "muon",
        dynamic=False,
    )

    class Compiled:
        def update(self, b: Any) -> Update:
            return compiled(b)

        def state_holds_spectrum(self, options: Any) -> bool:
            return True

    def run(lr: float) -> list[torch.Tensor]:
        named = [(n, p) for n, p in net(1) if p.shape == (16, 16)]
        known = resolve(preset)
        wanted: dict[str, Any] = {"rank": 4, "refresh_interval": 100}
        optimizer: Any = optimizers.build(
            preset, named, lr=lr, **{k: v for k, v in wanted.items() if k in known}
        )
        generator = torch.Generator().manual_seed(0)
        for t in range(4):
            for _, p in named:
                p.grad = torch.randn(p.shape, generator=generator)
            # The first step is a refresh, which stays outside: it draws from a generator.
            if use and t == 1:
                for unit in optimizer.units.all():
                    for bucket in optimizer.units.buckets(unit):
                        bucket.rule = Compiled()
            for group in optimizer.param_groups:
                group["lr"] = lr / (t + 1)
            optimizer.step()
            counts.append(len(graphs))
        return [p.detach() for _, p in named]

    use = False
    expected = run(0.1)
    use = True
    for a, b in zip(run(0.1), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # GaLore's bias corrections are numbers: traced once as constants, once as inputs.
    assert counts[-3] > 0
    assert counts[-1] == counts[-2] <= 2 * counts[-3]
    if preset == "muon":
        assert len(graphs) == 1


def test_scale_of_a_transposed_weight() -> None:
    assert scale("rows_cols", (32, 128), (128, 32), 4) == 2.0
    assert scale("rows_cols", (32, 128), (32, 128), 4) == 1.0
