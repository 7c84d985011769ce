"""The one protocol through which the harness asks an optimizer, and the adapter for optimizers of other packages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import optimizers
from harness.tracked_optimizer import ForeignOptimizer, tracked


def stepped(kind: Callable[..., torch.optim.Optimizer], **options: object) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = kind([weight], lr=0.1, **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def test_our_optimizers_are_tracked_as_they_are() -> None:
    optimizer = optimizers.SUMO([nn.Parameter(torch.ones(8, 8))], rank=2)
    assert tracked(optimizer) is optimizer
    assert tracked(optimizer).reads_found_inf
    assert tracked(optimizer).observes_moments


def test_the_adapter_answers_for_any_torch_optimizer() -> None:
    adapter = tracked(stepped(torch.optim.SGD, momentum=0.9))
    assert isinstance(adapter, ForeignOptimizer)
    assert list(adapter.routes) == []
    assert adapter.state_bytes() == {"momentum_buffer": 64}
    assert adapter.moment_figures() == {}
    assert (adapter.collective_calls(), adapter.bytes_sent(), int(adapter.fallbacks)) == (0, {}, 0)
    adapter.add_fallbacks(3)
    adapter.retract_step()


@pytest.mark.parametrize(("fused", "expected"), [(True, True), (False, False)])
def test_found_inf_is_read_where_torch_s_amp_protocol_is_followed(fused: bool, expected: bool) -> None:
    assert tracked(stepped(torch.optim.AdamW, fused=fused)).reads_found_inf is expected


def test_an_optimizer_that_can_retract_a_step_is_asked_to() -> None:
    class Counting(torch.optim.SGD):
        retracted = 0

        def retract_step(self) -> None:
            self.retracted += 1

    optimizer = stepped(Counting)
    tracked(optimizer).retract_step()
    assert isinstance(optimizer, Counting)
    assert optimizer.retracted == 1
