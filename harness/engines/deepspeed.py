"""DeepSpeed: whole weights (stage 0), or optimizer state, gradients and weights cut over processes (1, 2, 3).

`deepspeed.initialize` is called directly. Accelerate's plugin for it makes every process on a CPU believe that it
is the only one, and its ``backward`` runs the optimizer, before learning rate and probes are due.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import optimizers
from harness.config import deepspeed_config
from harness.config.schema import RunConfig
from harness.devices import tensor_bytes, uses_cuda
from harness.engines.base import ProcessEngine
from harness.engines.ddp import autocast
from harness.engines.materialize import fill_buffers, fill_whole
from harness.engines.skip_step import SkipStepEngine, set_nonfinite
from harness.errors import InputError
from harness.protocols import Put, WeightLayout, WeightSource
from optimizers.layouts.partitioned import PartitionedLayout
from optimizers.layouts.replicated import ReplicatedLayout


class _DeepSpeedEngine(ProcessEngine):
    """Base of both engines: starts DeepSpeed and undoes what it did to the process."""

    _engine: Any
    _linear: Callable[..., torch.Tensor]
    _was_without_local_rank: bool

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Tell DeepSpeed which micro-batch is the last one, instead of letting it count."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def exposed_communication(self) -> float | None:
        """Return None: DeepSpeed does not measure it."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name, without the prefix of DeepSpeed's wrapper."""
        return {name: p for name, p in self._engine.module.named_parameters() if p.requires_grad}

    def release(self) -> None:
        """Undo what DeepSpeed did to this process; stage 3 replaces torch's linear function for good."""
        self._engine.destroy()
        nn.functional.linear = self._linear
        if self._was_without_local_rank:
            del os.environ["LOCAL_RANK"]

    def _start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        prepare: Callable[[], None] = lambda: None,
    ) -> nn.Module:
        """Initialize DeepSpeed, right after ``prepare``."""
        self._linear = nn.functional.linear
        # DeepSpeed reads it throughout, also in a process that no launcher started.
        self._was_without_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")
        prepare()
        # DeepSpeed casts the whole module to bf16 or fp16, rotary frequencies included.
        with exact_buffers(model):
            self._engine = _initialize(model, optimizer, config)
        return self._engine


class UnpartitionedEngine(_DeepSpeedEngine, SkipStepEngine):
    """Engine `zero0`: DeepSpeed sums the gradients; precision, clipping and skipped steps are ours, as under ddp."""

    layout: WeightLayout = "replicated"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, needs_group=True)
        self._config = config
        self.model: nn.Module

    def process_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.model = self._start(model, optimizer, self._config)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self._config.precision, self.device)

    def backward(self, loss: torch.Tensor) -> None:
        # The loss already carries its weight in the whole batch: no division by the accumulation steps.
        self._engine.backward(self._scaler.scale(loss), scale_wrt_gas=False)

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        yield self._engine.module

    def memory_bytes(self) -> dict[str, int]:
        module = self._engine.module
        return {
            "weights": tensor_bytes([*module.parameters(), *module.buffers()]),
            # DeepSpeed drops them right after the step; they were as large as the trainable weights.
            "gradients": tensor_bytes(self._parameters),
        }

    def parameter_layout(self) -> ReplicatedLayout:
        return ReplicatedLayout(self.process_group())

    def full_weights(self) -> dict[str, torch.Tensor]:
        if self.rank:
            return {}
        return {name: p.detach().float().cpu().clone() for name, p in self._engine.module.named_parameters()}

    def _apply(self) -> None:
        self._engine.step()


