"""One rank of a run on meta tensors: the model, the optimizer as the engine lays it out, bytes held and bytes sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import optimizers
from harness import model
from harness.config import deepspeed_config
from harness.config.engine_checks import reduces_every_micro_batch
from harness.config.model_facts import facts, full_config
from harness.config.model_keys import config_fields
from harness.config.schema import ModelConfig, Precision, RunConfig
from harness.model import ClassificationHead, decoder_layers
from harness.optimizer import shard_axes
from harness.plan.op_counter import OpCounter
from optimizers.layouts.layout import Layout
from optimizers.layouts.simulated import SimulatedReplicas, SimulatedShards, simulated_slices
from optimizers.optimizer import Optimizer
from optimizers.shard_axes import possible_axis

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class PlannedRank:
    """A simulated rank.

    Attributes:
        network: the unsharded model on the meta device.
        optimizer: with the state that this rank would hold.
        shards: number of ranks that together hold one replica of the weights.
    """

    network: nn.Module
    optimizer: Optimizer
    shards: int


def layer_count(config: ModelConfig) -> int | None:
    """Return the number of decoder layers, or None if the model type does not tell it."""
    return facts(config).layers


def with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """Return the configuration of the same model with another number of decoder layers and no folder of weights."""
    fields = config_fields(config.model_type) or {}
    values = dict(config.config)
    kind = config.model_type
    if config.path is not None:
        complete = full_config(config)
        kind = str(complete.pop("model_type", kind))
        fields = config_fields(kind) or {}
        values = {name: value for name, value in complete.items() if name in fields and value is not None}
    names = [name for name in _DEPTHS if name in values] or [name for name in _DEPTHS if name in fields][:1]
    # Per-layer lists (attention kinds) are as long as the depth; without them the class makes its own.
    values = {name: value for name, value in values.items() if not (name == "layer_types" and names)}
    return config.model_copy(
        update={"path": None, "model_type": kind, "config": {**values, **dict.fromkeys(names, layers)}}
    )


def planned_head(config: RunConfig) -> ClassificationHead | None:
    """Return a head of the size of the run's; two classes stand for those that only the data tells."""
    if config.task.name != "classify":
        return None
    classes = None if config.task.target == "number" else tuple(config.task.labels or ("0", "1"))
    pad_id = full_config(config.model).get("pad_token_id")
    return ClassificationHead(classes, pad_id=pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0)


def build_model(
    config: ModelConfig,
    precision: Precision,
    *,
    trust_remote_code: bool = False,
    head: ClassificationHead | None = None,
) -> nn.Module:
    """Build the model on the meta device.

    Args:
        config: of the model.
        precision: of the run.
        trust_remote_code: run Python code that the model's folder brings along.
        head: of a classifier (`planned_head`).

    Raises:
        InputError: the model refuses its configuration.
    """
    return model.build(
        config, seed=0, precision=precision, device="meta", trust_remote_code=trust_remote_code, head=head
    )


def simulate(config: RunConfig, network: nn.Module, rank: int) -> PlannedRank:
    """Lay out the optimizer of one rank over a model on the meta device.

    Args:
        config: checked; its optimizer is one of ours.
        network: unsharded model on the meta device; ranks may share it, because each sets its own gradients.
        rank: number of the rank.
    """
    assert config.world_size is not None
    pairs = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    built = optimizers.build(
        config.optimizer.name,
        pairs,
        modules=network,
        layout="partitioned",
        lr=config.optimizer.lr,
        **config.optimizer.options,
    )
    assert isinstance(built, Optimizer)
    shards = shards_of(config)
    built.attach(_layout(config, built, network, rank, shards))
    if config.engine.name not in ZERO_STAGES:
        # As in a run, whose loop has checked the gradients: the optimizer sends nothing to find out.
        built.found_inf = torch.zeros((), device="meta")
    return PlannedRank(network, built, shards)


def shards_of(config: RunConfig) -> int:
    """Return the number of ranks that together hold one replica of the optimizer's state."""
    assert config.world_size is not None
    name = config.engine.name
    if name == "hsdp":
        return config.world_size // (config.engine.replicas or 1)
    return config.world_size if name == "fsdp2" or name in ZERO_STAGES else 1


