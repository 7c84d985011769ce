"""Parameters of an optimizer, the units in which a step updates them, and the buckets of each unit's matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizers import presets
from optimizers.hooks import StepHook, UnitParts
from optimizers.interfaces import MatrixRef, parameter_shape
from optimizers.layouts.apply import ApplyConfig
from optimizers.layouts.layout import (
    Bucket,
    Layout,
    StepUnit,
)
from optimizers.presets import rank_limit_check
from optimizers.qk_clip import HeadLogits, QueryKeyClip
from optimizers.refresh_schedule import refresh_offsets
from optimizers.rounding import Rounding
from optimizers.routing import Route
from optimizers.rules.parts import adamw_kernels
from optimizers.skipping import Candidate, Candidates
from optimizers.stored_moments import TensorPart
from optimizers.weight_average import WeightAverage
from optimizers.weight_norms import WeightNorms


@dataclass
class RuleGroup:
    """A param group whose parameters follow one rule: the dict that torch sees, and what it does not know.

    Attributes:
        options: entry of ``param_groups``, with "rule" and the options of that rule.
        parameters: as they were given. DeepSpeed puts flat tensors into ``options["params"]``.
        routes: of the parameters, in the same order.
        frozen: positions of parameters that were frozen at construction and have not started since.
        late: positions of those that started since, one list for each step in which some did.
    """

    options: dict[str, Any]
    parameters: list[Tensor]
    routes: list[Route]
    frozen: set[int] = field(default_factory=set)
    late: list[list[int]] = field(default_factory=list)

    @property
    def rule(self) -> str:
        """Return the name of the group's rule."""
        return self.options["rule"]

    @property
    def started_routes(self) -> list[Route]:
        """Routes of the parameters that are stepped."""
        return [route for position, route in enumerate(self.routes) if position not in self.frozen]