class PartitionedEngine(_DeepSpeedEngine):
    """Engines `zero1`, `zero2` and `zero3`: the optimizer works on flat fp32 slices of the parameters.

    DeepSpeed unscales, clips and decides whether a step is skipped, for which the host waits in every step.
    bf16 and fp16 are weights of that dtype with fp32 masters, which start from the exact fp32 initialization.
    """

    layout: WeightLayout = "partitioned"
    _update_loss_scale: Callable[[bool], None]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, needs_group=True)
        _check_precision(config)
        self._config = config
        self._stage = int(config.engine.name[-1])
        self.forward_is_local = self._stage < 3
        self._gradient_bytes = 0
        self.model: nn.Module
        self._zero: Any
        self._layout: PartitionedLayout
        self._weights: WeightSource | None = None

    def process_group(self) -> dist.ProcessGroup | None:
        return None

    def shard(
        self,
        model: nn.Module,
        axes: Mapping[str, int],
        blocks: Sequence[nn.Module],
        weights: WeightSource | None = None,
    ) -> None:
        """Put the whole model on the device in the dtype to compute in; stage 3 leaves it on the meta device."""
        self._weights = weights
        if weights is None:
            model.to(self.device)
        elif self._stage < 3:
            fill_whole(model, weights, self.device, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._config.precision, torch.float32)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weights, self._weights = self._weights, None
        exact = {}
        if self._config.precision != "fp32" and weights is None:
            exact = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
        groups = [list(group["params"]) for group in optimizer.param_groups]

        def partition() -> None:
            if weights is not None and self._stage == 3:
                _partition(model, weights, self._config, self.device, self._dtype)

        self.model = self._start(model, optimizer, self._config, partition)
        self._zero = self._engine.optimizer
        # DeepSpeed raises the loss scale before it divides the gradients by it, so that they come out halved in
        # that step (0.19.8, measured). Ours comes after the step.
        self._update_loss_scale = self._zero._update_scale
        self._zero._update_scale = lambda overflow: None
        self._layout = bind(optimizer, self._engine, groups)
        if self._config.precision != "fp32":
            self._set_masters(weights.deliver if weights is not None else _delivery(exact))

    def autocast(self) -> AbstractContextManager[object]:
        """Do nothing: the weights themselves have the dtype to compute in."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # The loss already carries its weight in the whole batch: no division by the accumulation steps.
        self._engine.backward(loss, scale_wrt_gas=False)

    def force_skip(self, where: torch.Tensor) -> None:
        set_nonfinite(self._gradients(), where)

    def step(self, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert max_norm == self._config.max_grad_norm, "DeepSpeed's clipping bound is set at its start"
        self._gradient_bytes = tensor_bytes(self._gradients())
        self._engine.step()
        skipped = bool(self._zero.overflow)
        self._update_loss_scale(skipped)
        norm = math.nan if skipped else float(self._engine.get_global_grad_norm())
        return self._scalar(norm), self._scalar(float(skipped))

    def undo_step_counters(self) -> None:
        """Do nothing: DeepSpeed does not call the optimizer in a step that it skips."""

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        yield self._engine

    def memory_bytes(self) -> dict[str, int]:
        module, zero = self._engine.module, self._zero
        tensors = [*module.parameters(), *module.buffers()]
        if self._stage == 3:
            tensors += [p.ds_tensor for p in module.parameters()] + list(zero.fp32_partitioned_groups_flat)
        else:
            tensors += list(zero.single_partition_of_fp32_groups)
        return {"weights": tensor_bytes(tensors), "gradients": self._gradient_bytes}

    def parameter_layout(self) -> PartitionedLayout:
        return self._layout

    def sync_from_masters(self) -> None:
        """Compute the low-precision weights from the fp32 masters, as after a step."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        # Small parameters stay whole between steps: given up here, the next forward pass gathers the new ones.
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        for index, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[index].data.copy_(master.data)
            zero._unflatten_partitioned_parameters(index)

    def scaler_state(self) -> dict[str, float]:
        if self._config.precision != "fp16":
            return {}
        scaler = vars(self._zero.loss_scaler)
        return {key: value for key, value in scaler.items() if isinstance(value, bool | int | float)}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Continue from the state of DeepSpeed's scaler, or from the scale alone of torch's."""
        scaler = self._zero.loss_scaler
        if "cur_scale" in state:
            vars(scaler).update({key: value for key, value in state.items() if key in vars(scaler)})
        elif "scale" in state:
            scaler.cur_scale = state["scale"]

    def full_weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[str, torch.Tensor] = {}
        for name, p in self._engine.module.named_parameters():
            # Frozen weights have no masters.
            master = safe_get_full_fp32_param(p) if p.requires_grad else self._frozen(p)
            if self.rank == 0:
                assert master is not None, f"DeepSpeed keeps no fp32 master of {name}"
                whole[name] = master.detach().float().cpu().clone()
        return whole

    def _frozen(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the whole of a frozen weight; under stage 3 gathered from all processes."""
        if self._stage < 3:
            return parameter
        with _library().zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _set_masters(self, deliver: Callable[[Put], None]) -> None:
        """Undo the rounding that DeepSpeed's masters start with: it makes them from the bf16 or fp16 weights."""
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = dict(self._engine.module.named_parameters())

        def put(name: str, value: torch.Tensor) -> None:
            if name in parameters and parameters[name].requires_grad:
                safe_set_full_fp32_param(parameters[name], value.float())

        # The numbers are made a second time: keeping them would be another whole fp32 model on every process.
        deliver(put)

    def _gradients(self) -> Iterable[torch.Tensor]:
        """Yield the tensors that hold gradients right before a step."""
        for p in self._engine.module.parameters():
            for tensor in (p.grad, getattr(p, "grad_accum", None)):
                if tensor is not None:
                    yield tensor
        if self._stage == 3:
            yield self._zero.grad_partitions_flat_buffer
            return
        for group in self._zero.averaged_gradients.values():
            yield from (tensor for tensor in group or () if tensor is not None)

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)


