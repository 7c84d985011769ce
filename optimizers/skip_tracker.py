"""Gradients that are not finite, from the optimizer's side: the mask of a step, and what the host learns late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers import skipping
from optimizers.layouts.layout import Layout, StepUnit
from optimizers.skipping import Pending, SkipLog, StepMask, Unit


class Candidate(NamedTuple):
    """What skips a step as one: a matrix, or a whole parameter under AdamW.

    Attributes:
        key: what a `StepMask` calls it.
        name: for people.
        gradient: its elements on this process, in any shape; None where there are none.
    """

    key: Unit
    name: str
    gradient: Tensor | None


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
        unit: StepUnit,
        candidates: Candidates,
        found_inf: Tensor | None,
        layout: Layout,
        *,
        host_waits: bool,
        together: bool,
    ) -> StepMask:
        """Return which candidates leave no trace in this step: those without a gradient or with one that is not finite.

        Args:
            unit: that is stepped.
            candidates: of its parameters.
            found_inf: torch's AMP flag; where it is set the gradients are not looked at.
            layout: for the agreement of all processes that hold a part of a gradient.
            host_waits: the engine's own step waits for the device, so that the host may, too.
            together: one flag skips all candidates (AdamW's fused kernel takes one for all parameters of a call).
        """
        each = [candidate for same in candidates.values() for candidate in same]
        missing = frozenset(key for key, _, gradient in each if gradient is None)
        if found_inf is not None:
            return StepMask(found_inf, missing)
        flags = layout.agree(unit, skipping.nonfinite([gradient for *_, gradient in each]))
        if flags.device.type == "meta":
            return StepMask(None, missing)
        if skipping.host_may_look(flags.device) or host_waits:
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
            parameter: [candidate.key for candidate in same if candidate.gradient is not None]
            for parameter, same in candidates.items()
        }
        each = [candidate for same in candidates.values() for candidate in same]
        looked = [(c, flag) for c, flag in zip(each, flags.unbind(0)) if c.gradient is not None]
        host_flags, event = skipping.to_host(torch.stack([flag for _, flag in looked]))
        self._pending.append(
            Pending(
                [candidate.name for candidate, _ in looked],
                [candidate.key for candidate, _ in looked],
                [(parameter, keys) for parameter, keys in present.items() if keys],
                host_flags,
                event,
                together,
            )
        )