class StepUnits:
    """Map each step to units of parameters, and each unit to its matrices and buckets.

    Args:
        layout: how the parameters are distributed over the processes.

    Attributes:
        state: the optimizer's, parameter → key → value; the optimizer sets it whenever torch replaces it.
        groups: one for each param group, in order.
        qk_clip: the hook that takes the attention logits of a step.
        hooks: what acts on weights around their rule, in this order.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.qk_clip = QueryKeyClip()
        self.hooks: list[StepHook] = [self.qk_clip, WeightNorms(), WeightAverage()]
        self.state: Mapping[Tensor, dict[str, Any]] = {}
        self.groups: list[RuleGroup] = []
        self._names: dict[int, str] = {}
        self._buckets: dict[Any, list[Bucket]] = {}
        self._matrices: dict[Any, list[MatrixRef]] = {}

    def add(self, group: RuleGroup) -> None:
        """Append a group; `allocate` gives it state."""
        self.groups.append(group)
        self._names.update({id(p): route.name for p, route in zip(group.parameters, group.routes)})

    def attach(self, layout: Layout) -> None:
        """Step the parameters as another layout distributes them, and allocate the state."""
        self.layout = layout
        self.rebuild()

    def rebuild(self) -> None:
        """Build buckets anew after state or options were replaced, and allocate what is missing."""
        self._buckets = {}
        # Their refresh offsets follow from options, which a state dict may have replaced.
        self._matrices = {}
        for index in range(len(self.groups)):
            self.allocate(index)

    def name_of(self, parameter: Tensor) -> str:
        """Return the name that a parameter was given with."""
        return self._names[id(parameter)]

    def clip_attention(self, logits: Mapping[str, HeadLogits]) -> None:
        """Set the largest attention logits of the batch whose gradients the next steps take (`qk_clip_threshold`).

        They hold until they are replaced. Without them, or without the option, nothing is clipped.

        Args:
            logits: name of a query or key projection's weight → its heads' logits, equal on all processes.

        Raises:
            ValueError: no parameter of that name takes a matrix rule, or heads do not divide its rows.
        """
        known = {
            route.name: parameter
            for group in self.groups
            if group.rule != "adamw"
            for parameter, route in zip(group.parameters, group.routes)
        }
        for name, heads in logits.items():
            if name not in known:
                raise ValueError(f"{name}: no parameter of that name takes the matrix rule")
            rows = parameter_shape(known[name])[0]
            if rows % len(heads.largest):
                raise ValueError(f"{name}: {len(heads.largest)} heads do not divide its {rows} rows")
        self.qk_clip.logits = {id(known[name]): heads for name, heads in logits.items()}

    def has_started(self, parameter: Tensor) -> bool:
        """Return False for a parameter that was frozen at construction and has had no gradient since."""
        return "step" in self.state.get(parameter, ())

    def all(self) -> list[StepUnit]:
        """Return the units of a whole optimizer step."""
        return list(self._started(self.layout.all_step_units(self.options)))

    def due(self, param_groups: list[dict[str, Any]]) -> list[StepUnit]:
        """Return the units of this call of ``step``: DeepSpeed narrows ``param_groups`` to one of them."""
        return list(self._started(self.layout.step_units(param_groups)))

    @property
    def options(self) -> list[dict[str, Any]]:
        """Return all param groups, also while DeepSpeed has narrowed ``param_groups`` to one."""
        return [group.options for group in self.groups]

    def group_of(self, unit: StepUnit) -> RuleGroup:
        """Return the group that a unit is a part of."""
        return self.groups[unit.group]

    def parameters(self, unit: StepUnit) -> list[Tensor]:
        """Return the parameters of a unit."""
        group = self.group_of(unit)
        return [group.parameters[position] for position in unit.positions]

    def stored_parts(self, unit: StepUnit, parameters: Sequence[Tensor]) -> list[TensorPart] | None:
        """Return which elements of AdamW's moments are here, which bf16 ones are rounded by; None for others."""
        if self.group_of(unit).options.get("state_dtype") != "bfloat16":
            return None
        parts = []
        for parameter in parameters:
            dim, start = self.layout.interval(parameter)
            local = tuple(self.layout.weight(parameter).shape)
            parts.append(TensorPart(tuple(parameter_shape(parameter)), dim, start, local))
        return parts

    def parts(self, unit: StepUnit) -> UnitParts:
        """Return what hooks act on."""
        options = self.group_of(unit).options
        return UnitParts(
            unit, options, self.layout, self.state, self.parameters(unit), partial(self.matrices, unit)
        )

    def routed(self, unit: StepUnit) -> list[tuple[Tensor, Route]]:
        """Return (parameter, route) for the parameters of a unit."""
        group = self.group_of(unit)
        return [(group.parameters[position], group.routes[position]) for position in unit.positions]

    def buckets(self, unit: StepUnit) -> list[Bucket]:
        """Return the buckets in which a unit's matrices are stepped, rebuilt where state tensors were replaced."""
        buckets = self._buckets.get(unit.key)
        if buckets is None or not all(
            home.fits() for bucket in buckets for home in (*bucket.batch_states, *bucket.receivers)
        ):
            buckets = self._buckets[unit.key] = self._new_buckets(unit)
        return buckets

    def matrices(self, unit: StepUnit) -> list[MatrixRef]:
        """Return the matrices of a unit in the order of its parameters."""
        matrices = self._matrices.get(unit.key)
        if matrices is None:
            matrices = self._matrices[unit.key] = self._new_matrices(unit)
        return matrices

    def skip_candidates(self, unit: StepUnit, active: list[Tensor]) -> Candidates:
        """Return what may skip the step as one: each matrix, or under AdamW each parameter."""
        if self.group_of(unit).rule == "adamw":
            return {p: [((id(p), ""), self.name_of(p), self.layout.gradient(p))] for p in active}
        candidates: dict[Tensor, list[Candidate]] = {}
        for m in self.matrices(unit):
            elements = m.view.elements(m.parameter, m.block)
            candidates.setdefault(m.parameter, []).append((m.unit, m.block.name, elements))
        return candidates

    def start(self, parameters: Iterable[Tensor]) -> None:
        """Allocate state for frozen parameters, which are stepped from now on (a collective, as ``step`` is).

        Raises:
            OptionError: the rank is larger than a side of one of them.
            TypeError: one of them is distributed unlike the parameters that were trained at construction.
        """
        wanted = {id(p) for p in parameters}
        for index, group in enumerate(self.groups):
            starting = sorted(i for i in group.frozen if id(group.parameters[i]) in wanted)
            if not starting:
                continue
            routes = [group.routes[i] for i in starting]
            rank_limit_check(group.options, [(b.name, b.shape) for route in routes for b in route.blocks])
            self.layout.check([(r.name, group.parameters[i]) for i, r in zip(starting, routes)])
            group.frozen.difference_update(starting)
            group.late.append(starting)
            self.allocate(index)

    def start_unfrozen(self) -> None:
        """Start frozen parameters that have a gradient by now."""
        if any(group.frozen for group in self.groups):
            self.start(
                group.parameters[i]
                for group in self.groups
                for i in group.frozen
                if group.parameters[i].grad is not None
            )

    def allocate(self, index: int) -> None:
        """Give every started parameter of a group its step count and zero-filled state."""
        group = self.groups[index]
        for unit in self.all():
            if unit.group != index:
                continue
            for parameter in self.parameters(unit):
                self.state[parameter].setdefault("step", 0)
                if group.rule == "adamw":
                    self._allocate_adamw(parameter, group.options)
            if group.rule != "adamw":
                for bucket in self.buckets(unit):
                    for batch_state in (*bucket.batch_states, *bucket.receivers):
                        batch_state.bind(self.state)
            for hook in self.hooks:
                hook.allocate(self.parts(unit))

    def state_was_replaced(self) -> None:
        """Check the state tensors anew after they were written from outside (a collective if they are split)."""
        for unit in self.all():
            if self.group_of(unit).rule != "adamw":
                for bucket in self.buckets(unit):
                    for batch_state in bucket.batch_states:
                        batch_state.watch(all_of=True)

    def _allocate_adamw(self, parameter: Tensor, options: Mapping[str, Any]) -> None:
        weight, state = self.layout.weight(parameter), self.state[parameter]
        kinds = adamw_kernels.state_kinds(options["rounding"], weight, options)
        for kind, dtype in kinds.items():
            if kind not in state:
                state[kind] = torch.zeros_like(
                    weight, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format
                )

    def _started(self, units: Iterable[StepUnit]) -> Iterator[StepUnit]:
        """Leave frozen parameters out of the layout's units, and put those that started late into units of their own.

        In the unit of the others they would change the owners of matrices whose state is already distributed.
        """
        for unit in units:
            group = self.group_of(unit)
            if not group.frozen and not group.late:
                yield unit
                continue
            others = group.frozen.union(*group.late)
            first = [position for position in unit.positions if position not in others]
            yield StepUnit(unit.key, unit.group, first)
            for number, positions in enumerate(group.late):
                yield StepUnit((unit.key, number), unit.group, positions)

    def _new_buckets(self, unit: StepUnit) -> list[Bucket]:
        group = self.group_of(unit)
        buckets = self.layout.buckets(self.matrices(unit), presets.load_rule(group.rule), group.options)
        for bucket in buckets:
            for batch_state in bucket.batch_states:
                batch_state.bind(self.state)
                if any(self.state[m.parameter]["step"] for m in batch_state.matrices):
                    batch_state.watch(all_of=True)
        return buckets

    def _new_matrices(self, unit: StepUnit) -> list[MatrixRef]:
        group = self.group_of(unit)
        # Staggering counts the matrices that are stepped together: neither frozen nor late ones of other units.
        others = group.frozen.union(*group.late).difference(unit.positions)
        matrices = [
            (position, block)
            for position, route in enumerate(group.routes)
            if position not in others
            for block in route.blocks
        ]
        offsets = refresh_offsets([block.shape for _, block in matrices], group.options)
        wanted = set(unit.positions)
        return [
            MatrixRef(
                group.parameters[position],
                block,
                f"{block.part}." if len(group.routes[position].blocks) > 1 else "",
                offset,
                self.layout.local_view(group.parameters[position], block),
            )
            for (position, block), offset in zip(matrices, offsets)
            if position in wanted
        ]


