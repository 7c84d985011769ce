"""The victim: a small homogeneous ReLU network, trained far past separation by the harness's own optimizers.

Full batch, float64, loss log Σ exp(−margin), whose gradient never underflows. Plain gradient descent takes steps
lr/max(1, ‖θ‖²), the others lr·k^-1/2: growing weights make a fixed step ever smaller in function space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import optimizers
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import Network, combination, forward, output_descent
from harness.errors import InputError

GD = "gd"
EPS = 1e-12
"""Of Adam on a loss whose gradient is normalized: 1e-8 would take over as the gradient of one image fades."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # Chosen for separating digits in a few thousand steps; nothing else was tuned. Decay is 0 because it changes
    # the limit: a bound on the norm in place of the largest margin.
    "adamw": {"lr": 1e-2, "weight_decay": 0.0, "eps": EPS},
    "muon": {"lr": 2e-2, "aux_lr": 2e-3, "aux_eps": EPS},
    "sumo": {"lr": 2e-2, "aux_lr": 2e-3, "aux_eps": EPS, "rank": 8, "side": "long", "update_scale": "none"},
    "galore": {"lr": 2e-3, "aux_lr": 2e-3, "eps": EPS, "aux_eps": EPS, "rank": 8, "alpha": 1.0},
}


@dataclass(frozen=True)
class Architecture:
    """Widths of the hidden layers, whether layer 1 has a bias, the number of outputs, and the initial scale."""

    inputs: int
    widths: tuple[int, ...]
    outputs: int
    bias: bool
    init_scale: float


@dataclass(frozen=True)
class VictimCheckpoint:
    """Weights after `step` steps (0: initial)."""

    step: int
    network: Network


def initial(shape: Architecture, seed: int) -> Network:
    """Draw layer 1 (and its bias) from N(0, init_scale²), later layers from U(±1/√fan_in), as in Haim et al. 2022."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * shape.init_scale

    weights = [normal(shape.widths[0], shape.inputs)]
    sizes = [*shape.widths, shape.outputs]
    for rows, columns in zip(sizes[1:], sizes[:-1]):
        uniform = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        weights.append((2 * uniform - 1) / columns**0.5)
    return Network(tuple(weights), normal(shape.widths[0]) if shape.bias else None)


def resolve_options(optimizer: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's options: the preset's, then this module's defaults for its rule, then the overrides.

    Raises:
        OptionError: an unknown optimizer or option, or a bad value.
    """
    if optimizer == GD:
        lr = overrides.get("lr", 0.2)
        unknown = set(overrides) - {"lr", "weight_decay"}
        if unknown:
            raise optimizers.OptionError(
                min(unknown), overrides[min(unknown)], "is not an option of gd", ("lr", "weight_decay")
            )
        return {"lr": float(lr), "weight_decay": float(overrides.get("weight_decay", 0.0))}
    preset = optimizers.resolve(optimizer)
    rule = optimizers.PRESETS[optimizer].rule if optimizer in optimizers.PRESETS else optimizer
    values = {k: v for k, v in DEFAULTS.get(rule, {}).items() if k in preset}
    if "aux_weight_decay" in preset:
        values |= {"aux_weight_decay": 0.0, "weight_decay": 0.0}
    return optimizers.resolve(optimizer, {**values, **overrides})


def parameter_names(network: Network) -> list[str]:
    """Return names of `Network.parameters`, which tell the optimizers the hidden matrices from the head."""
    hidden = [f"hidden.{i}.weight" for i in range(network.depth - 1)]
    return [*hidden, "head.weight", *(["hidden.0.bias"] if network.bias is not None else [])]


def train(
    optimizer: str,
    settings: Mapping[str, Any],
    start: Network,
    x: Tensor,
    labels: Tensor,
    task: str,
    checkpoints: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[VictimCheckpoint]:
    """Train and yield checkpoints in order.

    Args:
        optimizer: "gd" or a preset of `optimizers`.
        settings: resolved options (`resolve_options`).
        start: initial weights; not changed.
        x: (n, d). labels: (n,).
        checkpoints: steps at which to keep the weights; the last one ends the training.
        progress: called with (step, steps) about twenty times.

    Raises:
        InputError: weights became non-finite.
    """
    parameters = [p.clone().requires_grad_(False) for p in start.parameters]
    network = Network(
        tuple(parameters[: start.depth]), parameters[start.depth] if start.bias is not None else None
    )
    advance = _gd(network, settings) if optimizer == GD else _built(optimizer, settings, network)
    last = max(checkpoints)
    every = max(1, last // 20)
    due = set(checkpoints)
    for step in range(1, last + 1):
        with torch.no_grad():
            passed = forward(network, x)
            descent = combination(network, passed, output_descent(task, passed.outputs, labels))
            advance(step, descent)
        if step in due:
            if not all(bool(torch.isfinite(p).all()) for p in parameters):
                raise InputError(
                    "lr", settings["lr"], f"made {optimizer} diverge by step {step}", fix="a smaller lr"
                )
            yield VictimCheckpoint(step, network.copied())
        if progress and step % every == 0:
            progress(step, last)


def step_geometry(optimizer: str, settings: Mapping[str, Any], network: Network) -> Geometry:
    """Return the norm in which one step of this optimizer is a ball.

    Gradient descent: ℓ2. AdamW: ℓ∞. Muon, SUMO, GaLore-Muon: the spectral norm of hidden matrices over the
    spectral size of an update, the ℓ∞ norm of head and bias over AdamW's. GaLore: no such norm is proved; its
    updates are Adam's in a subspace, and ℓ∞ takes its place.
    """
    if optimizer == GD:
        return Geometry("l2")
    rule = optimizers.PRESETS[optimizer].rule if optimizer in optimizers.PRESETS else optimizer
    if rule not in ("muon", "sumo"):
        return Geometry("linf")
    aux = settings["aux_lr"] if settings["aux_lr"] is not None else settings["lr"]
    scales = [
        settings["lr"] * settings["alpha"] * _update_scale(settings, p.shape)
        if i < network.depth - 1
        else aux
        for i, p in enumerate(network.parameters)
    ]
    return Geometry("hybrid", tuple(scales))


def _update_scale(settings: Mapping[str, Any], shape: Sequence[int]) -> float:
    m, n = shape
    rank = settings.get("rank") or min(m, n)
    sizes = {"none": 1.0, "rms_max": 0.2 * max(m, n) ** 0.5, "rows_cols": max(1.0, m / n) ** 0.5}
    return sizes.get(settings["update_scale"], 0.2 * (m * n / rank) ** 0.5)


def _gd(network: Network, settings: Mapping[str, Any]) -> Callable[[int, Sequence[Tensor]], None]:
    def advance(step: int, descent: Sequence[Tensor]) -> None:
        rate = settings["lr"] / max(1.0, network.squared_norm)
        for parameter, direction in zip(network.parameters, descent):
            parameter.mul_(1 - rate * settings["weight_decay"]).add_(direction, alpha=rate)

    return advance


def _built(
    optimizer: str, settings: Mapping[str, Any], network: Network
) -> Callable[[int, Sequence[Tensor]], None]:
    for parameter in network.parameters:
        parameter.requires_grad_(True)
    named = list(zip(parameter_names(network), network.parameters))
    built = optimizers.build(optimizer, named, **settings)
    peaks = [group["lr"] for group in built.param_groups]

    def advance(step: int, descent: Sequence[Tensor]) -> None:
        for parameter, direction in zip(network.parameters, descent):
            parameter.grad = -direction
        for group, peak in zip(built.param_groups, peaks):
            group["lr"] = peak / step**0.5
        built.step()

    return advance
