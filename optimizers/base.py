"""One torch optimizer for a whole model: matrices take a rule, the rest AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial as bound
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from optimizers import groups, rules, skipping
from optimizers.fused_projections import Block
from optimizers.inspection import Figures, Share, kind_bytes, moment_share, singular_values
from optimizers.journal import Journal
from optimizers.layouts.lanes import Entry, Lane
from optimizers.layouts.layout import Layout, StepUnit
from optimizers.layouts.partitioned import PartitionedLayout, Unattached
from optimizers.layouts.replicated import ReplicatedLayout
from optimizers.layouts.sharded import ShardedLayout, is_sharded
from optimizers.linalg.precision import without_autocast
from optimizers.members import Member
from optimizers.options import OptionError
from optimizers.presets import resolve
from optimizers.rounding import Rounding
from optimizers.routing import Modules, Route
from optimizers.rules import adamw
from optimizers.skipping import Pending, SkipLog, StepMask, Unit
from optimizers.stacks import ApplyConfig
from optimizers.state_io import compact, restore_exactly, validate

Params = Iterable[Any]
_Units = dict[Tensor, list[tuple[Unit, str, Tensor | None]]]


class Optimizer(torch.optim.Optimizer):
    """An ordinary torch optimizer: groups, state_dict, closures and schedulers work as usual.

    What is passed as one group becomes up to two: matrices that take the rule, and the rest under AdamW. Each
    group carries "rule" and all options of that rule; "scheduled": False makes a group keep its learning rate
    ("fixed_lr") whatever a scheduler writes into "lr". State is allocated at construction.

    Frozen parameters are kept in the groups, without state: one that gets a gradient later starts then.

    Plain parameters: every 2-D one takes the matrix rule, all others AdamW. Named ones, (name, parameter):
    embeddings, heads, norms and routers are told by name. With `modules`: by module type.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with options of their own.
        lr: learning rate of the matrix rule; None: the preset's.
        preset: which option values to start from.
        modules: the model or its (name, module) pairs.
        process_group: the processes that hold equal replicas; None: this process alone. Parameters that are
            DTensors (FSDP2, HSDP) bring their mesh along.
        layout: "partitioned": the parameters are about to be cut up by DeepSpeed's ZeRO-1, 2 or 3. No state is
            allocated and `step` does nothing until `layouts.deepspeed_binding.attach`. None: they are as they
            are.
        work: with a process group: "replicated" (all compute everything) or "split" (each matrix is computed,
            and its state kept, by one process).
        options: options of the preset that differ.

    Attributes:
        found_inf: torch's AMP protocol: a 1-element float tensor on the device; above 0, the next step
            changes neither weights nor state. The host need not know: `retract_step` later takes back its
            counters. Whoever sets it has looked at the gradients; None: each step looks itself, and what has a
            gradient that is not finite skips it.
        journal: what the last step left behind beside weights and state.

    Raises:
        OptionError: see `optimizers.build`.
    """

    default_preset: ClassVar[str] = "adamw"
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        *,
        preset: str | None = None,
        modules: Modules | None = None,
        process_group: dist.ProcessGroup | None = None,
        layout: str | None = None,
        work: str = "replicated",
        **options: Any,
    ) -> None:
        self.preset = preset or self.default_preset
        given = dict(options) if lr is None else {"lr": lr, **options}
        self.options = resolve(self.preset, given)
        self._modules = modules
        self._routes: list[list[Route]] = []
        self._parameters: list[list[Tensor]] = []
        # DeepSpeed narrows `param_groups` to one while it calls `step`, and puts flat tensors in for "params".
        self._groups: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}
        # Of each group: positions of frozen parameters that have not started, and those that started, by the step.
        self._frozen: list[set[int]] = []
        self._late: list[list[list[int]]] = []
        self._left_out: list[tuple[str, Tensor]] = []
        if not isinstance(params, Tensor):
            params = groups.listed(params)
        if layout not in (None, "partitioned"):
            raise OptionError("layout", layout, "is unknown", ("partitioned",))
        if work not in ("replicated", "split"):
            raise OptionError("work", work, "is unknown", ("replicated", "split"))
        named = [] if isinstance(params, Tensor) else groups.named_tensors(params)
        self._layout: Layout = Unattached() if layout else _layout_of(named, process_group, work)
        self._lanes: dict[Any, list[Lane]] = {}
        self._matrices: dict[Any, list[Member]] = {}
        self.journal = Journal()
        self._skips = SkipLog()
        self._pending: list[Pending] = []
        super().__init__(params, {"lr": self.options["lr"], "weight_decay": self.options["weight_decay"]})
        # OneCycleLR and CyclicLR look here for what they cycle, and write it into every group.
        cycled = next((key for key in ("momentum", "betas") if key in self.options), None)
        if cycled is not None:
            self.defaults[cycled] = self.options[cycled]
        # A reference to the model would travel with every pickle and deepcopy.
        self._modules = None
        groups.require_matrices(self.preset, self.routes)

    @property
    def routes(self) -> list[Route]:
        """Where each trained parameter went, group by group; frozen ones appear when they start."""
        return [
            route
            for routes, frozen in zip(self._routes, self._frozen)
            for position, route in enumerate(routes)
            if position not in frozen
        ]

    @property
    def parameters_of_groups(self) -> list[list[Tensor]]:
        """The parameters of each group as they were given; an engine may have put flat tensors in their place."""
        return self._parameters

    @property
    def is_attached(self) -> bool:
        """False for an optimizer that still waits for its partitions: it steps nothing."""
        return not isinstance(self._layout, Unattached)

    @property
    def layout(self) -> Layout:
        """How the parameters lie on the processes."""
        return self._layout

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All parameter groups, also while an engine has narrowed `param_groups`."""
        return self._groups

    def lanes(self, step_unit: StepUnit) -> list[Lane]:
        """The lanes in which a step_unit's matrices are stepped."""
        return self._lanes_of(step_unit)

    def name_of(self, parameter: Tensor) -> str:
        """The name that a parameter was given with."""
        return self._names[id(parameter)]

    @property
    def is_first_replica(self) -> bool:
        """Whether this process is the one of its replicas that writes what all of them hold."""
        return self._layout.is_first_replica

    def steps_by_name(self) -> dict[str, int]:
        """Parameter name → steps it has taken."""
        self._settle()
        return {
            self.name_of(p): self.state[p]["step"]
            for group in self._parameters
            for p in group
            if self.has_started(p)
        }

    def state_was_replaced(self) -> None:
        """Look at the state anew, after it was written from outside (a collective where it is split)."""
        self.journal.forget_step()
        for step_unit in self.step_units():
            if self._groups[step_unit.group]["rule"] != "adamw":
                for lane in self._lanes_of(step_unit):
                    for bank in lane.banks:
                        bank.watch(all_of=True)

    @property
    def is_divided(self) -> bool:
        """Whether processes keep the state of different matrices, or of different parts of them."""
        return self._layout.is_divided

    def attach(self, layout: Layout) -> None:
        """Step the parameters as `layout` says they lie; allocates the state."""
        self._layout = layout
        self._lanes, self._matrices = {}, {}
        self.journal.clear()
        for index in range(len(self._groups)):
            self._allocate(index)

    @property
    def fallbacks(self) -> Tensor:
        """0-dim int64 on the device: factorizations that needed a fallback, since construction."""
        return self.journal.fallbacks

    @property
    def skipped_steps(self) -> dict[str, int]:
        """Name of a matrix or parameter → steps that it skipped because its gradient was not finite.

        Steps that `found_inf` masked are not counted. Waits for the device.
        """
        self._settle()
        return dict(self._skips.counts)

    @property
    def orthogonalizations(self) -> int:
        """Matrices that were orthogonalized in the last step."""
        return self.journal.orthogonalizations

    def add_fallbacks(self, count: int) -> None:
        """Count those of an earlier process that this one goes on from."""
        self.journal.fallbacks = self.journal.fallbacks + count

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; what they are decides their rule, and options in the dict win over the optimizer's.

        Raises:
            OptionError: unknown option, bad value, rank larger than a matrix side.
        """
        taken = sum(len(group["params"]) for group in self.param_groups)
        pairs, is_named = groups.named(param_group["params"], start=taken)
        if isinstance(self._layout, (Unattached, PartitionedLayout)):
            # DeepSpeed cuts up what is trained now, once.
            self._left_out += [pair for pair in pairs if not pair[1].requires_grad]
            pairs = [pair for pair in pairs if pair[1].requires_grad]
        for made in groups.prepare(self.preset, self.options, param_group, pairs, is_named, self._modules):
            super().add_param_group(made.group)
            for key in self.defaults.keys() - made.group.keys():
                del self.param_groups[-1][key]
            self._routes.append(made.routes)
            self._parameters.append(list(self.param_groups[-1]["params"]))
            self._groups.append(self.param_groups[-1])
            self._names.update({id(p): r.name for p, r in zip(self._parameters[-1], made.routes)})
            self._frozen.append({i for i, p in enumerate(self._parameters[-1]) if not p.requires_grad})
            self._late.append([])
            self._allocate(len(self._groups) - 1)

    def step_units(self) -> list[StepUnit]:
        """What is stepped in a whole optimizer step."""
        return list(self._started(self._layout.all_step_units(self._groups)))

    def _started(self, step_units: Iterable[StepUnit]) -> Iterator[StepUnit]:
        """Sections without frozen parameters. Those that started later have step_units of their own: matrices would
        else change their owners, where the state is divided."""
        for step_unit in step_units:
            frozen, late = self._frozen[step_unit.group], self._late[step_unit.group]
            if not frozen and not late:
                yield step_unit
                continue
            others = frozen.union(*late)
            first = [position for position in step_unit.positions if position not in others]
            yield StepUnit(step_unit.key, step_unit.group, first)
            for number, positions in enumerate(late):
                yield StepUnit((step_unit.key, number), step_unit.group, positions)

    def has_started(self, parameter: Tensor) -> bool:
        """Return False for a parameter that was frozen at construction and has had no gradient since."""
        return "step" in self.state.get(parameter, ())

    def start(self, parameters: Iterable[Tensor]) -> None:
        """Give frozen parameters their state: from now on they are stepped (a collective as `step` is).

        Raises:
            OptionError: a rank larger than a side of one of them.
            TypeError: one of them lies unlike the parameters that were trained at construction.
        """
        wanted = {id(p) for p in parameters}
        for index, frozen in enumerate(self._frozen):
            starting = sorted(i for i in frozen if id(self._parameters[index][i]) in wanted)
            if not starting:
                continue
            routes = [self._routes[index][i] for i in starting]
            groups.check_rank(self._groups[index], routes)
            self._layout.check([(r.name, self._parameters[index][i]) for i, r in zip(starting, routes)])
            frozen.difference_update(starting)
            self._late[index].append(starting)
            self._allocate(index)

    def _start_unfrozen(self) -> None:
        if any(self._frozen):
            self.start(
                self._parameters[index][i]
                for index, frozen in enumerate(self._frozen)
                for i in frozen
                if self._parameters[index][i].grad is not None
            )
        unfrozen = next((name for name, p in self._left_out if p.requires_grad), None)
        if unfrozen is not None:
            raise RuntimeError(
                f"{unfrozen}: was frozen when DeepSpeed cut the parameters up and cannot be trained now; unfreeze it "
                "before the engine is built (and freeze it again after), or use ddp, fsdp2 or zero0"
            )

    def _allocate(self, index: int) -> None:
        for step_unit in self.step_units():
            if step_unit.group != index:
                continue
            group = self._groups[index]
            for position in step_unit.positions:
                parameter = self._parameters[index][position]
                state = self.state[parameter]
                state.setdefault("step", 0)
                if group["rule"] == "adamw":
                    weight = self._layout.weight(parameter)
                    for kind, dtype in adamw.state_kinds(group["rounding"], weight).items():
                        if kind not in state:
                            state[kind] = torch.zeros_like(
                                weight, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format
                            )
            if group["rule"] != "adamw":
                for lane in self._lanes_of(step_unit):
                    for bank in (*lane.banks, *lane.landing):
                        bank.bind(self.state)

    def _lanes_of(self, step_unit: StepUnit) -> list[Lane]:
        lanes = self._lanes.get(step_unit.key)
        if lanes is None or not all(bank.fits() for lane in lanes for bank in (*lane.banks, *lane.landing)):
            lanes = self._lanes[step_unit.key] = self._new_lanes(step_unit)
        return lanes

    def _new_lanes(self, step_unit: StepUnit) -> list[Lane]:
        group = self._groups[step_unit.group]
        lanes = self._layout.lanes(self._members_of(step_unit), rules.load(group["rule"]), group)
        for lane in lanes:
            for bank in lane.banks:
                bank.bind(self.state)
                if any(self.state[m.parameter]["step"] for m in bank.members):
                    bank.watch(all_of=True)
        return lanes

    def _members_of(self, step_unit: StepUnit) -> list[Member]:
        members = self._matrices.get(step_unit.key)
        if members is None:
            members = self._matrices[step_unit.key] = self._new_members(step_unit)
        return members

    def _new_members(self, step_unit: StepUnit) -> list[Member]:
        group, routes = self._groups[step_unit.group], self._routes[step_unit.group]
        parameters = self._parameters[step_unit.group]
        # Frozen parameters take no part in the staggering.
        others = (
            self._frozen[step_unit.group].union(*self._late[step_unit.group]).difference(step_unit.positions)
        )
        pairs = [
            (p, route, block)
            for position, (p, route) in enumerate(zip(parameters, routes))
            if position not in others
            for block in route.blocks
        ]
        offset, interval = group.get("refresh_offset", 0), group.get("refresh_interval", 1)
        stagger = group.get("refresh_stagger", False)
        wanted = {id(parameters[position]) for position in step_unit.positions}
        return [
            Member(
                p,
                block,
                f"{block.part}." if len(route.blocks) > 1 else "",
                offset + (position * interval // len(pairs) if stagger else 0),
                self._layout.holding(p, block),
            )
            for position, (p, route, block) in enumerate(pairs)
            if id(p) in wanted
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all parameters that have gradients.

        Nothing in it waits for the device, whatever `found_inf` holds. With a process group it is a
        collective.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        return self._untraced_step(closure)  # pyright: ignore[reportAttributeAccessIssue]

    # Rules are batched by hand, and dynamo fails on the views in the state: a compiled step runs as it is.
    @torch.compiler.disable
    def _untraced_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        skipping.refuse_sparse(
            (self.name_of(p), p.grad) for group in self._parameters for p in group if p.grad is not None
        )
        self._start_unfrozen()
        step_units = list(self._started(self._layout.step_units(self.param_groups)))
        self.journal.begin({step_unit.key for step_unit in step_units})
        for step_unit in step_units:
            group = self._groups[step_unit.group]
            parameters = [self._parameters[step_unit.group][position] for position in step_unit.positions]
            active = [p for p in parameters if self._layout.gradient(p) is not None]
            if not active:
                continue
            named = record_function(f"optimizer/{group['rule']}")
            with named, without_autocast(active[0].device.type):
                units = self._units(step_unit, active)
                mask = self._mask(step_unit, units)
                moved = [p for p in active if not mask.units.issuperset(unit for unit, *_ in units[p])]
                if group["rule"] != "adamw":
                    self._step_matrices(step_unit, mask)
                elif moved:
                    self._step_adamw(step_unit, moved, mask)
            for parameter in moved:
                self.state[parameter]["step"] += 1
            self.journal.stepped(moved)
        self._skips.warn()
        return loss

    def _units(self, step_unit: StepUnit, active: list[Tensor]) -> _Units:
        """What may skip the step as one, parameter by parameter: matrices, or whole parameters under AdamW."""
        found: _Units = {}
        if self._groups[step_unit.group]["rule"] == "adamw":
            return {p: [((id(p), ""), self.name_of(p), self._layout.gradient(p))] for p in active}
        for m in self._members_of(step_unit):
            elements = m.holding.elements(m.parameter, m.block)
            found.setdefault(m.parameter, []).append((m.unit, m.block.name, elements))
        return found

    def _mask(self, step_unit: StepUnit, units: _Units) -> StepMask:
        """Which units leave no trace in this step: those without a gradient, and those where it is not finite."""
        each = [unit for same in units.values() for unit in same]
        gradients = [gradient for *_, gradient in each]
        missing = frozenset(unit for unit, _, gradient in each if gradient is None)
        if self.found_inf is not None:
            return StepMask(self.found_inf, missing)
        flags = self._layout.agree(step_unit, skipping.nonfinite(gradients))
        if flags.device.type == "meta":
            return StepMask(None, missing)
        if skipping.host_may_look(flags.device) or isinstance(self._layout, PartitionedLayout):
            # DeepSpeed's own step waits for the device, too.
            broken = {unit: name for (unit, name, _), flag in zip(each, flags.tolist()) if flag}
            self._skips.notice(name for unit, name in broken.items() if unit not in missing)
            return StepMask(None, missing.union(broken))
        self._await(step_unit, units, flags)
        if self._groups[step_unit.group]["rule"] == "adamw":
            # Its fused kernel takes one flag for all parameters of a call.
            return StepMask(flags.any().float(), missing)
        return StepMask(None, missing, {unit: flag for (unit, *_), flag in zip(each, flags.unbind(0))})

    def _await(self, step_unit: StepUnit, units: _Units, flags: Tensor) -> None:
        """Let the host read these flags one step later."""
        each = [unit for same in units.values() for unit in same]
        self._pending.append(
            Pending(
                [name for _, name, gradient in each if gradient is not None],
                [unit for unit, _, gradient in each if gradient is not None],
                [
                    (p, [unit for unit, _, gradient in same if gradient is not None])
                    for p, same in units.items()
                    if any(gradient is not None for *_, gradient in same)
                ],
                *skipping.to_host(
                    torch.stack([f for f, (*_, g) in zip(flags.unbind(0), each) if g is not None])
                ),
                self._groups[step_unit.group]["rule"] == "adamw",
            )
        )

    def _settle(self) -> None:
        """Learn what skipped the last step: its counters go back, and the first time the user is warned."""
        pending, self._pending = self._pending, []
        for entry in pending:
            names, parameters = entry.skipped()
            self._skips.notice(names)
            self.journal.forget_spectra(names)
            for parameter in parameters:
                self.state[parameter]["step"] -= 1
        self._skips.warn()

    def _step_adamw(self, step_unit: StepUnit, active: list[Tensor], mask: StepMask) -> None:
        group = self._groups[step_unit.group]
        settings = adamw.Settings(
            _lr(group), _decay(group), _betas(group), group["eps"], group["eps_form"], _rounding(group)
        )
        adamw.step(
            [self._layout.weight(p) for p in active],
            [gradient for p in active if (gradient := self._layout.gradient(p)) is not None],
            [self.state[p] for p in active],
            settings,
            [self.name_of(p) for p in active],
            mask.everything,
        )
        if self.journal.observing and self.preset_rule == "adamw":
            for names, moments, share in self._first_moments(step_unit):
                self.journal.observe(names, moments, share)

    def _routed(self, step_unit: StepUnit) -> list[tuple[Tensor, Route]]:
        pairs = list(zip(self._parameters[step_unit.group], self._routes[step_unit.group]))
        return [pairs[position] for position in step_unit.positions]

    def _first_moments(self, step_unit: StepUnit) -> list[tuple[list[str], Tensor, Share | None]]:
        """Names and first moments of the hidden matrices under AdamW, those of one shape stacked.

        Slices that break rows have no matrix to look at; they are left out.
        """
        kinds: dict[Any, list[tuple[Block, Tensor]]] = {}
        for parameter, route in self._routed(step_unit):
            for block in route.blocks:
                holding = self._layout.holding(parameter, block)
                moment = holding.part(self.state[parameter]["moment"], block)
                if moment is not None:
                    kinds.setdefault((block.shape, holding.split, holding.pattern), []).append(
                        (block, moment)
                    )
        return [
            (
                [block.name for block, _ in same],
                torch.stack([moment for _, moment in same]),
                None if split is None else Share(shape, split - 2, self._layout.rows.total),
            )
            for (shape, split, _), same in kinds.items()
        ]

    @property
    def preset_rule(self) -> str:
        """The rule of the hidden matrices."""
        return groups.rule_name(self.preset)

    def _step_matrices(self, step_unit: StepUnit, mask: StepMask) -> None:
        group = self._groups[step_unit.group]
        rule = rules.load(group["rule"])
        config = ApplyConfig(_lr(group), _decay(group), group.get("decay_order") == "after", _rounding(group))
        lanes = self._lanes_of(step_unit)
        if lanes:
            lanes[0].begin()
        for position, lane in enumerate(lanes):
            batches = lane.batches(self.state, mask)
            for number, batch in enumerate(batches):
                if number == 0 and position + 1 < len(lanes):
                    # The next lane's gradients travel while this one computes.
                    lanes[position + 1].begin()
                self._step_batch(rule, lane, batch, config, group["rule"])
            if position + 1 < len(lanes):
                lanes[position + 1].begin()
            lane.end(config)

    def _step_batch(
        self, rule: rules.Rule, lane: Lane, batch: list[Entry], config: ApplyConfig, name: str
    ) -> None:
        # A function of its own, so that nothing of one batch is held while the next one is computed.
        with record_function(f"{name}/rule"):
            updates = rule.step([stack for _, _, stack in batch], lane.rows)
        for (bank, active, stack), update in zip(batch, updates):
            self.journal.enter(rule, stack, update, lane.rows)
            with record_function(f"{name}/apply"):
                lane.apply(stack, update.delta, config)
            bank.write_back(active, stack.state)
            bank.watch(all_of=bool(stack.due))
            stack.release()

    def retract_step(self) -> None:
        """Take back the host's counters of the last step, which `found_inf` masked on the device.

        Call it before the next step, once the host knows. The optimizer is then as if it had never seen the
        step.
        """
        self._settle()
        self.journal.retract(self.state)

    def observe_moments(self, on: bool = True) -> None:
        """Let the next step compute `moment_figures`."""
        self.journal.observe_next(on)

    def moment_figures(self) -> dict[str, Figures]:
        """Figures of each matrix in the last observed step, as 0-dim fp64 tensors on the device.

        condition_number, effective_rank, stable_rank of what the rule orthogonalized or normalized; where it
        applied a factor also orthogonality_error and polar_error. Empty if that step was retracted.
        """
        return self.journal.figures

    def observation_seconds(self) -> float:
        """What `moment_figures` cost the last observed step, for whoever keeps a budget. Waits for the device."""
        return self.journal.seconds()

    def moment_spectra(self) -> dict[str, Tensor]:
        """Name → singular values of the moment, descending, detached, for every matrix on the rule.

        Of the stored moment (in the subspace for SUMO and GaLore; the first moment for AdamW, hidden matrices
        only). Free where the last step computed them, else from an fp64 Gram.
        """
        self._settle()
        found: dict[str, Tensor] = {}
        for step_unit in self.step_units():
            if self._groups[step_unit.group]["rule"] != "adamw":
                rule = rules.load(self._groups[step_unit.group]["rule"])
                for lane in self._lanes_of(step_unit):
                    for bank in lane.banks:
                        bank.bind(self.state)
                        share = moment_share(rule, bank.shape, bank.split, bank.options, lane.rows)
                        kind = rule.observed(bank.shape, bank.options)
                        if kind is None:
                            continue
                        values = bound(singular_values, bank.stacked(kind), share)
                        found.update(self.journal.spectra([m.block.name for m in bank.members], values))
            elif self.preset_rule == "adamw":
                for names, moments, share in self._first_moments(step_unit):
                    found.update(zip(names, singular_values(moments, share).unbind(0)))
        return found

    def bytes_sent(self) -> dict[str, float]:
        """Kind of collective → bytes that this process has sent for the optimizer since construction, by the
        ring convention (`layouts.communicator`). Gradient reduction is the engine's and not in it."""
        total: dict[str, float] = {}
        for communicator in self._layout.communicators:
            for kind, size in communicator.sent.items():
                total[kind] = total.get(kind, 0) + size
        return total

    def collective_calls(self) -> int:
        """How many collectives this process has issued for the optimizer since construction."""
        return sum(sum(c.calls.values()) for c in self._layout.communicators)

    def state_bytes(self) -> dict[str, int]:
        """Kind → bytes of this process' state tensors: "moment", "basis", "second_moment" … of the rule, and
        "aux" for AdamW beside it."""
        beside = self.preset_rule != "adamw"
        total: dict[str, int] = {}
        for group, parameters in zip(self._groups, self._parameters):
            aux = beside and group["rule"] == "adamw"
            for parameter in filter(self.has_started, parameters):
                for kind, size in kind_bytes(self.state[parameter]).items():
                    name = "aux" if aux else kind
                    total[name] = total.get(name, 0) + size
        return total

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer's: exact, for the same layout and rank. Across layouts: `named_state`.

        Raises:
            RuntimeError: the parameters are partitioned: torch's form knows only what stands in "params".
        """
        self._refuse_partitions("state_dict")
        self._settle()
        return super().state_dict()

    def _refuse_partitions(self, what: str) -> None:
        if isinstance(self._layout, (Unattached, PartitionedLayout)):
            raise RuntimeError(
                f"{what}: this optimizer steps partitions of parameters; use optimizers.named_state.pieces and load"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` gave, bit by bit (torch would cast moments to the weights' dtype).

        Raises:
            ValueError: it was written by another optimizer, preset, model or set of options; says which.
            RuntimeError: the parameters are partitioned.
        """
        self._refuse_partitions("load_state_dict")
        validate(self, state_dict, self.start)
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)
        self._lanes, self._pending = {}, []
        self.journal.forget_step()
        for index in range(len(self._groups)):
            self._allocate(index)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but caches and the process group, which cannot travel."""
        self._settle()
        return {
            **super().__getstate__(),
            "state": compact(self.state),
            "preset": self.preset,
            "options": self.options,
            "_routes": self._routes,
            "_frozen": self._frozen,
            "_late": self._late,
            "_left_out": self._left_out,
            "_skips": self._skips,
            "_modules": None,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(dict(state))
        self._groups = list(self.param_groups)
        # torch's load_state_dict passes state and groups only: the layout is still the one it was.
        if "_routes" in state:
            self._parameters = [list(group["params"]) for group in self._groups]
            pairs = zip(self._parameters, self._routes)
            self._names = {id(p): r.name for group, routes in pairs for p, r in zip(group, routes)}
            named = [
                (self._names[id(p)], p) for group in self._parameters for p in group if self.has_started(p)
            ]
            self._layout = _layout_of(named, None, "replicated")
            self._lanes, self._matrices, self._pending = {}, {}, []
            self.journal = Journal()


def _layout_of(named: list[tuple[str, Tensor]], process_group: dist.ProcessGroup | None, work: str) -> Layout:
    if is_sharded(p for _, p in named):
        return ShardedLayout(named)
    return ReplicatedLayout(process_group, work)


def _lr(group: Mapping[str, Any]) -> float | Tensor:
    return group["lr"] if group["scheduled"] else group["fixed_lr"]


def _decay(group: Mapping[str, Any]) -> float:
    # torch's get_optimizer_state_dict steps with lr = 0 and trusts that this moves nothing, which a group
    # that keeps its own lr would not honour.
    lr = group["lr"]
    return 0.0 if not group["scheduled"] and isinstance(lr, float) and lr == 0.0 else group["weight_decay"]


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    # A scheduler that cycles the momentum of the matrices writes it into this group, too, where it means β₁.
    first, second = group["betas"]
    return (group["momentum"] if "momentum" in group and group["scheduled"] else first), second


def _rounding(group: Mapping[str, Any]) -> Rounding:
    return Rounding(group["rounding"], group["seed"])
