"""Give an optimizer to an engine as its user would, and take steps: torch's wrappers and DeepSpeed, nothing of ours.

Every `AuditedRun` keeps the gradients that the optimizer uses and the weights that it makes, as this rank holds them,
and puts whole tensors together once, at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import optimizers
from harness.engines import deepspeed as deepspeed_engine
from harness.verify.audit.cells import MAX_NORM, EngineCell
from harness.verify.audit.given_model import Given, GivenModel, share
from harness.verify.audit.oracle import seed
from harness.verify.audit.targets import Target
from optimizers.layouts.partitioned import PartitionedLayout
from optimizers.shard_axes import possible_axis

Whole = dict[str, Tensor]
Parts = dict[str, Tensor]
"""Name → what this rank holds of a tensor, fp32."""


class AuditedRun:
    """A model and an optimizer on one process without an engine; base of the engines.

    Args:
        cell: what to run.
        target: the optimizer.
        data: weights and gradients of the model.

    Attributes:
        received: of each step, what the optimizer got as gradients.
        made: of each step, the weights after it.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, cell: EngineCell, target: Target, data: Given) -> None:
        self.cell, self.target, self.data = cell, target, data
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.received: list[Parts] = []
        self.made: list[Parts] = []
        dtype = torch.bfloat16 if cell.dtype == "bf16_pure" else torch.float32
        self.module = GivenModel(data.start, dtype)
        for parameter in self.module.parameters():
            parameter.requires_grad_(not target.freezes(parameter))
        self.named = dict(self.module.named_parameters())
        self.set_up()

    def set_up(self) -> None:
        """Wrap the model and build the optimizer."""
        self.optimizer = self.target.build(list(self.named.items()), self.module)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimizer steps."""
        return {name: p for name, p in self.named.items() if p.requires_grad}

    def train_step(self, step: int) -> None:
        """Compute gradients over all micro-batches, clip them, and step.

        Args:
            step: from 0.
        """
        parts = self.cell.world_size * self.cell.accumulation
        for micro in range(self.cell.accumulation):
            part = self.rank * self.cell.accumulation + micro
            gradients = share(self.data, step, part, parts)
            self.backward(gradients, is_last=micro + 1 == self.cell.accumulation)
        self.clip()
        seed(step)
        self.received.append({})
        self.apply()
        self.made.append(self.weights())

    def backward(self, gradients: Mapping[str, Tensor], *, is_last: bool) -> None:
        """Add up the gradients of one micro-batch."""
        (self.module(gradients) / self.cell.accumulation).backward()

    def clip(self) -> None:
        """Clip the mean gradient."""
        if self.cell.is_clipped:
            torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), MAX_NORM)

    def apply(self) -> None:
        """Step the optimizer, clear the gradients."""
        self.received[-1] = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> Parts:
        """Return what this rank holds of the gradients in `.grad`."""
        return {name: _part(p.grad) for name, p in self.trainable.items() if p.grad is not None}

    def weights(self) -> Parts:
        """Return what this rank holds of the trainable weights."""
        return {name: _part(p) for name, p in self.trainable.items()}

    def whole(self, steps: Sequence[Parts]) -> list[Whole]:
        """Put whole tensors together on every rank (a collective where they are divided)."""
        return list(steps)

    def _summed(self, steps: Sequence[Parts], slices: Mapping[str, tuple[slice, ...] | None]) -> list[Whole]:
        """Put parts in their places and sum over the ranks, in one collective.

        Args:
            steps: of each step, the parts of this rank; the same names on all ranks.
            slices: name → place of its part; None: another rank speaks for it.
        """
        wholes: list[Whole] = []
        for parts in steps:
            whole = {name: torch.zeros(self.data.start[name].shape) for name in parts}
            for name, part in parts.items():
                place = slices[name]
                if place is not None:
                    target = whole[name].view(-1) if part.ndim == 1 else whole[name]
                    target[place] = part
            wholes.append(whole)
        flat = _joined(tensor for whole in wholes for tensor in whole.values())
        dist.all_reduce(flat)
        sizes = [tensor.numel() for whole in wholes for tensor in whole.values()]
        pieces = iter(flat.split(sizes))
        return [{name: next(pieces).view(tensor.shape) for name, tensor in whole.items()} for whole in wholes]

    def replica(self) -> tuple[Tensor, str] | None:
        """Return the working weights that other ranks hold, too, in one vector, and which replica of what this is.

        None: no rank holds a copy of another's.
        """
        return None

    def close(self) -> None:
        """Give back what the engine took."""


class ReplicatedRun(AuditedRun):
    """DistributedDataParallel; "split": with torch's ZeroRedundancyOptimizer, or our own work split for presets."""

    def set_up(self) -> None:
        self.model = nn.parallel.DistributedDataParallel(self.module)
        target, named = self.target, list(self.named.items())
        if target.is_preset:
            work = "split" if self.cell.splits_work else "replicated"
            self.optimizer = optimizers.build(
                target.name,
                named,
                modules=self.module,
                process_group=dist.group.WORLD,
                work=work,
                **target.arguments,
            )
        elif self.cell.splits_work:
            if target.form in ("model", "named"):
                raise NotSupported("ZeroRedundancyOptimizer passes parameters only")
            self.optimizer = ZeroRedundancyOptimizer(
                target.parameters(named),
                optimizer_class=cast(Any, target.load()),
                **target.arguments,
            )
        else:
            super().set_up()

    def backward(self, gradients: Mapping[str, Tensor], *, is_last: bool) -> None:
        with nullcontext() if is_last else self.model.no_sync():
            (self.model(gradients) / self.cell.accumulation).backward()

    def replica(self) -> tuple[Tensor, str] | None:
        return _joined(self.named.values()), "weights"


