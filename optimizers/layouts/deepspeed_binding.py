"""Where DeepSpeed's ZeRO optimizers put parameters: the only module here that knows DeepSpeed.

Read off the objects after `deepspeed.initialize` (version 0.19): ZeRO-1 and 2 lay the parameters of a group end
to end, with padding, and give each rank an equal interval of that; ZeRO-3 cuts each parameter into equal
intervals and lays those of a rank end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from torch import Tensor

from optimizers.layouts.communicator import Communicator
from optimizers.layouts.partitioned import Flat, PartitionedLayout, Slot


class PartitionedOptimizer(Protocol):
    """What `attach` needs of an optimizer: `optimizers.Optimizer` has it."""

    @property
    def parameters_of_groups(self) -> list[list[Tensor]]:
        """Return the parameters of each group as they were given."""
        ...

    def attach(self, layout: PartitionedLayout) -> None:
        """Step the partitions of `layout` from now on; allocate their state."""
        ...


def attach(optimizer: PartitionedOptimizer, engine: Any) -> None:
    """Let `optimizer` step the partitions of a DeepSpeed engine; allocates its state.

    Args:
        optimizer: built with ``layout="partitioned"`` over the model's whole parameters, and given to
            `deepspeed.initialize` as client optimizer.
        engine: what that returned.

    Raises:
        ValueError: a ZeRO setting whose layout is not known here; says which.
    """
    optimizer.attach(layout_of(engine, optimizer.parameters_of_groups))


def layout_of(engine: Any, parameters: Sequence[Sequence[Tensor]]) -> PartitionedLayout:
    """Return how the parameters of a DeepSpeed engine are partitioned.

    Args:
        engine: what `deepspeed.initialize` returned.
        parameters: group by group, as its client optimizer had them.

    Raises:
        ValueError: a ZeRO setting whose layout is not known here; says which.
    """
    zero = engine.optimizer
    kind = type(zero).__name__
    ranks: dict[int, Communicator] = {}

    def ranks_of(group: Any) -> Communicator:
        return ranks.setdefault(id(group), Communicator(group))

    if kind == "DeepSpeedZeroOptimizer":
        groups = zero.real_dp_process_group
        flats = [
            _stage_2(zero, i, ranks_of(groups[i])) for i in range(len(zero.single_partition_of_fp32_groups))
        ]
        communicators = [ranks_of(groups[i]) for i in range(len(flats))]
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        _refuse_stage_3(zero)
        flats = [_stage_3(zero, j) for j in range(len(zero.fp32_partitioned_groups_flat))]
        communicators = [ranks_of(zero.dp_process_group)] * len(flats)
    else:
        raise ValueError(
            f"{kind}: its layout is not known; known: ZeRO-1, 2 and 3 without fp32 accumulation in bf16"
        )
    return PartitionedLayout(flats, parameters, communicators)


def _stage_2(zero: Any, index: int, ranks: Communicator) -> Flat:
    tensor = zero.single_partition_of_fp32_groups[index]
    size = tensor.numel()
    slots: dict[Tensor, Slot] = {}
    offsets = zero.round_robin_bit16_offsets[index]
    for parameter, offset in zip(zero.round_robin_bit16_groups[index], offsets):
        pieces = tuple(
            (_within(rank * size - offset, parameter), _within((rank + 1) * size - offset, parameter))
            for rank in range(ranks.size)
        )
        slots[parameter] = Slot(pieces, offset + pieces[ranks.rank][0] - ranks.rank * size)
    return Flat(tensor, index, slots)


def _within(element: int, parameter: Tensor) -> int:
    return min(max(element, 0), parameter.numel())


def _refuse_stage_3(zero: Any) -> None:
    settings: Mapping[str, Any] = {
        "zero_hpz_partition_size": getattr(zero, "zero_hpz_partition_size", 1) not in (None, 0, 1),
        "offload to NVMe": getattr(zero, "swap_optimizer", False)
        or getattr(zero, "params_in_nvme_and_cpu", False),
    }
    for name, is_set in settings.items():
        if is_set:
            raise ValueError(f"{name}: its layout is not known here")


def _stage_3(zero: Any, index: int) -> Flat:
    parameters = zero.fp16_groups[index]
    sizes = [p.ds_tensor.numel() for p in parameters]
    world = zero.partition_count
    slots = {
        p: Slot(tuple(_third(rank, size, p.ds_numel) for rank in range(world)), at)
        for p, size, at in zip(parameters, sizes, accumulate(sizes, initial=0))
    }
    return Flat(zero.fp32_partitioned_groups_flat[index], zero.sub_group_to_group_id[index], slots)


def _third(rank: int, size: int, total: int) -> tuple[int, int]:
    return min(rank * size, total), min((rank + 1) * size, total)
