"""Counters and diagnostics of a step: orthogonalizations, fallbacks, spectra, observed figures of moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial as bound
from typing import Any

import torch
from torch import Tensor

from optimizers import presets
from optimizers.fused_projections import Block
from optimizers.interfaces import Collectives, MatrixBatch, Update, compute_dtype
from optimizers.layouts.layout import StepUnit
from optimizers.moment_figures import Figures, Observation, Share, moment_share, singular_values
from optimizers.moment_sample import Sample, choose
from optimizers.rule import Rule
from optimizers.step_units import StepUnits


class StepStats:
    """Statistics of the last logical step, which may come in several calls: ZeRO calls once per flat tensor.

    Attributes:
        orthogonalizations: matrices that were orthogonalized in the last step.
        fallbacks: 0-dim int64 on the device: factorizations that needed a fallback, since `clear`.
        observing: True while figures of this step's moments are computed.
        sample: the matrices that observed steps look at; None: all of them, on every process.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, also what was counted since construction."""
        self.orthogonalizations = 0
        self.fallbacks: Tensor = torch.zeros((), dtype=torch.int64)
        self.observing = False
        self._is_to_observe = False
        self._around: Callable[[], AbstractContextManager[object]] = nullcontext
        self.sample: Sample | None = None
        self._begun: set[Any] = set()
        self.forget_step()

    def forget_step(self) -> None:
        """Forget the last step: the state is not what it left."""
        self._stepped: list[Tensor] = []
        self._spectra: dict[str, tuple[Tensor, int]] = {}  # name → spectra of its batch, and which of them
        self._observation = Observation()

    def begin(self, parts: set[Any]) -> None:
        """Begin a logical step, if this call steps a part of the last one again."""
        if self._begun and self._begun.isdisjoint(parts):
            self._begun |= parts
            return
        self._begun = parts
        self.orthogonalizations = 0
        self._stepped = []
        self.observing, self._is_to_observe = self._is_to_observe, False
        if self.observing:
            self._observation = Observation(self._around)

    def observe_next(
        self, on: bool, around: Callable[[], AbstractContextManager[object]], sample: Sample | None
    ) -> None:
        """Observe the moments of the next step, or not; each computation is enclosed by a context."""
        self._is_to_observe, self._around, self.sample = on, around, sample

    def record(self, rule: Rule, batch: MatrixBatch, update: Update, collectives: Collectives) -> None:
        """Record what an update carries besides its delta."""
        if update.factor is not None:
            self.orthogonalizations += len(batch.matrices) - len(batch.skipped)
        if update.fallbacks is not None:
            count = update.fallbacks
            if batch.masked is not None and batch.masked.ndim == 0:
                count = torch.where(batch.masked, 0, count)
            self.fallbacks = self.fallbacks.to(count.device) + count
        known = update.singular_values if rule.state_holds_spectrum(batch.options) else None
        for position, name in enumerate(batch.names):
            if known is not None and position not in batch.skipped:
                self._spectra[name] = known, position
            else:
                self._spectra.pop(name, None)
        if self.observing:
            kind = rule.observed(batch.shape, batch.options)
            moment = update.moment if update.moment is not None or kind is None else batch.state[kind]
            if moment is None:
                return
            share = moment_share(rule, batch.shape, batch.split, batch.options, collectives)
            if share is not None and update.moment is not None:
                share = share.of_shape(moment)
            self._look(batch.names, moment, update.factor, update.singular_values, share)

    def observe(self, names: Sequence[str], moments: Tensor, share: Share | None) -> None:
        """Look at moments (b, m, n) that no rule returned."""
        self._look(names, moments, None, None, share)

    def _look(
        self,
        names: Sequence[str],
        moment: Tensor,
        factor: Tensor | None,
        known: Tensor | None,
        share: Share | None,
    ) -> None:
        """Compute the figures of those matrices of a batch that are in the sample."""
        chosen = [i for i, name in enumerate(names) if self.sample is None or name in self.sample.mine]
        if not chosen:
            return
        if len(chosen) < len(names):
            names = [names[i] for i in chosen]
            moment = moment[chosen]
            factor = None if factor is None else factor[chosen]
            known = None if known is None else known[chosen]
        self._observation.add(names, moment, factor, known, share)

    def forget_spectra(self, names: Sequence[str]) -> None:
        """Drop the spectra that the last step computed of these matrices, which skipped it."""
        for name in names:
            self._spectra.pop(name, None)

    def stepped(self, parameters: Sequence[Tensor]) -> None:
        """Remember which parameters took a step."""
        self._stepped += parameters

    def retract(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take back the step counters of the parameters that took the last step."""
        for parameter in self._stepped:
            state[parameter]["step"] -= 1
        self.forget_step()

    def spectra(self, names: Sequence[str], compute: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Return name → singular values, those of the last step or else (b, k) of `compute`."""
        if not all(name in self._spectra for name in names):
            values = compute()
            self._spectra.update({name: (values, i) for i, name in enumerate(names)})
        known = {name: self._spectra[name] for name in names}
        return {name: values[i].detach().clone() for name, (values, i) in known.items()}

    @property
    def figures(self) -> dict[str, Figures]:
        """Return the moment figures of the last observed step."""
        return self._observation.figures

    def seconds(self) -> float:
        """Return the seconds that the figures cost. Waits for the device."""
        return self._observation.seconds()


def first_moments(units: StepUnits, unit: StepUnit) -> list[tuple[list[str], Tensor, Share | None]]:
    """Return names and first moments of the hidden matrices under AdamW, those of one shape stacked.

    Slices that break rows have no matrix to look at; they are left out. Moments that are stored in another dtype are
    copied to that of the arithmetic.
    """
    layout = units.layout
    kinds: dict[Any, list[tuple[Block, Tensor]]] = {}
    for parameter, route in units.routed(unit):
        for block in route.blocks:
            view = layout.local_view(parameter, block)
            moment = view.part(units.state[parameter]["moment"], block)
            if moment is not None:
                wide = moment.to(compute_dtype(parameter))
                kinds.setdefault((block.shape, view.split, view.shard_bounds), []).append((block, wide))
    return [
        (
            [block.name for block, _ in same],
            torch.stack([moment for _, moment in same]),
            None if split is None else Share(shape, split - 2, layout.collectives.all_reduce),
        )
        for (shape, split, _), same in kinds.items()
    ]


def moment_sample(units: StepUnits, preset_rule: str) -> Sample | None:
    """Return the matrices that an observed step looks at; None: all of them, on every process."""
    shapes, layout = moment_shapes(units, preset_rule), units.layout
    device = next((p.device.type for group in units.groups for p in group.parameters), "cpu")
    # Where state is divided, each process looks at its own, or all of them take part in each matrix.
    replicas = None if layout.is_divided else layout.replicas
    if replicas is None:
        return choose(shapes, device)
    return choose(shapes, device, replicas=replicas.size, replica=replicas.rank)


def moment_shapes(units: StepUnits, preset_rule: str) -> dict[str, tuple[int, int]]:
    """Return name → (m, n) of the moment of every matrix on the rule, also of those that other processes step."""
    shapes: dict[str, tuple[int, int]] = {}
    for group in units.groups:
        if group.rule == "adamw" and preset_rule != "adamw":
            continue
        for block in (block for route in group.started_routes for block in route.blocks):
            if group.rule == "adamw":
                shapes[block.name] = block.shape
                continue
            rule = presets.load_rule(group.rule)
            kind = rule.observed(block.shape, group.options)
            # A rule without such a state may return what it orthogonalized with its update.
            m, n = block.shape if kind is None else rule.state(block.shape, group.options)[kind][-2:]
            shapes[block.name] = m, n
    return shapes


def moment_spectra(units: StepUnits, stats: StepStats, preset_rule: str) -> dict[str, Tensor]:
    """Return name → singular values of the stored moment; see `Optimizer.moment_spectra`."""
    spectra: dict[str, Tensor] = {}
    for unit in units.all():
        group = units.group_of(unit)
        if group.rule == "adamw":
            # Next to a matrix rule AdamW has embeddings, norms and biases only.
            if preset_rule == "adamw":
                for names, moments, share in first_moments(units, unit):
                    spectra.update(zip(names, singular_values(moments, share).unbind(0)))
            continue
        rule = presets.load_rule(group.rule)
        for bucket in units.buckets(unit):
            for batch_state in bucket.batch_states:
                batch_state.bind(units.state)
                share = moment_share(
                    rule, batch_state.shape, batch_state.split, batch_state.options, bucket.collectives
                )
                kind = rule.observed(batch_state.shape, batch_state.options)
                if kind is not None:
                    compute = bound(singular_values, batch_state.stacked(kind), share)
                    spectra.update(stats.spectra([m.block.name for m in batch_state.matrices], compute))
    return spectra
