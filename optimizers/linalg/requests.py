"""What an algorithm yields where a number has to cross ranks, and the drivers that answer it.

An algorithm on matrices that may be split over ranks is a generator: it yields a request and is sent the answer. Which
requests it yields, and how many, depends on shapes and options only, never on the data, so that ranks stay in step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optimizers.linalg.robust import robust_eigh

T = TypeVar("T")


class AllReduce(NamedTuple):
    """Sum a tensor over the ranks; answered by the sum.

    Attributes:
        tensor: this rank's summand, any shape.
        partial: False: the tensor is complete already and is its own answer.
    """

    tensor: Tensor
    partial: bool = True


class AllGather(NamedTuple):
    """Collect a tensor of each rank; answered by (W, …) in the order of the shards."""

    tensor: Tensor


class Eigh(NamedTuple):
    """Decompose complete Gram matrices (b, k, k); answered by eigenvalues (b, k), ascending, and vectors (b, k, k).

    One rank computes them for all: a replicated eigenbasis may differ between machines.
    """

    gram: Tensor


def drive(steps: Generator[Any, Any, T], answer: Callable[[Any], Any]) -> T:
    """Run a generator to its end and return its result; `answer` maps each request to the reply."""
    reply: Any = None
    while True:
        try:
            request = steps.send(reply)
        except StopIteration as end:
            return end.value
        reply = answer(request)


def answer_alone(request: AllReduce | AllGather | Eigh) -> Any:
    """Answer a request where no other rank holds anything."""
    if isinstance(request, AllReduce):
        return request.tensor
    if isinstance(request, AllGather):
        return request.tensor[None]
    if request.gram.device.type == "meta":
        return torch.empty_like(request.gram[..., 0]), torch.empty_like(request.gram)
    return robust_eigh(request.gram)[:2]