def apply_config(options: Mapping[str, Any]) -> ApplyConfig:
    """Return what the updates of a matrix group are applied with in this step."""
    decays_after = options.get("decay_order") == "after"
    return ApplyConfig(_lr(options), _decay(options), decays_after, _rounding(options), _is_cautious(options))


def adamw_settings(options: Mapping[str, Any]) -> adamw_kernels.AdamWSettings:
    """Return what an AdamW group is stepped with in this step."""
    beta1, beta2 = options["betas"]
    # A scheduler that cycles the momentum of the matrices writes it into this group, too, where it means β₁.
    if "momentum" in options and options["scheduled"]:
        beta1 = options["momentum"]
    return adamw_kernels.AdamWSettings(
        _lr(options),
        _decay(options),
        (beta1, beta2),
        options["eps"],
        options["eps_form"],
        _rounding(options),
        _is_cautious(options),
    )


def _lr(options: Mapping[str, Any]) -> float | Tensor:
    return options["lr"] if options["scheduled"] else options["fixed_lr"]


def _decay(options: Mapping[str, Any]) -> float:
    # torch's get_optimizer_state_dict steps with lr = 0 and trusts that this moves nothing, which a group
    # that keeps its own lr would not honour.
    lr = options["lr"]
    keeps_lr = not options["scheduled"]
    return 0.0 if keeps_lr and isinstance(lr, float) and lr == 0.0 else options["weight_decay"]


def _is_cautious(options: Mapping[str, Any]) -> bool:
    return options.get("weight_decay_form") == "cautious"


def _rounding(options: Mapping[str, Any]) -> Rounding:
    return Rounding(options["rounding"], options["seed"])
