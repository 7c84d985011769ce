"""A small network that an optbench optimizer trains in this process, with and without rounding differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import optimizers
from harness.verify.diverge.trajectory import Trajectory, sketch

STEPS, SAMPLES = 12, 64
Change = Callable[[int, dict[str, nn.Parameter]], None]


def train(
    rule: str,
    seed: int | None = None,
    *,
    moves_weights: bool = False,
    steps: int = STEPS,
    change: Change | None = None,
    is_fused: bool = False,
    **options: Any,
) -> Trajectory:
    """Train on a fixed stream of samples.

    Args:
        rule: preset.
        seed: of the order in which the samples of each step are summed, in 1, 2 or 4 parts; None: as they come.
        moves_weights: move each initial weight by one ulp.
        steps: number of steps.
        change: what is done to the gradients before each step.
        is_fused: the optimizer takes both halves of the first layer for one matrix, as a fused QKV stores them.
        options: of the optimizer.
    """
    stream = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(seed or 0)
    named = {
        "first": nn.Parameter(torch.randn(32, 24, generator=stream) * 0.2),
        "second": nn.Parameter(torch.randn(16, 32, generator=stream) * 0.2),
        "bias": nn.Parameter(torch.zeros(16)),
    }
    target = torch.randn(24, 16, generator=stream)
    if moves_weights:
        with torch.no_grad():
            for p in named.values():
                up = torch.randint(0, 2, p.shape, generator=noise, dtype=torch.bool)
                p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf)))
    if not is_fused:
        upper, lower = (nn.Parameter(half.detach().clone()) for half in named.pop("first").split(16))
        named = {"first.upper": upper, "first.lower": lower, **named}
    optimizer = optimizers.build(rule, list(named.items()), **{"lr": 0.02, **options})
    done = Trajectory()
    done.sketches[0] = _sketches(named)
    for step in range(steps):
        x = torch.randn(SAMPLES, 24, generator=stream)
        y = torch.sin(x @ target)
        parts = [slice(None)]
        if seed is not None:
            order = torch.randperm(SAMPLES, generator=noise)
            x, y = x[order], y[order]
            size = SAMPLES >> int(torch.randint(0, 3, (), generator=noise))
            parts = [slice(start, start + size) for start in range(0, SAMPLES, size)]
        optimizer.zero_grad()
        loss = torch.zeros(())
        for part in parts:
            share = _loss(named, x[part], y[part])
            share.backward()
            loss += share.detach()
        if change is not None:
            change(step, named)
        grads = [p.grad for p in named.values() if p.grad is not None]
        done.losses[step + 1] = float(loss)
        done.gradient_norms[step + 1] = float(torch.stack([g.norm() for g in grads]).norm())
        optimizer.step()
        done.sketches[step + 1] = _sketches(named)
    return done


def _sketches(named: dict[str, nn.Parameter]) -> dict[str, np.ndarray]:
    """Sketches of the halves of the first layer, however it is stored, and of the other parameters."""
    upper, lower = _first(named).split(16)
    halves = {"first.upper": upper, "first.lower": lower}
    return {
        name: sketch(name, p)
        for name, p in {**halves, "second": named["second"], "bias": named["bias"]}.items()
    }


def _first(named: dict[str, nn.Parameter]) -> Tensor:
    return named["first"] if "first" in named else torch.cat([named["first.upper"], named["first.lower"]])


def _loss(named: dict[str, nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(x @ _first(named).T)
    return (hidden @ named["second"].T + named["bias"] - y).square().sum() / (SAMPLES * 16)
