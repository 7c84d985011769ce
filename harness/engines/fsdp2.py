"""Sharded weights: torch's `fully_shard`, over all processes or inside of replicas, on CPUs and GPUs alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from harness.config.engine_checks import reduces_every_micro_batch
from harness.config.schema import RunConfig
from harness.devices import tensor_bytes
from harness.engines.materialize import fill_shards
from harness.engines.skip_step import SkipStepEngine, root_sum_square
from harness.protocols import WeightLayout, WeightSource
from optimizers.layouts.sharded import ShardedLayout
from optimizers.shard_axes import possible_axis


class ShardedEngine(SkipStepEngine):
    """Engines `fsdp2` and `hsdp`: parameters, gradients and optimizer state are DTensors, cut along one axis.

    Every decoder layer is a group of its own; embeddings, head and last norm are the root's. bf16 and fp16
    compute in that dtype on gathered copies; shards stay fp32 and gradients are reduced in fp32.

    Not Accelerate's FSDP plugin: on CPUs it silently becomes DDP.
    """

    layout: WeightLayout = "sharded"
    forward_is_local = False

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, needs_group=True)
        kind = self.device.type
        if config.engine.name == "hsdp":
            assert config.engine.replicas is not None
            shape = (config.engine.replicas, self.world_size // config.engine.replicas)
            self._mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        else:
            self._mesh = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("shard",))
        self._shard_group = self._mesh.get_group("shard")
        self.shards = self._mesh["shard"].size()
        self._reshard = config.engine.reshard_after_forward
        self._reduces_each = reduces_every_micro_batch(config)
        compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        # bf16_pure has bf16 weights; their gradients, too, are summed over the processes in fp32.
        reduce = torch.float32 if compute or config.precision == "bf16_pure" else None
        self._policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
        self.model: nn.Module
        self._named: dict[str, nn.Parameter] = {}

    def process_group(self) -> dist.ProcessGroup | None:
        return None

    def shard(
        self,
        model: nn.Module,
        axes: Mapping[str, int],
        blocks: Sequence[nn.Module],
        weights: WeightSource | None = None,
    ) -> None:
        """Turn the parameters of ``model`` into DTensors, in place (a collective); then fill them."""
        if weights is None:
            model.to(self.device)
        # torch refuses uneven shards along axis 1: what does not divide is cut along axis 0.
        by_parameter = {
            id(p): possible_axis(axes.get(name, 0), p.shape, self.shards)
            for name, p in model.named_parameters()
        }

        def placement(parameter: nn.Parameter) -> Shard:
            return Shard(by_parameter[id(parameter)])

        options: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": self._policy,
            "shard_placement_fn": placement,
        }
        for block in blocks:
            fully_shard(block, reshard_after_forward=self._reshard, **options)
        # The root's weights are the first ones that the backward pass needs again.
        fully_shard(model, reshard_after_forward=False, **options)
        if weights is not None:
            fill_shards(model, weights, self.device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self._optimizer = optimizer
        # Kept, because between a forward and the next backward pass the module shows gathered copies instead.
        self._named = dict(model.named_parameters())
        self._parameters = [p for p in self._named.values() if p.requires_grad]

    def autocast(self) -> AbstractContextManager[object]:
        """Do nothing: `fully_shard` gathers the weights in the dtype to compute in."""
        return nullcontext()

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Reduce the gradients of every micro-batch into fp32 shards, or add whole fp32 ones up until the last.

        Between replicas only the last micro-batch communicates.
        """
        model = cast(FSDPModule, self.model)
        if not self._reduces_each:
            model.set_requires_gradient_sync(last)
        elif self.name == "hsdp":
            # Until then torch keeps the shards' sums of this replica, in the dtype of the reduction.
            model.set_requires_all_reduce(last)
        return nullcontext()

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        try:
            yield self.model
        finally:
            # No backward pass will give gathered weights back: the root's, and with reshard_after_forward=false
            # those of all blocks. A later forward pass would not see that the shards were overwritten.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def exposed_communication(self) -> float | None:
        return None

    def memory_bytes(self) -> dict[str, int]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return {
            "weights": tensor_bytes([*self._named.values(), *self.model.buffers()]),
            "gradients": tensor_bytes(gradients),
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._named.items() if p.requires_grad}

    def parameter_layout(self) -> ShardedLayout:
        return ShardedLayout(list(self.named_parameters().items()))

    def full_weights(self) -> dict[str, torch.Tensor]:
        whole: dict[str, torch.Tensor] = {}
        for name, p in self._named.items():
            gathered = cast(DTensor, p.detach()).full_tensor()
            if self.rank == 0:
                whole[name] = gathered.float().cpu().clone()
        return whole

    def _local_gradients(self) -> list[torch.Tensor]:
        return [cast(DTensor, p.grad).to_local() for p in self._parameters if p.grad is not None]

    def _total_norm(self, local: torch.Tensor) -> torch.Tensor:
        # Replicas hold equal gradients: only the shards of one add up.
        return root_sum_square(local, self._shard_group)
