"""Put the defects of `controls.LOOP_DEFECTS` into a run: what a training loop does wrong around a right optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from harness.verify.audit.engines import AuditedRun


def _micro_batch_momentum(run: AuditedRun) -> None:
    backward = run.backward

    def stepped(gradients: Mapping[str, Tensor], *, is_last: bool) -> None:
        backward(gradients, is_last=is_last)
        if not is_last:
            rates = [group["lr"] for group in run.optimizer.param_groups]
            for group in run.optimizer.param_groups:
                group["lr"] = 0.0
            run.optimizer.step()
            for group, rate in zip(run.optimizer.param_groups, rates):
                group["lr"] = rate

    _replace(run, "backward", stepped)


def _clipping_forgotten(run: AuditedRun) -> None:
    _replace(run, "clip", lambda: None)


def _gradients_halved(run: AuditedRun) -> None:
    backward = run.backward

    def halved(gradients: Mapping[str, Tensor], *, is_last: bool) -> None:
        backward({name: gradient / 2 for name, gradient in gradients.items()}, is_last=is_last)

    _replace(run, "backward", halved)


def _replace(run: AuditedRun, name: str, function: Callable[..., Any]) -> None:
    setattr(run, name, function)


CHANGES: Mapping[str, Callable[[AuditedRun], None]] = {
    "micro-batch momentum": _micro_batch_momentum,
    "clipping forgotten": _clipping_forgotten,
    "gradients halved": _gradients_halved,
}
"""Defect → function that puts it into a run before its first step."""
