"""One torch optimizer for a whole model: hidden matrices take a matrix rule, everything else takes AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from optimizers import groups, skipping, weight_average
from optimizers.layouts.layout import Layout, StepUnit, Unattached
from optimizers.layouts.partitioned import PartitionedLayout
from optimizers.layouts.pipeline import step_buckets
from optimizers.layouts.replicated import ReplicatedLayout
from optimizers.layouts.sharded import ShardedLayout, is_sharded
from optimizers.linalg.robust import without_autocast
from optimizers.moment_figures import Figures
from optimizers.named_state import check_state_dict, compact, kind_bytes, restore_exactly
from optimizers.options import OptionError
from optimizers.presets import resolve
from optimizers.routing import Modules, Route
from optimizers.rules.parts import adamw_kernels
from optimizers.skipping import Candidates, SkipTracker, StepMask
from optimizers.step_stats import StepStats, first_moments, moment_sample, moment_spectra
from optimizers.step_units import RuleGroup, StepUnits, adamw_settings, apply_config


class Optimizer(torch.optim.Optimizer):
    """An ordinary torch optimizer: groups, state_dict, closures and schedulers work as usual.

    What is passed as one group becomes up to two: matrices that take the rule, and the rest under AdamW. Each
    group carries "rule" and all options of that rule. ``"scheduled": False`` makes a group keep its learning rate
    ("fixed_lr") whatever a scheduler writes into "lr". State is allocated at construction.

    Frozen parameters are kept in the groups, without state. One that gets a gradient later starts then.

    Plain parameters: every 2-D one takes the matrix rule, all others AdamW. Named ones, (name, parameter):
    embeddings, heads, norms and routers are recognized by name. With `modules`: by module type.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with options of their own.
        lr: learning rate of the matrix rule; None: the preset's.
        preset: option values to start from.
        modules: the model or its (name, module) pairs.
        process_group: the processes that hold equal replicas; None: this process alone. Parameters that are
            DTensors (FSDP2, HSDP) bring their mesh along.
        layout: "partitioned": DeepSpeed's ZeRO-1, 2 or 3 is about to partition the parameters. No state is
            allocated and `step` does nothing until `layouts.deepspeed_binding.attach`. None: they stay as they are.
        work: with a process group: "replicated" (all compute everything) or "split" (each matrix is computed,
            and its state kept, by one process).
        options: options of the preset that differ.

    Attributes:
        found_inf: torch's AMP protocol: a 1-element float tensor on the device; above 0, the next step
            changes neither weights nor state. The host need not know: `retract_step` later takes back its
            counters. Whoever sets it has checked the gradients; None: each step checks them itself, and a matrix
            whose gradient is not finite skips it.
        stats: counters and diagnostics of the last step.
        units: the parameters, and the units in which they are stepped.

    Raises:
        OptionError: see `optimizers.build`.
    """

    default_preset: ClassVar[str] = "adamw"
    reads_found_inf: bool = True
    found_inf: Tensor | None = None
    observes_moments: bool = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        preset: str | None = None,
        modules: Modules | None = None,
        process_group: dist.ProcessGroup | None = None,
        layout: str | None = None,
        work: str = "replicated",
        **options: Any,
    ) -> None:
        if layout not in (None, "partitioned"):
            raise OptionError("layout", layout, "is unknown", ("partitioned",))
        if work not in ("replicated", "split"):
            raise OptionError("work", work, "is unknown", ("replicated", "split"))
        self.preset = preset or self.default_preset
        self.options = resolve(self.preset, options if lr is None else {"lr": lr, **options})
        # torch refuses a bare tensor with a message of its own.
        params = params if isinstance(params, Tensor) else groups.listed(params)
        named = [] if isinstance(params, Tensor) else groups.named_tensors(params)
        self.units = StepUnits(Unattached() if layout else _layout_of(named, process_group, work))
        self.stats = StepStats()
        self._skips = SkipTracker()
        self._left_out: list[tuple[str, Tensor]] = []
        self._modules = modules
        super().__init__(params, {"lr": self.options["lr"], "weight_decay": self.options["weight_decay"]})
        # A reference to the model would travel with every pickle and deepcopy.
        self._modules = None
        # OneCycleLR and CyclicLR look here for what they cycle, and write it into every group.
        cycled = next((key for key in ("momentum", "betas") if key in self.options), None)
        if cycled is not None:
            self.defaults[cycled] = self.options[cycled]
        groups.require_matrices(self.preset, self.routes, self.options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: their routes decide their rule, and options in the dict override the optimizer's.

        Raises:
            OptionError: unknown option, bad value, rank larger than a matrix side.
        """
        self.units.state = self.state
        position = sum(len(group["params"]) for group in self.param_groups)
        pairs, is_named = groups.named(param_group["params"], start=position)
        if self._is_partitioned:
            # DeepSpeed partitions what is trained now, once.
            self._left_out += [pair for pair in pairs if not pair[1].requires_grad]
            pairs = [pair for pair in pairs if pair[1].requires_grad]
        for group in groups.prepare(self.preset, self.options, param_group, pairs, is_named, self._modules):
            own_keys = set(group.options)
            super().add_param_group(group.options)
            # torch fills in its defaults, which are options of the matrix rule.
            for key in self.defaults.keys() - own_keys:
                del group.options[key]
            self.units.add(group)
            self.units.allocate(len(self.units.groups) - 1)

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step all parameters that have gradients.

        Nothing in it waits for the device, whatever `found_inf` holds. With a process group it is a
        collective.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.
        """
        return self._eager_step(closure)  # pyright: ignore[reportAttributeAccessIssue]

    # Rules are batched by hand, and dynamo fails on the views in the state: a compiled step runs as it is.
    @torch.compiler.disable
    def _eager_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._drain_pending()
        self._check_gradients()
        self.units.start_unfrozen()
        units = self.units.due(self.param_groups)
        self.stats.begin({unit.key for unit in units})
        for unit in units:
            self._step_unit(unit)
        self._skips.log.warn()
        return loss

    def _step_unit(self, unit: StepUnit) -> None:
        rule = self.units.group_of(unit).rule
        gradient = self.layout.gradient
        active = [p for p in self.units.parameters(unit) if gradient(p) is not None]
        if not active:
            return
        with record_function(f"optimizer/{rule}"), without_autocast(active[0].device.type):
            candidates = self.units.skip_candidates(unit, active)
            mask = self._mask(unit, candidates)
            moved = [p for p in active if not mask.units.issuperset(key for key, _, _ in candidates[p])]
            parts = self.units.parts(unit)
            for hook in self.units.hooks:
                hook.before(parts, mask)
            if rule != "adamw":
                self._step_matrices(unit, mask)
            elif moved:
                self._step_adamw(unit, moved, mask)
            for hook in self.units.hooks:
                hook.after(parts, moved, mask)
        for parameter in moved:
            self.state[parameter]["step"] += 1
        self.stats.stepped(moved)

    def _step_matrices(self, unit: StepUnit, mask: StepMask) -> None:
        group, buckets = self.units.group_of(unit), self.units.buckets(unit)
        step_buckets(group.rule, buckets, self.state, mask, apply_config(group.options), self.stats.record)

    def _step_adamw(self, unit: StepUnit, active: list[Tensor], mask: StepMask) -> None:
        layout = self.layout
        adamw_kernels.step(
            [layout.weight(p) for p in active],
            [gradient for p in active if (gradient := layout.gradient(p)) is not None],
            [self.state[p] for p in active],
            adamw_settings(self.units.group_of(unit).options),
            [self.units.name_of(p) for p in active],
            mask.everything,
            self.units.stored_parts(unit, active),
        )
        if self.stats.observing and self.preset_rule == "adamw":
            for observed in first_moments(self.units, unit):
                self.stats.observe(*observed)

    # Gradients that are missing, sparse or not finite.

    def _mask(self, unit: StepUnit, candidates: Candidates) -> StepMask:
        return self._skips.mask(
            candidates,
            self.found_inf,
            partial(self.layout.agree, unit),
            host_waits=isinstance(self.layout, PartitionedLayout),
            together=self.units.group_of(unit).rule == "adamw",
        )

    def _drain_pending(self) -> None:
        """Learn what skipped the last step: its counters go back, and the first time the user is warned."""
        for names, parameters in self._skips.drain_pending():
            self.stats.forget_spectra(names)
            for parameter in parameters:
                self.state[parameter]["step"] -= 1
        self._skips.log.warn()

    def _check_gradients(self) -> None:
        name_of = self.units.name_of
        skipping.refuse_sparse(
            (name_of(p), p.grad)
            for group in self.units.groups
            for p in group.parameters
            if p.grad is not None
        )
        unfrozen = next((name for name, p in self._left_out if p.requires_grad), None)
        if unfrozen is not None:
            raise RuntimeError(
                f"{unfrozen}: was frozen when DeepSpeed partitioned the parameters and cannot be trained now; unfreeze "
                "it before the engine is built (and freeze it again after), or use ddp, fsdp2 or zero0"
            )

    def retract_step(self) -> None:
        """Take back the host's counters of the last step, which `found_inf` masked on the device.

        Call it before the next step, once the host knows. The optimizer is then as if it had never seen the
        step.
        """
        self._drain_pending()
        self.stats.retract(self.state)

    @property
    def skipped_steps(self) -> dict[str, int]:
        """Return name of a matrix or parameter → steps that it skipped because its gradient was not finite.

        Steps that `found_inf` masked are not counted. Waits for the device.
        """
        self._drain_pending()
        return dict(self._skips.log.counts)

    # Parameters and their distribution.

    @property
    def routes(self) -> list[Route]:
        """Return the route of each trained parameter, group by group; frozen ones appear when they start."""
        return [route for group in self.units.groups for route in group.started_routes]

    @property
    def preset_rule(self) -> str:
        """Return the name of the rule of the hidden matrices."""
        return groups.rule_name(self.preset)

    @property
    def parameters_of_groups(self) -> list[list[Tensor]]:
        """Return the original parameters of each group; an engine may have replaced them by flat tensors."""
        return [group.parameters for group in self.units.groups]

    def name_of(self, parameter: Tensor) -> str:
        """Return the name that a parameter was given with."""
        return self.units.name_of(parameter)

    @property
    def layout(self) -> Layout:
        """Return how the parameters are distributed over the processes."""
        return self.units.layout

    @property
    def is_attached(self) -> bool:
        """False for an optimizer that still waits for its partitions and steps nothing."""
        return not isinstance(self.layout, Unattached)

    @property
    def is_divided(self) -> bool:
        """True where processes keep the state of different matrices, or of different parts of them."""
        return self.layout.is_divided

    @property
    def _is_partitioned(self) -> bool:
        return isinstance(self.layout, (Unattached, PartitionedLayout))

    def attach(self, layout: Layout) -> None:
        """Step the parameters as `layout` distributes them, and allocate the state."""
        self.stats.clear()
        self.units.attach(layout)

    # Diagnostics.

    @property
    def fallbacks(self) -> Tensor:
        """Return the number of factorizations that needed a fallback since construction, 0-dim int64 on the device."""
        return self.stats.fallbacks

    def add_fallbacks(self, count: int) -> None:
        """Add the fallbacks of an earlier process that this one resumes."""
        self.stats.fallbacks = self.stats.fallbacks + count

    @property
    def orthogonalizations(self) -> int:
        """Matrices that were orthogonalized in the last step."""
        return self.stats.orthogonalizations

    def observe_moments(
        self, on: bool = True, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """Let the next step compute `moment_figures`.

        Args:
            on: False takes it back.
            around: gives a context for each computation of figures inside the step, such as a meter of its memory.
        """
        self.stats.observe_next(on, around, moment_sample(self.units, self.preset_rule) if on else None)

    @property
    def figures_are_divided(self) -> bool:
        """True where the processes have the `moment_figures` of different matrices."""
        return self.is_divided or self.stats.sample is not None

    def moment_figures(self) -> dict[str, Figures]:
        """Return figures of each matrix in the last observed step, as 0-dim fp64 tensors on the device.

        condition_number, effective_rank, stable_rank of what the rule orthogonalized or normalized; where it
        applied a factor also orthogonality_error and polar_error. Empty if that step was retracted. Of a large model
        `optimizers.moment_sample` chooses the matrices, and replicas share them.
        """
        return self.stats.figures

    def observation_seconds(self) -> float:
        """Return the seconds that `moment_figures` cost the last observed step. Waits for the device."""
        return self.stats.seconds()

    def moment_spectra(self) -> dict[str, Tensor]:
        """Return name → singular values of the moment, descending, detached, for every matrix on the rule.

        Of the stored moment (in the subspace for SUMO and GaLore; the first moment for AdamW, hidden matrices
        only). Free where the last step computed them, else from an fp64 Gram.
        """
        self._drain_pending()
        return moment_spectra(self.units, self.stats, self.preset_rule)

    def bytes_sent(self) -> dict[str, float]:
        """Return kind of collective → bytes that this process sent for the optimizer since construction.

        By the ring convention (`layouts.communicator`); without the engine's gradient reduction.
        """
        total: dict[str, float] = {}
        for communicator in self.layout.communicators:
            for kind, size in communicator.sent.items():
                total[kind] = total.get(kind, 0) + size
        return total

    def collective_calls(self) -> int:
        """Return how many collectives this process issued for the optimizer since construction."""
        return sum(sum(c.calls.values()) for c in self.layout.communicators)

    # State.

    def state_bytes(self) -> dict[str, int]:
        """Return kind → bytes of this process' state tensors.

        Kinds are "moment", "basis", "second_moment" … of the rule, and "aux" for the AdamW next to a matrix rule.
        """
        has_aux = self.preset_rule != "adamw"
        total: dict[str, int] = {}
        for group in self.units.groups:
            for parameter in filter(self.units.has_started, group.parameters):
                for kind, size in kind_bytes(self.state[parameter]).items():
                    is_aux = has_aux and group.rule == "adamw" and kind != weight_average.KIND
                    name = "aux" if is_aux else kind
                    total[name] = total.get(name, 0) + size
        return total

    @property
    def keeps_average(self) -> bool:
        """Return True if `averaged_weights` has averages to put in the place of the weights."""
        return any(group.options.get("average_decay") is not None for group in self.units.groups)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averages in the place of the weights inside the context (`average_decay`)."""
        with torch.no_grad(), weight_average.averages_in_place(map(self.units.parts, self.units.all())):
            yield

    def steps_by_name(self) -> dict[str, int]:
        """Return parameter name → steps it has taken."""
        self._drain_pending()
        return {
            self.name_of(p): self.state[p]["step"]
            for group in self.units.groups
            for p in group.parameters
            if self.units.has_started(p)
        }

    def state_was_replaced(self) -> None:
        """Check the state anew after it was written from outside (a collective where it is split)."""
        self.stats.forget_step()
        self.units.state_was_replaced()

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict as any torch optimizer's: exact, for the same layout and rank.

        `named_state` moves state between layouts.

        Raises:
            RuntimeError: the parameters are partitioned, which torch's form cannot express.
        """
        self._refuse_partitions("state_dict")
        self._drain_pending()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` gave, bit by bit (torch would cast moments to the weights' dtype).

        Raises:
            ValueError: it was written by another optimizer, preset, model or set of options; says which.
            RuntimeError: the parameters are partitioned.
        """
        self._refuse_partitions("load_state_dict")
        check_state_dict(self, state_dict, self.units.start)
        own = [group.options for group in self.units.groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.units.groups, own):
            # Options that did not exist when it was written.
            for key in options.keys() - group.options.keys():
                group.options[key] = options[key]
        restore_exactly(self, state_dict)
        self._skips.forget_pending()
        self.stats.forget_step()
        self.units.rebuild()

    def _refuse_partitions(self, what: str) -> None:
        if self._is_partitioned:
            raise RuntimeError(
                f"{what}: this optimizer steps partitions of parameters; use optimizers.named_state.pieces and load"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take: everything but caches and the process group, which cannot travel."""
        self._drain_pending()
        return {
            **super().__getstate__(),
            "state": compact(self.state),
            "preset": self.preset,
            "options": self.options,
            "rule_groups": [(group.routes, group.frozen, group.late) for group in self.units.groups],
            "_left_out": self._left_out,
            "_skips": self._skips,
            "_modules": None,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        attributes = dict(state)
        rule_groups = attributes.pop("rule_groups", None)
        super().__setstate__(attributes)
        if rule_groups is None:
            # From torch's load_state_dict, which replaces state and groups only; the layout stays.
            for group, options in zip(self.units.groups, self.param_groups):
                group.options = options
            self.units.state = self.state
            return
        restored = [
            RuleGroup(options, list(options["params"]), routes, frozen, late)
            for options, (routes, frozen, late) in zip(self.param_groups, rule_groups)
        ]
        started = [
            (route.name, p)
            for group in restored
            for p, route in zip(group.parameters, group.routes)
            if "step" in self.state.get(p, ())
        ]
        self.stats = StepStats()
        self.units = StepUnits(_layout_of(started, None, "replicated"))
        self.units.state = self.state
        for group in restored:
            self.units.add(group)


def _layout_of(named: list[tuple[str, Tensor]], process_group: dist.ProcessGroup | None, work: str) -> Layout:
    if is_sharded(p for _, p in named):
        return ShardedLayout(named)
    return ReplicatedLayout(process_group, work)
