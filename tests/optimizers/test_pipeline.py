"""Buckets are computed while the next one's gradients and the last one's updates travel."""

from __future__ import annotations

from typing import Any

import pytest

from optimizers.layouts.apply import ApplyConfig
from optimizers.layouts.pipeline import step_buckets
from optimizers.rounding import Rounding
from optimizers.skipping import StepMask

CONFIG = ApplyConfig(0.1, 0.0, False, Rounding("nearest"))


class Noted:
    """A bucket that notes what is called; each of its batches is empty."""

    rule: Any = None
    collectives: Any = None

    def __init__(self, name: str, batches: int, calls: list[str]) -> None:
        self.name, self.count, self.calls = name, batches, calls

    def begin(self) -> None:
        if f"begin {self.name}" not in self.calls:
            self.calls.append(f"begin {self.name}")

    def batches(self, state: Any, mask: Any) -> Any:
        for _ in range(self.count):
            yield []
            self.calls.append(f"compute {self.name}")

    def send(self) -> None:
        self.calls.append(f"send {self.name}")

    def end(self, config: ApplyConfig) -> None:
        assert config is CONFIG
        self.calls.append(f"end {self.name}")


def calls_of(*batches: int) -> list[str]:
    calls: list[str] = []
    buckets: list[Any] = [Noted(str(i), count, calls) for i, count in enumerate(batches)]
    step_buckets("muon", buckets, {}, StepMask(), CONFIG, lambda *_: None)
    return calls


def test_gradients_of_the_next_and_updates_of_the_last_travel_while_a_bucket_is_computed() -> None:
    assert calls_of(1, 1, 1) == [
        *("begin 0", "begin 1", "compute 0", "send 0"),
        *("begin 2", "compute 1", "send 1", "end 0"),
        *("compute 2", "send 2", "end 1", "end 2"),
    ]


@pytest.mark.parametrize("owned", [(2, 0, 1), (0, 0, 0), (0, 3, 0)])
def test_collectives_have_one_order_whatever_a_process_owns(owned: tuple[int, ...]) -> None:
    def collectives(calls: list[str]) -> list[str]:
        return [call for call in calls if not call.startswith("compute")]

    assert collectives(calls_of(*owned)) == collectives(calls_of(1, 1, 1))


def test_no_bucket_is_no_step() -> None:
    assert calls_of() == []
