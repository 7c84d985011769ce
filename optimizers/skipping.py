"""Gradients that are not finite: which matrices sit out a step, without waiting for the device.

A NaN in a moment would stay there for good, and most rules turn it into an update of zero that nobody notices. So a
matrix (or a parameter under AdamW) whose gradient holds NaN or Inf skips the step: weights, state and step count stay
what they are, all other matrices move as usual.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SkipKey = tuple[int, str]
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
    units: frozenset[SkipKey] = frozenset()
    flags: Mapping[SkipKey, Tensor] = field(default_factory=dict)

    def positions(self, units: Sequence[SkipKey]) -> frozenset[int]:
        """Return the positions of the units that the host knows to be skipped."""
        if not self.units:
            return frozenset()
        return frozenset(i for i, unit in enumerate(units) if unit in self.units)

    def tensor(self, units: Sequence[SkipKey], device: torch.device) -> Tensor | None:
        """Return True where the step leaves no trace, 0-dim or (b,) for each unit; None if the host knows them all."""
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
    for (place, dtype), positions in kinds.items():
        flags = _nonfinite([gradients[i] for i in positions], place, dtype)  # type: ignore[misc]
        if len(positions) == len(gradients):
            return flags
        for i, flag in zip(positions, flags.to(device).unbind(0)):
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
    """Count what was skipped, and warn once.

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
        """Warn about skipped steps, the first time that there are some."""
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
    units: list[SkipKey]
    parameters: list[tuple[Tensor, list[SkipKey]]]
    flags: Tensor
    event: torch.Event | None
    together: bool

    def skipped(self) -> tuple[list[str], list[Tensor]]:
        """Return the names of units whose gradient is not finite, and the parameters of which nothing was stepped."""
        if self.event is not None:
            self.event.synchronize()
        flags = self.flags.tolist()
        if not any(flags):
            return [], []
        broken = {unit for unit, flag in zip(self.units, flags) if flag}
        names = [name for name, flag in zip(self.names, flags) if flag]
        return names, [p for p, units in self.parameters if self.together or broken.issuperset(units)]


def to_host(flags: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Start copying flags to the host; return where they will be, and the event after which they are."""
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


Candidate = tuple[SkipKey, str, Tensor | None]
"""What skips a step as one, a matrix or a whole parameter under AdamW: its key in a `StepMask`, its name, and the
elements of its gradient on this process (None where there are none). Plain tuples: every step makes one per matrix."""
Candidates = Mapping[Tensor, list[Candidate]]
"""Parameter → what may skip the step in it."""


class SkipTracker:
    """Build the mask of each step, and count later what it skipped.

    Attributes:
        log: names and counts of what skipped a step.
    """

    def __init__(self) -> None:
        self.log = SkipLog()
        self._pending: list[Pending] = []

    def mask(
        self,
        candidates: Candidates,
        found_inf: Tensor | None,
        agree: Callable[[Tensor], Tensor],
        *,
        host_waits: bool,
        together: bool,
    ) -> StepMask:
        """Return which candidates leave no trace in this step: those without a gradient or with one that is not finite.

        Args:
            candidates: of the parameters that are stepped.
            found_inf: torch's AMP flag; where it is set the gradients are not looked at.
            agree: combines (k,) bool flags over the processes that hold parts of the gradients.
            host_waits: the engine's own step waits for the device, so that the host may, too.
            together: one flag skips all candidates (AdamW's fused kernel takes one for all parameters of a call).
        """
        each = [candidate for same in candidates.values() for candidate in same]
        missing = frozenset(key for key, _, gradient in each if gradient is None)
        if found_inf is not None:
            # A mask costs passes over memory; where the host may look, only the steps that need it pay for it.
            is_clean = host_may_look(found_inf.device) and not bool(found_inf > 0)
            return StepMask(None if is_clean else found_inf, missing)
        flags = agree(nonfinite([gradient for *_, gradient in each]))
        if flags.device.type == "meta":
            # A plan has no numbers.
            return StepMask(None, missing)
        if host_may_look(flags.device) or host_waits:
            broken = {key: name for (key, name, _), flag in zip(each, flags.tolist()) if flag}
            self.log.notice(name for key, name in broken.items() if key not in missing)
            return StepMask(None, missing.union(broken))
        self._read_later(candidates, flags, together)
        if together:
            return StepMask(flags.any().float(), missing)
        return StepMask(None, missing, {key: flag for (key, *_), flag in zip(each, flags.unbind(0))})

    def drain_pending(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Yield what the device skipped since the last call: names, and the parameters of which nothing was stepped."""
        pending, self._pending = self._pending, []
        for entry in pending:
            names, parameters = entry.skipped()
            self.log.notice(names)
            yield names, parameters

    def forget_pending(self) -> None:
        """Drop flags that belong to a state which was replaced."""
        self._pending = []

    def _read_later(self, candidates: Candidates, flags: Tensor, together: bool) -> None:
        """Send flags to the host, which reads them in the next step: waiting now would stall the device."""
        present = {
            parameter: [key for key, _, gradient in same if gradient is not None]
            for parameter, same in candidates.items()
        }
        each = [candidate for same in candidates.values() for candidate in same]
        looked = [
            (key, name, flag)
            for (key, name, gradient), flag in zip(each, flags.unbind(0))
            if gradient is not None
        ]
        host_flags, event = to_host(torch.stack([flag for _, _, flag in looked]))
        self._pending.append(
            Pending(
                [name for _, name, _ in looked],
                [key for key, _, _ in looked],
                [(parameter, keys) for parameter, keys in present.items() if keys],
                host_flags,
                event,
                together,
            )
        )