class ShardedRun(AuditedRun):
    """`fully_shard`: the optimizer gets DTensors. Over all processes, or with two replicas (hsdp)."""

    def set_up(self) -> None:
        if self.cell.engine == "hsdp":
            shape, names = (2, self.cell.world_size // 2), ("replicate", "shard")
        else:
            shape, names = (self.cell.world_size,), ("shard",)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        shards = shape[-1]
        self._replica = self.rank // shards
        half = torch.bfloat16 if self.cell.dtype == "bf16" else None
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None),
            # torch refuses uneven shards along axis 1.
            "shard_placement_fn": lambda p: Shard(possible_axis(self.cell.axis, p.shape, shards)),
        }
        fully_shard(cast(nn.Module, self.module.block), **options)
        fully_shard(self.module, reshard_after_forward=False, **options)
        self.named = dict(self.module.named_parameters())
        super().set_up()

    def backward(self, gradients: Mapping[str, Tensor], *, is_last: bool) -> None:
        cast(FSDPModule, self.module).set_requires_gradient_sync(is_last)
        super().backward(gradients, is_last=is_last)

    def whole(self, steps: Sequence[Parts]) -> list[Whole]:
        slices: dict[str, tuple[slice, ...] | None] = {}
        for name, p in self.trainable.items():
            tensor = cast(DTensor, p)
            shape, offset = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            own = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape))
            # Replicas hold the same: the first one speaks.
            slices[name] = None if self._replica else own
        return self._summed(steps, slices)

    def replica(self) -> tuple[Tensor, str] | None:
        if self.cell.engine != "hsdp":
            return None
        shards = self.cell.world_size // 2
        return _joined(self.made[-1].values()), f"shard {self.rank % shards}"


