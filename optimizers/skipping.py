"""Gradients that are not finite: which matrices sit out a step, without waiting for the device.

A NaN in a moment would stay there for good, and most rules turn it into an update of zero that nobody notices. So a
matrix (or a parameter under AdamW) whose gradient holds NaN or Inf skips the step: weights, state and step count stay
what they are, all other matrices move as usual.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Unit = tuple[int, str]
"""(id of a parameter, prefix of the matrix in it): what skips a step as one."""


@dataclass(frozen=True)
class StepMask:
    """What must leave no trace in this step.

    Attributes:
        everything: `found_inf` of the optimizer: above 0, nothing does. None: the gradients are checked one by one.
        units: what the host knows to be skipped: gradients that are missing, or not finite where it may look.
        flags: unit → 0-dim bool on the device, where the host must not look.
    """

    everything: Tensor | None = None
    units: frozenset[Unit] = frozenset()
    flags: Mapping[Unit, Tensor] = field(default_factory=dict)

    def positions(self, units: Sequence[Unit]) -> frozenset[int]:
        """Which of these units the host knows to be skipped."""
        if not self.units:
            return frozenset()
        return frozenset(i for i, unit in enumerate(units) if unit in self.units)

    def tensor(self, units: Sequence[Unit], device: torch.device) -> Tensor | None:
        """True where the step leaves no trace: 0-dim for all units, (b,) for each; None: the host knows all."""
        if self.everything is not None:
            return self.everything.to(device).reshape(()) > 0
        if not self.flags:
            return None
        return torch.stack([self.flags[unit] for unit in units]).to(device)


def host_may_look(device: torch.device) -> bool:
    """Return True where reading a number costs no wait for a device."""
    return device.type == "cpu"


def nonfinite(gradients: Sequence[Tensor | None]) -> Tensor:
    """Find the gradients that hold NaN or Inf, in one read of each.

    Args:
        gradients: any shapes and dtypes; None where there is none, which counts as not finite. One is a tensor.

    Returns:
        (k,) bool, on the device of the first tensor.
    """
    device = next(g.device for g in gradients if g is not None)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, gradient in enumerate(gradients):
        if gradient is not None and gradient.numel():
            kinds.setdefault((gradient.device, gradient.dtype), []).append(i)
    parts: list[Tensor | None] = [None] * len(gradients)
    for (place, dtype), chosen in kinds.items():
        found = _nonfinite([gradients[i] for i in chosen], place, dtype)  # type: ignore[misc]
        if len(chosen) == len(gradients):
            return found
        for i, flag in zip(chosen, found.to(device).unbind(0)):
            parts[i] = flag
    missing = torch.tensor([gradient is None for gradient in gradients])
    empty = missing.to(device, non_blocking=True).unbind(0)
    return torch.stack([empty[i] if part is None else part for i, part in enumerate(parts)])


def _nonfinite(gradients: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    # The maximum norm needs no second look, but on CPUs torch's takes 13 times as long as the Euclidean one.
    fast = host_may_look(device)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
    norms = torch._foreach_norm(gradients, 2.0 if fast else float("inf"), dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
    flags = ~torch.isfinite(torch.stack(list(norms)))
    if fast and bool(flags.any()):
        # The square of a large finite number overflows, too.
        for i in flags.nonzero().flatten().tolist():
            flags[i] = not bool(torch.isfinite(gradients[i]).all())
    return flags


class SkipLog:
    """Counts what was skipped, and warns once.

    Attributes:
        counts: name of a matrix or parameter → steps that it skipped.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._has_warned = False

    def notice(self, names: Iterable[str]) -> None:
        """Count one skipped step of each."""
        self.counts.update(names)

    def warn(self) -> None:
        """Warn of what was noticed, the first time that there is something."""
        if self._has_warned or not self.counts:
            return
        self._has_warned = True
        first, *others = self.counts
        more = f" and {len(others)} more" if others else ""
        warnings.warn(
            f"{first}{more}: the gradient is not finite. What has such a gradient skips the step: its weights and its "
            "optimizer state stay as they are. Further cases are only counted, in optimizer.skipped_steps",
            RuntimeWarning,
            stacklevel=5,
        )


@dataclass(frozen=True)
class Pending:
    """Flags on their way from the device to the host; read one step later.

    Attributes:
        names: of the units.
        units: of the flags.
        parameters: that took the step as far as the host knew, with the units of each.
        flags: (k,) bool in host memory.
        event: after which they are there.
        together: one flag skips all of them.
    """

    names: list[str]
    units: list[Unit]
    parameters: list[tuple[Tensor, list[Unit]]]
    flags: Tensor
    event: torch.Event | None
    together: bool

    def skipped(self) -> tuple[list[str], list[Tensor]]:
        """Names of the units whose gradients were not finite, and the parameters of which nothing was stepped."""
        if self.event is not None:
            self.event.synchronize()
        flags = self.flags.tolist()
        if not any(flags):
            return [], []
        broken = {unit for unit, flag in zip(self.units, flags) if flag}
        names = [name for name, flag in zip(self.names, flags) if flag]
        return names, [p for p, units in self.parameters if self.together or broken.issuperset(units)]


def to_host(flags: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Start copying flags to the host: where they will be, and the event after which they are."""
    if flags.device.type != "cuda":
        return flags.clone(), None
    host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.Event(flags.device)
    event.record()
    return host, event


def refuse_sparse(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse gradients that are no dense tensors.

    Raises:
        RuntimeError: naming the parameter and what to do.
    """
    for name, gradient in named:
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"{name}: its gradient is sparse, and these optimizers take dense ones: build the layer with "
                "sparse=False, or step this parameter with torch.optim.SparseAdam"
            )