def _layout(config: RunConfig, built: Optimizer, network: nn.Module, rank: int, shards: int) -> Layout:
    assert config.world_size is not None
    name = config.engine.name
    if name in ZERO_STAGES:
        layout = simulated_slices(built.parameters_of_groups, ZERO_STAGES[name], rank, shards)
        for group, tensor in zip(built.param_groups, layout.tensors):
            group["params"] = [tensor]
        return layout
    if name in ("fsdp2", "hsdp"):
        axes = shard_axes(config, network, shards)
        by_id = {id(p): possible_axis(axes.get(n, 0), p.shape, shards) for n, p in network.named_parameters()}
        return SimulatedShards(by_id, rank % shards, shards)
    return SimulatedReplicas(config.engine.optimizer_work, rank, config.world_size)


def sampled_ranks(config: RunConfig) -> Sequence[int]:
    """Return the ranks to simulate: all of a small world, else the first two, the middle and the last.

    If every rank does the same, rank 0 is enough. Owners are assigned from rank 0 on, so it owns most.
    """
    assert config.world_size is not None
    world = config.world_size
    if shards_of(config) == 1 and config.engine.optimizer_work == "replicated":
        return [0]
    return range(world) if world <= 8 else sorted({0, 1, world // 2, world - 1})


def held_bytes(config: RunConfig, planned: PlannedRank) -> dict[str, int]:
    """Return kind → bytes that this rank holds between two steps: weights, gradients, optimizer state by kind.

    Frozen weights have neither gradients nor state, and under ZeRO no masters. Under ZeRO, weights and gradients are
    what DeepSpeed keeps: for a model in half precision, 16-bit copies next to fp32 masters.
    """
    optimizer, layout = planned.optimizer, planned.optimizer.layout
    parameters = [p for group in optimizer.parameters_of_groups for p in group]
    local = sum(layout.weight(p).numel() for p in parameters)
    whole = sum(p.numel() for p in parameters)
    width = parameters[0].element_size()
    name = config.engine.name
    frozen = [p for p in planned.network.parameters() if not p.requires_grad]
    held = {"weights": local * width, "gradients": local * width}
    if name not in ZERO_STAGES:
        held["weights"] += sum(layout.weight(p).numel() for p in frozen) * width
    accumulates = config.batch_size > (config.micro_batch_size or 1) * (config.world_size or 1)
    if name in ("fsdp2", "hsdp") and accumulates and not reduces_every_micro_batch(config):
        # Whole fp32 gradients add up until the last micro-batch.
        held["gradients"] = whole * 4
    if name in ZERO_STAGES:
        half = config.precision in ("bf16", "fp16")
        copies = whole if name != "zero3" else local
        held["weights"] = copies * (2 if half else 4) + local * 4
        # Stage 3 cuts every parameter by itself, and rounds up.
        shards = planned.shards if name == "zero3" else 1
        held["weights"] += sum(-(-p.numel() // shards) for p in frozen) * (2 if half else 4)
        # Stages 2 and 3 add bf16 micro-batches up in fp32 (`deepspeed_config.effective`).
        gradient_width = 2 if half and (name == "zero1" or config.precision == "fp16") else 4
        held["gradients"] = (whole if name == "zero1" else local) * gradient_width
        if name == "zero3":
            held["weights"] += _persistent_elements(config, planned) * (2 if half else 4)
    held.update({f"optimizer/{kind}": size for kind, size in optimizer.state_bytes().items()})
    return held


def _persistent_elements(config: RunConfig, planned: PlannedRank) -> int:
    """Return the elements of small parameters, which stay whole under ZeRO-3 after their first use."""
    # 100,000 by default (DeepSpeed 0.19.8, runtime/zero/config.py).
    given = deepspeed_config.effective(config)["zero_optimization"].get(
        "stage3_param_persistence_threshold", 1e5
    )
    threshold = 1e5 if given == "auto" else float(given)
    return sum(p.numel() for p in planned.network.parameters() if p.numel() <= threshold)


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step costs on one rank, counted by running the optimizer's own code.

    Attributes:
        sent: bytes, by the ring convention (docs/layouts.md).
        workspace: bytes that are alive at the peak of the step and not before it; kernels' own are not seen.
        moved: bytes that operators read and write in device memory.
        flops: number format ("fp64", "fp32", "bf16") → FLOPs of products and decompositions.
    """

    sent: float
    workspace: int
    moved: float
    flops: dict[str, float]


def optimizer_steps(planned: PlannedRank) -> tuple[StepCost, StepCost]:
    """Return the costs of a step that refreshes every subspace, and of an ordinary one."""
    _set_gradients(planned)
    return _optimizer_step(planned), _optimizer_step(planned)


def _optimizer_step(planned: PlannedRank) -> StepCost:
    before = sum(planned.optimizer.bytes_sent().values())
    with OpCounter() as counted:
        planned.optimizer.step()
    sent = sum(planned.optimizer.bytes_sent().values()) - before
    # AdamW is one kernel (`_set_gradients` leaves it out): weight and two moments are read and written, the gradient
    # is read.
    elementwise = 7 * 4 * _adamw_elements(planned)
    flops = {_FORMATS.get(dtype, "fp32"): count for dtype, count in counted.flops.items()}
    return StepCost(sent, counted.peak, counted.moved + elementwise, flops)


def probe_workspace(planned: PlannedRank) -> int:
    """Return the bytes of a probe of the moments: fp64 copies of the largest matrix, its Gram and eigenvectors."""
    matrices = {route.name for route in planned.optimizer.routes if route.rule != "adamw"}
    shapes = [tuple(p.shape[-2:]) for name, p in planned.network.named_parameters() if name in matrices]
    return max((2 * 8 * m * n + 4 * 8 * min(m, n) ** 2 for m, n in shapes), default=0)


_FORMATS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _adamw_elements(planned: PlannedRank) -> int:
    adamw = {route.name for route in planned.optimizer.routes if route.rule == "adamw"}
    layout = planned.optimizer.layout
    return sum(layout.weight(p).numel() for name, p in planned.network.named_parameters() if name in adamw)


def engine_traffic(config: RunConfig, planned: PlannedRank) -> dict[str, float]:
    """Return the bytes of weights and gradients that the engine sends in a step on this rank, by formula."""
    assert config.world_size is not None
    assert config.micro_batch_size is not None
    name, world, shards = config.engine.name, config.world_size, planned.shards
    whole = sum(p.numel() for p in planned.network.parameters())
    trained = sum(p.numel() for p in planned.network.parameters() if p.requires_grad)
    width = 2 if config.precision in ("bf16", "fp16", "bf16_pure") else 4
    micro_batches = max(1, config.batch_size // (config.micro_batch_size * world))
    around = (shards - 1) / shards
    if name in ("fsdp2", "hsdp"):
        # Layers are gathered for the forward and, if given back, again for the backward pass of every micro-batch;
        # what belongs to the root stays in between.
        layers = sum(p.numel() for layer in decoder_layers(planned.network) for p in layer.parameters())
        times = 2 if config.engine.reshard_after_forward else 1
        gathered = micro_batches * (times * layers + whole - layers) * width * around
        reductions = micro_batches if reduces_every_micro_batch(config) else 1
        reduced = reductions * trained * 4 * around
        if name == "hsdp" and config.engine.replicas:
            replicas = config.engine.replicas
            reduced += 2 * trained * 4 / shards * (replicas - 1) / replicas
        return {"weights": gathered, "gradients": reduced}
    if name in ZERO_STAGES:
        gathered = 2 * micro_batches * whole if name == "zero3" else trained
        # ZeRO-2 and 3 reduce every micro-batch, ZeRO-1 once.
        reductions = 1 if name == "zero1" else micro_batches
        return {"weights": gathered * width * around, "gradients": reductions * trained * width * around}
    copies = 2 if config.precision == "bf16_pure" else 4
    return {"weights": 0.0, "gradients": 2 * trained * copies * (world - 1) / world}


def _set_gradients(planned: PlannedRank) -> None:
    """Give only the matrices gradients, so that a step sends what a real one sends; AdamW sends nothing."""
    matrices = {r.name for r in planned.optimizer.routes if r.rule != "adamw"}
    for name, p in planned.network.named_parameters():
        p.grad = torch.empty_like(p) if name in matrices else None
    for group in planned.optimizer.param_groups:
        if group["rule"] == "adamw":
            for tensor in group["params"]:
                tensor.grad = None