class DeepSpeedRun(AuditedRun):
    """`deepspeed.initialize` with a client optimizer: whole parameters (stage 0), or flat slices (stages 1, 2, 3)."""

    def set_up(self) -> None:
        deepspeed = deepspeed_engine._library()
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        self.stage = int(self.cell.engine[-1])
        self._linear = nn.functional.linear
        target, named = self.target, list(self.named.items())
        if target.is_preset:
            self.optimizer = optimizers.build(
                target.name,
                named,
                modules=self.module,
                process_group=None if self.stage else dist.group.WORLD,
                layout="partitioned" if self.stage else None,
                **target.arguments,
            )
        else:
            super().set_up()
        groups = [list(group["params"]) for group in self.optimizer.param_groups]
        self.engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=_settings(self.cell, self.stage)
        )
        self._layout: PartitionedLayout | None = None
        if self.stage:
            self._layout = deepspeed_engine.bind(self.optimizer, self.engine, groups)
            # ZeRO builds a new Adagrad, whose state begins with its construction, and steps that one.
            self.optimizer = self.engine.optimizer.optimizer
        step = self.optimizer.step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.received[-1] |= self.gradients()
            return step(*args, **kwargs)

        # DeepSpeed steps the optimizer itself, so that nobody else sees the gradients.
        self.optimizer.step = recorded  # pyright: ignore[reportAttributeAccessIssue]

    def backward(self, gradients: Mapping[str, Tensor], *, is_last: bool) -> None:
        self.engine.backward(self.engine(gradients))
        if not is_last:
            self.engine.step()

    def clip(self) -> None:
        """Do nothing: DeepSpeed clips."""

    def apply(self) -> None:
        self.engine.step()

    def gradients(self) -> Parts:
        layout = self._layout
        if layout is None:
            return super().gradients()
        # DeepSpeed steps one flat tensor after the other.
        now = {id(flat) for group in self.optimizer.param_groups for flat in group["params"]}
        named = {name: p for name, p in self.trainable.items() if id(layout.flat_of(p)) in now}
        gradients = {name: layout.gradient(p) for name, p in named.items()}
        return {name: _part(gradient) for name, gradient in gradients.items() if gradient is not None}

    def weights(self) -> Parts:
        layout = self._layout
        if layout is None:
            return super().weights()
        return {name: _part(layout.weight(p)) for name, p in self.trainable.items()}

    def whole(self, steps: Sequence[Parts]) -> list[Whole]:
        layout = self._layout
        if layout is None:
            return super().whole(steps)
        sizes = {name: layout.weight(p).numel() for name, p in self.trainable.items()}
        starts = {name: layout.interval(p)[1] for name, p in self.trainable.items()}
        return self._summed(
            steps, {name: (slice(start, start + sizes[name]),) for name, start in starts.items()}
        )

    def replica(self) -> tuple[Tensor, str] | None:
        if self.stage == 3:
            return None
        return _joined(self.engine.module.parameters()), "weights"

    def close(self) -> None:
        # It takes every entry of the optimizer's state for a dictionary; training has ended, so that is no verdict.
        with contextlib.suppress(Exception):
            self.engine.destroy()
        # Stage 3 replaces torch's linear function for good.
        nn.functional.linear = self._linear


class NotSupported(Exception):
    """An engine that cannot take this optimizer; the message says why."""


def start(cell: EngineCell, target: Target, data: Given) -> AuditedRun:
    """Build the model and the optimizer of a cell on its engine (a collective).

    Raises:
        Exception: whatever the optimizer or the engine raises.
    """
    if cell.engine == "single":
        return AuditedRun(cell, target, data)
    if cell.engine == "ddp":
        return ReplicatedRun(cell, target, data)
    if cell.is_sharded:
        return ShardedRun(cell, target, data)
    return DeepSpeedRun(cell, target, data)


def _settings(cell: EngineCell, stage: int) -> dict[str, Any]:
    half = cell.dtype == "bf16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": cell.accumulation,
        # Left out, it is 1.0 (0.19.8).
        "gradient_clipping": MAX_NORM if cell.is_clipped else 0.0,
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000,
    }


def _part(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).to(torch.float32, copy=True)


def _joined(tensors: Any) -> Tensor:
    parts = [tensor.detach().float().reshape(-1) for tensor in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


@contextlib.contextmanager
def running(cell: EngineCell, target: Target, data: Given) -> Iterator[AuditedRun]:
    """Start a cell for a block and give back what it took."""
    run = start(cell, target, data)
    try:
        yield run
    finally:
        run.close()
