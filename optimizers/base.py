"""One torch optimizer for a whole model: matrices take a rule, the rest AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers import groups, rules
from optimizers.inspection import Figures, Observation, kind_bytes, singular_values
from optimizers.layouts.replicated import Replicated, Rows, Whole
from optimizers.presets import resolve
from optimizers.rounding import Rounding
from optimizers.routing import Modules, Route
from optimizers.rules import adamw
from optimizers.stacks import STACK_BYTES, Bank, Member, Stack, apply_update, compute_dtype
from optimizers.state_io import compact, restore_exactly, validate

Params = Iterable[Any]


class Optimizer(torch.optim.Optimizer):
    """An ordinary torch optimizer: groups, state_dict, closures and schedulers work as usual.

    What is passed as one group becomes up to two: matrices that take the rule, and the rest under AdamW. Each
    group carries "rule" and all options of that rule; "scheduled": False makes a group keep its learning rate
    ("fixed_lr") whatever a scheduler writes into "lr". State is allocated at construction.

    Plain parameters: every 2-D one takes the matrix rule, all others AdamW. Named ones, (name, parameter):
    embeddings, heads, norms and routers are told by name. With `modules`: by module type.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with options of their own.
        lr: learning rate of the matrix rule; None: the preset's.
        preset: which option values to start from.
        modules: the model or its (name, module) pairs.
        process_group: the processes that hold equal replicas; None: this process alone.
        options: options of the preset that differ.

    Attributes:
        found_inf: torch's AMP protocol: a 1-element float tensor on the device; above 0, the next step
            changes neither weights nor state. The host need not know: `retract_step` later takes back its
            counters.
        orthogonalizations: matrices that were orthogonalized in the last step.

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
        **options: Any,
    ) -> None:
        self.preset = preset or self.default_preset
        given = dict(options) if lr is None else {"lr": lr, **options}
        self.options = resolve(self.preset, given)
        self._modules = modules
        self._routes: list[list[Route]] = []
        self._reset_caches(process_group)
        super().__init__(params, {"lr": self.options["lr"], "weight_decay": self.options["weight_decay"]})
        # A reference to the model would travel with every pickle and deepcopy.
        self._modules = None
        groups.require_matrices(self.preset, self.routes)

    def _reset_caches(self, process_group: dist.ProcessGroup | None) -> None:
        self._rows: Rows = Whole() if process_group is None else Replicated(process_group)
        self._banks: dict[int, list[Bank]] = {}
        self._stepped: list[Tensor] = []
        self._spectra: dict[str, tuple[Tensor, int]] = {}  # name → spectra of its stack, and which of them
        self._observation = Observation()
        self._observe = False
        self._fallbacks: Tensor = torch.zeros((), dtype=torch.int64)
        self.orthogonalizations = 0

    @property
    def routes(self) -> list[Route]:
        """Where each trainable parameter went, group by group."""
        return [route for group in self._routes for route in group]

    @property
    def fallbacks(self) -> Tensor:
        """0-dim int64 on the device: factorizations that needed a fallback, since construction."""
        return self._fallbacks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; what they are decides their rule, and options in the dict win over the optimizer's.

        Raises:
            OptionError: unknown option, bad value, rank larger than a matrix side.
        """
        taken = sum(len(group["params"]) for group in self.param_groups)
        pairs, is_named = groups.named(param_group["params"], start=taken)
        for made in groups.prepare(self.preset, self.options, param_group, pairs, is_named, self._modules):
            super().add_param_group(made.group)
            self._routes.append(made.routes)
            self._allocate(len(self.param_groups) - 1)

    def _allocate(self, index: int) -> None:
        group = self.param_groups[index]
        for parameter in group["params"]:
            state = self.state[parameter]
            state.setdefault("step", 0)
            if group["rule"] == "adamw":
                for kind, dtype in adamw.state_kinds(group["rounding"], parameter).items():
                    if kind not in state:
                        state[kind] = torch.zeros_like(
                            parameter, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format
                        )
        if group["rule"] != "adamw":
            for bank in self._banks_of(index):
                bank.bind(self.state)

    def _banks_of(self, index: int) -> list[Bank]:
        banks = self._banks.get(index)
        if banks is None or not all(bank.fits() for bank in banks):
            banks = self._banks[index] = self._new_banks(index)
        return banks

    def _new_banks(self, index: int) -> list[Bank]:
        group, rule = self.param_groups[index], rules.load(self.param_groups[index]["rule"])
        members = _members(group, self._routes[index])
        by_kind: dict[tuple[Any, ...], list[Member]] = {}
        for member in members:
            p, block = member.parameter, member.block
            by_kind.setdefault((block.shape, block.transposed, p.dtype, p.device), []).append(member)
        banks = []
        for (shape, _, dtype, device), same in by_kind.items():
            shapes = dict(rule.state(shape, group))
            if group["rounding"] == "kahan" and dtype != compute_dtype(same[0].parameter):
                shapes["compensation"] = shape
            matrix_bytes = shape[0] * shape[1] * compute_dtype(same[0].parameter).itemsize
            limit = STACK_BYTES.get(device.type, STACK_BYTES["cuda"])
            size = max(1, limit // max(1, matrix_bytes))
            banks += [Bank(same[i : i + size], group, shapes) for i in range(0, len(same), size)]
        for bank in banks:
            bank.bind(self.state)
            if any(self.state[m.parameter]["step"] for m in bank.members):
                bank.watch(all_of=True)
        return banks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all parameters that have gradients.

        Nothing in it waits for the device, whatever `found_inf` holds. With a process group it is a
        collective.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.orthogonalizations = 0
        self._stepped = []
        observe, self._observe = self._observe, False
        if observe:
            self._observation = Observation()
        for index, group in enumerate(self.param_groups):
            active = [p for p in group["params"] if p.grad is not None]
            if not active:
                continue
            with torch.autocast(active[0].device.type, enabled=False):
                if group["rule"] == "adamw":
                    self._step_adamw(index, active, observe)
                else:
                    self._step_matrices(index, observe)
            for parameter in active:
                self.state[parameter]["step"] += 1
            self._stepped += active
        return loss

    def _step_adamw(self, index: int, active: list[Tensor], observe: bool) -> None:
        group = self.param_groups[index]
        settings = adamw.Settings(
            _lr(group), _decay(group), group["betas"], group["eps"], group["eps_form"], _rounding(group)
        )
        names = {id(p): r.name for p, r in zip(group["params"], self._routes[index])}
        adamw.step(
            active,
            [self.state[p] for p in active],
            settings,
            [names[id(p)] for p in active],
            self.found_inf,
        )
        if observe and self.preset_rule == "adamw":
            same: dict[torch.Size, dict[str, Tensor]] = {}
            for parameter, route in zip(group["params"], self._routes[index]):
                for block in route.blocks:
                    moment = block.matrix(self.state[parameter]["moment"])
                    same.setdefault(moment.shape, {})[block.name] = moment
            for moments in same.values():
                self._observation.add(list(moments), torch.stack(list(moments.values())))

    @property
    def preset_rule(self) -> str:
        """The rule of the hidden matrices."""
        return groups.rule_name(self.preset)

    def _step_matrices(self, index: int, observe: bool) -> None:
        group = self.param_groups[index]
        rule = rules.load(group["rule"])
        banks = self._banks_of(index)
        stacks: list[tuple[Bank, list[int], Stack]] = []
        for bank in banks:
            active = [i for i, m in enumerate(bank.members) if m.parameter.grad is not None]
            if active:
                bank.bind(self.state)
                masked = None if self.found_inf is None else self.found_inf.to(bank.device).reshape(()) > 0
                stacks.append((bank, active, bank.stack(active, self.state, masked)))
        for batch in self._batches(stacks):
            for _, _, stack in batch:
                stack.keep_gradient = len(batch) == 1
            updates = rule.step([stack for _, _, stack in batch], self._rows)
            for (bank, active, stack), update in zip(batch, updates):
                self._take(rule, stack, update, observe)
                apply_update(
                    stack,
                    update.delta,
                    _lr(group),
                    _decay(group),
                    group.get("decay_order") == "after",
                    _rounding(group),
                )
                bank.write_back(active, stack.state)
                bank.watch(all_of=bool(stack.due))
                stack.release()

    def _batches(
        self, stacks: list[tuple[Bank, list[int], Stack]]
    ) -> Iterable[list[tuple[Bank, list[int], Stack]]]:
        """One stack at a time, so that one stack's transients are alive; together where they share a
        broadcast."""
        shared = [entry for entry in stacks if entry[2].due] if self._rows.exchanges_bases else []
        if shared:
            yield shared
        yield from ([entry] for entry in stacks if not (shared and entry[2].due))

    def _take(self, rule: rules.Rule, stack: Stack, update: rules.Update, observe: bool) -> None:
        """Book what an update says beside its delta."""
        if update.factor is not None:
            self.orthogonalizations += len(stack.members)
        if update.fallbacks is not None:
            count = update.fallbacks
            if stack.masked is not None:
                count = torch.where(stack.masked, 0, count)
            if self._fallbacks.device != count.device:
                self._fallbacks = self._fallbacks.to(count.device)
            self._fallbacks = self._fallbacks + count
        known = update.singular_values if rule.spectrum_of_state(stack.options) else None
        for position, name in enumerate(stack.names):
            if known is not None:
                self._spectra[name] = known, position
            else:
                self._spectra.pop(name, None)
        if observe:
            moment = stack.state["moment"] if update.moment is None else update.moment
            self._observation.add(stack.names, moment, update.factor, update.singular_values)

    def retract_step(self) -> None:
        """Take back the host's counters of the last step, which `found_inf` masked on the device.

        Call it before the next step, once the host knows. The optimizer is then as if it had never seen the
        step.
        """
        for parameter in self._stepped:
            self.state[parameter]["step"] -= 1
        self._stepped = []
        self._spectra = {}
        self._observation = Observation()

    def observe_moments(self, on: bool = True) -> None:
        """Let the next step compute `moment_figures`."""
        self._observe = on

    def moment_figures(self) -> dict[str, Figures]:
        """Figures of each matrix in the last observed step, as 0-dim fp64 tensors on the device.

        condition_number, effective_rank, stable_rank of what the rule orthogonalized or normalized; where it
        applied a factor also orthogonality_error and polar_error. Empty if that step was retracted.
        """
        return self._observation.figures

    def observation_seconds(self) -> float:
        """What `moment_figures` cost the last observed step, for whoever keeps a budget. Waits for the device."""
        return self._observation.seconds()

    def moment_spectra(self) -> dict[str, Tensor]:
        """Name → singular values of the moment, descending, detached, for every matrix on the rule.

        Of the stored moment (in the subspace for SUMO and GaLore; the first moment for AdamW, hidden matrices
        only). Free where the last step computed them, else from an fp64 Gram.
        """
        found: dict[str, Tensor] = {}
        for index, group in enumerate(self.param_groups):
            if group["rule"] != "adamw":
                for bank in self._banks_of(index):
                    bank.bind(self.state)
                    names = [m.block.name for m in bank.members]
                    if not all(name in self._spectra for name in names):
                        values = singular_values(bank.stacked("moment"))
                        self._spectra.update({name: (values, i) for i, name in enumerate(names)})
                    for name in names:
                        values, i = self._spectra[name]
                        found[name] = values[i].detach().clone()
            elif self.preset_rule == "adamw":
                for parameter, route in zip(group["params"], self._routes[index]):
                    for block in route.blocks:
                        moment = block.matrix(self.state[parameter]["moment"])
                        found[block.name] = singular_values(moment[None])[0]
        return found

    def state_bytes(self) -> dict[str, int]:
        """Kind → bytes of this process' state tensors: "moment", "basis", "second_moment" … of the rule, and
        "aux" for AdamW beside it."""
        beside = self.preset_rule != "adamw"
        total: dict[str, int] = {}
        for group in self.param_groups:
            aux = beside and group["rule"] == "adamw"
            for parameter in group["params"]:
                for kind, size in kind_bytes(self.state[parameter]).items():
                    name = "aux" if aux else kind
                    total[name] = total.get(name, 0) + size
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` gave, bit by bit (torch would cast moments to the weights' dtype).

        Raises:
            ValueError: it was written by another optimizer, preset, model or set of options; says which.
        """
        validate(self, state_dict)
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)
        self._banks = {}
        self._spectra = {}
        self._observation = Observation()
        self._stepped = []
        for index in range(len(self.param_groups)):
            self._allocate(index)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but caches and the process group, which cannot travel."""
        return {
            **super().__getstate__(),
            "state": compact(self.state),
            "preset": self.preset,
            "options": self.options,
            "_routes": self._routes,
            "_modules": None,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(dict(state))
        self._reset_caches(None)


def _members(group: Mapping[str, Any], routes: list[Route]) -> list[Member]:
    pairs = [(p, block) for p, route in zip(group["params"], routes) for block in route.blocks]
    shared = {id(p) for p, route in zip(group["params"], routes) if len(route.blocks) > 1}
    offset, interval = group.get("refresh_offset", 0), group.get("refresh_interval", 1)
    stagger = group.get("refresh_stagger", False)
    return [
        Member(
            p,
            block,
            f"{block.part}." if id(p) in shared else "",
            offset + (position * interval // len(pairs) if stagger else 0),
        )
        for position, (p, block) in enumerate(pairs)
    ]


def _lr(group: Mapping[str, Any]) -> float | Tensor:
    return group["lr"] if group["scheduled"] else group["fixed_lr"]


def _decay(group: Mapping[str, Any]) -> float:
    # torch's get_optimizer_state_dict steps with lr = 0 and trusts that this moves nothing, which a group
    # that keeps its own lr would not honour.
    lr = group["lr"]
    return 0.0 if not group["scheduled"] and isinstance(lr, float) and lr == 0.0 else group["weight_decay"]


def _rounding(group: Mapping[str, Any]) -> Rounding:
    return Rounding(group["rounding"], group["seed"])


class SUMO(Optimizer):
    """SUMO (Refael et al. 2025, arXiv 2505.24749); preset "sumo" unless another of its presets is named."""

    default_preset = "sumo"


class GaLore(Optimizer):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507)."""

    default_preset = "galore"


class Muon(Optimizer):
    """Muon (Jordan et al. 2024); preset "muon" unless another of its presets is named."""

    default_preset = "muon"


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    default_preset = "adamw"


CLASSES: dict[str, type[Optimizer]] = {"sumo": SUMO, "galore": GaLore, "muon": Muon, "adamw": AdamW}