def bind(
    optimizer: torch.optim.Optimizer, engine: Any, groups: Sequence[Sequence[torch.Tensor]]
) -> PartitionedLayout:
    """Let an optimizer that was built on whole parameters find its matrices in DeepSpeed's flat slices.

    Optimizers of torch get the slices as they are: the configuration's checks let only those pass that update
    every element by itself.

    Args:
        optimizer: DeepSpeed's client.
        engine: DeepSpeed's.
        groups: the parameters of each group before DeepSpeed put flat slices in their place.

    Returns:
        How the parameters lie.

    Raises:
        RuntimeError: matrices would be stepped as 1-D slices, or not at all.
    """
    from optimizers.layouts import deepspeed_binding

    if not isinstance(optimizer, optimizers.Optimizer):
        return deepspeed_binding.layout_of(engine, groups)
    deepspeed_binding.attach(optimizer, engine)
    if not optimizer.is_attached:
        raise RuntimeError(f"{type(optimizer).__name__} was not bound to DeepSpeed's slices")
    layout = optimizer.layout
    assert isinstance(layout, PartitionedLayout)
    return layout


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> Any:
    """Return DeepSpeed's engine around a model on its device, over the process group that is already there."""
    deepspeed = _library()
    deepspeed.init_distributed(dist_backend=_backend(), auto_mpi_discovery=False, verbose=False)
    settings = deepspeed_config.effective(config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    assert engine.world_size == config.world_size, "DeepSpeed sees another number of processes"
    return engine


def _partition(
    model: nn.Module, weights: WeightSource, config: RunConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Fill a model on the meta device parameter by parameter, each cut into its ZeRO-3 slices before the next."""
    deepspeed = _library()
    deepspeed.init_distributed(dist_backend=_backend(), auto_mpi_discovery=False, verbose=False)
    settings = deepspeed_config.effective(config)
    fill_buffers(model, device)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def put(name: str, value: torch.Tensor) -> None:
        if name in buffers:
            buffers[name].copy_(value)
            return
        parameter = parameters[name]
        memory = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
        # The same object, which the optimizer was built on.
        torch.utils.swap_tensors(parameter, nn.Parameter(memory, requires_grad=parameter.requires_grad))
        holder = nn.Module()
        holder.register_parameter("weight", parameter)
        deepspeed.zero.Init(module=holder, config_dict_or_path=settings)

    weights.deliver(put)


def _delivery(values: dict[str, torch.Tensor]) -> Callable[[Put], None]:
    """Return a function that hands over tensors as `WeightSource.deliver` does, and drops them."""

    def deliver(put: Put) -> None:
        for name in list(values):
            put(name, values.pop(name))

    return deliver


def _backend() -> str:
    return "nccl" if uses_cuda() else "gloo"


def _library() -> Any:
    """Import DeepSpeed and return it."""
    # It decides at its first import which device to use.
    on_cpu = not uses_cuda()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    if on_cpu:
        # Else DeepSpeed compiles an all-reduce over shared memory (50 s with g++), which only inference uses.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
    # It warns of every optimizer that it does not know, and says again what our record says of skipped steps.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def exact_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what the enclosed code does to the dtype and the values of the model's floating-point buffers."""
    kept = {
        name: buffer.detach().clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()
    }
    yield
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.data = kept[name].to(buffer.device)


def _check_precision(config: RunConfig) -> None:
    accelerator = _library().get_accelerator()
    if config.precision == "fp16" and not accelerator.is_fp16_supported():
        reason = f"is not supported by DeepSpeed on this {accelerator.device_name()}"
        raise InputError("precision", "fp16", reason, fix="precision=bf16, or engine=fsdp2")
