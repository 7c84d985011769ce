"""What tests let rank processes do."""

from __future__ import annotations

import os
import time

import torch.distributed as dist


def share(value: int) -> tuple[int, float]:
    """(rank, sum over ranks of value·(rank + 1))."""
    import torch

    total = torch.tensor(float(value * (dist.get_rank() + 1)))
    dist.all_reduce(total)
    return dist.get_rank(), float(total)


def raise_everywhere() -> None:
    """An exception on every rank."""
    raise ValueError("wrong everywhere")


def raise_on_one() -> None:
    """An exception on rank 1, for which rank 0 waits in a collective."""
    if dist.get_rank() == 1:
        raise ValueError("wrong on one")
    dist.barrier()


def die_on_one() -> None:
    """Rank 1 ends without a word."""
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang_on_one() -> None:
    """Rank 1 sleeps."""
    if dist.get_rank() == 1:
        time.sleep(300)


def spin_for_ever() -> None:
    """Each rank computes without end and notices nothing."""
    while True:
        pass


def read_environment() -> dict[str, str]:
    """Where the rank thinks it is."""
    return {
        "cwd": os.getcwd(),
        "cuda": os.environ["CUDA_VISIBLE_DEVICES"],
        "threads": os.environ["OMP_NUM_THREADS"],
    }
