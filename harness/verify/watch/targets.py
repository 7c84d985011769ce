"""What a training script hands over: which module, which optimizers, and where whole weights and gradients are.

A target reads; it never writes. Whatever a backend does to the parameters (accelerate's wrappers, DDP, FSDP2's
DTensors, DeepSpeed's partitions), a target gives whole tensors under the names of the unwrapped model. Reading a
sharded tensor is a collective: all ranks read the same names in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from harness.errors import InputError

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

Groups = list[tuple[Mapping[str, Any], list[str]]]
Undo = Callable[[], None]


@dataclass
class Part:
    """One optimizer of a training script, and the parameters that it moves.

    Attributes:
        optimizer: the innermost torch optimizer, whose class and groups say what it claims to do.
        groups: gives its parameter groups at the moment, as (settings, names of the parameters). A backend may have
            replaced the parameters in them by flat tensors; the names are those of the model.
        on_step: attaches two functions, called before and after each update of the weights; returns how to undo it.
        engine: what the backend says about itself: "stage", "offload", "max_norm".
    """

    optimizer: Any
    groups: Callable[[], Groups]
    on_step: Callable[[Callable[[], None], Callable[[], None]], Undo]
    engine: dict[str, Any] = field(default_factory=dict)


class Target:
    """A model and its optimizers, with whole parameters or DTensors: one process, DDP, FSDP2, accelerate.

    Args:
        model: the module, wrapped or not.
        optimizers: torch optimizers, wrapped by accelerate or not.

    Raises:
        InputError: something is no optimizer, or moves no parameter of this model.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        self.module = unwrapped(model)
        self.named: dict[str, nn.Parameter] = {bare(name): p for name, p in model.named_parameters()}
        self.name_of = {id(p): name for name, p in self.named.items()}
        self.parts = [self._part(innermost(optimizer)) for optimizer in optimizers]
        if not any(names for part in self.parts for _, names in part.groups()):
            given = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "no optimizer"
            raise InputError(
                "watch",
                given,
                "moves no parameter of this model",
                allowed="the model and the optimizer that the loop steps, after accelerator.prepare and fully_shard",
            )

    def _part(self, optimizer: Any) -> Part:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(
                "watch",
                type(optimizer).__name__,
                "is not a torch.optim.Optimizer",
                allowed="an optimizer, a list of optimizers, a DeepSpeed engine, or a Trainer alone",
            )

        def groups() -> Groups:
            return [
                (group, [self.name_of[id(p)] for p in group["params"] if id(p) in self.name_of])
                for group in optimizer.param_groups
            ]

        def on_step(before: Callable[[], None], after: Callable[[], None]) -> Undo:
            # A subclass whose `step` calls its parent's runs the hooks of both: only the outer ones are an update.
            depth = 0

            def before_step(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                nonlocal depth
                depth += 1
                if depth > 1:
                    return None
                # torch passes the optimizer itself as the first argument.
                closure = args[1] if len(args) > 1 else kwargs.get("closure")
                if closure is None:
                    before()
                    return None

                def recorded(*given: Any, **named: Any) -> Any:
                    # The closure computes the gradients: they are complete when it returns.
                    loss = closure(*given, **named)
                    before()
                    return loss

                if len(args) > 1:
                    return (args[0], recorded, *args[2:]), kwargs
                return args, {**kwargs, "closure": recorded}

            def after_step(*_: Any) -> None:
                nonlocal depth
                depth -= 1
                if depth == 0:
                    after()

            handles = [
                optimizer.register_step_pre_hook(before_step),
                optimizer.register_step_post_hook(after_step),
            ]

            def undo() -> None:
                for handle in handles:
                    handle.remove()

            return undo

        return Part(optimizer, groups, on_step)

    def weight(self, name: str) -> Tensor:
        """Return a copy of the whole weight, detached, on its device (a collective for DTensors)."""
        return whole(self.named[name])

    def gradient(self, name: str) -> Tensor | None:
        """Return a copy of the whole gradient that the optimizer is about to use; None without one."""
        gradient = self.named[name].grad
        return None if gradient is None else whole(gradient)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        return tuple(self.named[name].shape)

    def state(self, part: Part, name: str) -> dict[str, Tensor]:
        """Return the optimizer's tensors and counters of a parameter, whole, by key (a collective for DTensors)."""
        values = part.optimizer.state.get(self.named[name], {})
        tensors = {key: whole(value) for key, value in values.items() if isinstance(value, Tensor)}
        counters = {key: torch.tensor(value) for key, value in values.items() if isinstance(value, int)}
        return {**counters, **tensors}

    def engine_norm(self) -> float | None:
        """Return the global gradient norm that the backend computed in its last step, where it did."""
        return None

    @property
    def takes_leaf_gradients(self) -> bool:
        """Return True where gradients come from autograd, before any backend reduces or replaces them."""
        return False

    @property
    def compares_leaf_gradients(self) -> bool:
        """Return True where the received gradient should equal the mean over ranks of autograd's."""
        return dist.is_initialized() and dist.get_world_size() > 1 and not self.is_sharded

    @property
    def is_sharded(self) -> bool:
        """Return True if any parameter is a DTensor."""
        return any(isinstance(p, DTensor) for p in self.named.values())

    def shards(self, name: str) -> tuple[int, int]:
        """Return (axis, number of shards) of a parameter that is a DTensor; (0, 1) for a whole one."""
        parameter = self.named[name]
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard):
                    return placement.dim, parameter.device_mesh.size(axis)
        return 0, 1

    def copies(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name, shard, local tensor): tensors of one name and shard must be equal on all ranks."""
        for name, parameter in self.named.items():
            if isinstance(parameter, DTensor):
                at = parameter.device_mesh.get_coordinate() or []
                sharded = [str(at[i]) for i, p in enumerate(parameter.placements) if isinstance(p, Shard)]
                yield name, ",".join(sharded), parameter.to_local().detach()
            else:
                yield name, "", parameter.detach()


class DeepSpeedTarget(Target):
    """A DeepSpeed engine: weights are the fp32 masters, gradients those of autograd, averaged over ranks.

    DeepSpeed's own Muon writes the orthogonalized update into the gradient before `step`, so that what the inner
    optimizer receives is no gradient.

    Args:
        engine: what `deepspeed.initialize` returned first.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        super().__init__(engine.module, [engine.optimizer])

    def _part(self, optimizer: Any) -> Part:
        inner, optimizer = optimizer, self._engine.optimizer

        def groups() -> Groups:
            parameters = _parameters_of_groups(optimizer)
            named = [[self.name_of[id(p)] for p in group if id(p) in self.name_of] for group in parameters]
            return list(zip(inner.param_groups, named))

        def on_step(before: Callable[[], None], after: Callable[[], None]) -> Undo:
            # ZeRO's wrapper is no torch optimizer; DeepSpeed calls its `step` once per update.
            step = optimizer.step

            def recorded(*args: Any, **kwargs: Any) -> Any:
                before()
                result = step(*args, **kwargs)
                if not getattr(optimizer, "overflow", False):
                    after()
                return result

            optimizer.step = recorded

            def undo() -> None:
                del optimizer.step

            return undo

        engine = {
            "stage": self._engine.zero_optimization_stage(),
            "offload": bool(self._engine.zero_use_cpu_optimizer() or self._engine.zero_cpu_offload()),
            "max_norm": self._engine.gradient_clipping() or None,
            "loss_scale": lambda: float(getattr(optimizer, "loss_scale", 1.0) or 1.0),
        }
        return Part(inner, groups, on_step, engine)

    def weight(self, name: str) -> Tensor:
        """Return a copy of the whole fp32 master (a collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.named[name]
        master = safe_get_full_fp32_param(parameter)
        return (parameter if master is None else master).detach().clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole parameter, which ZeRO-3 hides."""
        parameter = self.named[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def state(self, part: Part, name: str) -> dict[str, Tensor]:
        """Return the tensors of an unpartitioned parameter; partitioned state is not read."""
        return super().state(part, name)

    def engine_norm(self) -> float | None:
        """Return DeepSpeed's global norm; its Muon is orthogonalized before it is taken."""
        # The engine itself learns of it only after its optimizer's step.
        norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
        return None if norm is None else float(norm)

    @property
    def takes_leaf_gradients(self) -> bool:
        """Return True: see the class."""
        return True

    @property
    def compares_leaf_gradients(self) -> bool:
        """Return False: they are the only gradients."""
        return False

    def shards(self, name: str) -> tuple[int, int]:
        """Return (0, number of ranks): partitions are intervals of the flattened weight."""
        return 0, dist.get_world_size() if self._engine.zero_optimization_stage() else 1

    def copies(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the working copies of the weights, which ZeRO-3 has none of."""
        return iter(()) if self._engine.zero_optimization_stage() == 3 else super().copies()


def _parameters_of_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """Return the model's parameters of each group of a DeepSpeed optimizer."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        groups: list[list[nn.Parameter]] = [[] for _ in optimizer.optimizer.param_groups]
        for sub_group, parameters in enumerate(optimizer.fp16_groups):
            groups[optimizer.sub_group_to_group_id[sub_group]].extend(parameters)
        return groups
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, attribute):
            return [list(group) for group in getattr(optimizer, attribute)]
    return [list(group["params"]) for group in optimizer.param_groups]


def target_of(model: Any, optimizer: Any) -> Target:
    """Return the target of what a script passed to `watch`.

    Raises:
        InputError: no module, or no optimizer.
    """
    engine = next((each for each in (model, optimizer) if _is_engine(each)), None)
    if engine is not None:
        return DeepSpeedTarget(engine)
    if not isinstance(model, nn.Module):
        raise InputError(
            "watch",
            type(model).__name__,
            "is not a torch.nn.Module",
            allowed="watch(model, optimizer), watch(engine) or watch(trainer)",
        )
    several = isinstance(optimizer, Sequence)
    return Target(model, list(optimizer) if several else [] if optimizer is None else [optimizer])


def _is_engine(value: Any) -> bool:
    """Return True for a DeepSpeed engine, without importing DeepSpeed."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(value).__mro__)


def innermost(optimizer: Any) -> Any:
    """Return the torch optimizer inside the wrappers of accelerate and DeepSpeed."""
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or not hasattr(inner, "param_groups"):
            break
        optimizer = inner
    return optimizer


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DDP and torch.compile."""
    for attribute in ("_orig_mod", "module", "_orig_mod"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            model = inner
    return model


def bare(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name


def whole(tensor: Tensor) -> Tensor:
    """Return a detached copy of a tensor, gathered if it is a DTensor."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()
