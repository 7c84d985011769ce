"""How a process joins its group on a GPU, with torch's and Accelerate's answers stood in for."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from harness.config import checks, compose
from harness.engines import base
from harness.errors import InputError


class State:
    """Accelerate's state of one process, which notes what it was made with."""

    made_with: ClassVar[dict[str, Any]] = {}
    process_index, num_processes, device = 0, 1, torch.device("cpu")

    def __init__(self, **options: Any) -> None:
        State.made_with = options


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One GPU; returns what happens, in order."""
    events: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: events.append(f"cuda:{index} is current"))
    monkeypatch.setattr(base, "PartialState", lambda **options: (events.append("group"), State(**options))[1])
    return events


def _start(*words: str) -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        base.ProcessEngine(checks.check(compose.load(["world_size=1", *words]), {}, 1))
        State.made_with["fp32 products"] = torch.get_float32_matmul_precision()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_the_gpu_is_taken_before_the_group_and_bound_to_it(order: list[str]) -> None:
    _start()
    assert order == ["cuda:0 is current", "group"]
    assert State.made_with["device_id"] == torch.device("cuda", 0)
    assert not State.made_with["cpu"]


@pytest.mark.parametrize(
    ("words", "other", "said"),
    [
        (["engine=ddp"], ["engine=fsdp2"], "engine.name: ddp was chosen on rank 0, and fsdp2 on rank 1"),
        (
            ["micro_batch_size=4"],
            ["micro_batch_size=2"],
            "micro_batch_size: 4 was chosen on rank 0, and 2 on rank 1",
        ),
        ([], [], None),
    ],
)
def test_processes_that_chose_differently_are_refused(
    words: list[str], other: list[str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks whose machines differ, asked one after the other: the gather is stood in for."""
    told: list[Any] = []

    def gather(everyone: list[Any], mine: Any) -> None:
        told.append(mine)
        everyone[:] = [*told, *told][:2]

    monkeypatch.setattr(base.dist, "all_gather_object", gather)
    first, second = (
        checks.check(compose.load(["world_size=2", "batch_size=8", *keys]), {}, 0) for keys in (words, other)
    )
    base._require_same_choices(first, 2)
    if said is None:
        base._require_same_choices(second, 2)
        return
    with pytest.raises(InputError, match=said):
        base._require_same_choices(second, 2)


def test_the_cpu_is_taken_where_the_environment_asks_for_it(
    order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    _start()
    assert order == ["group"]
    assert State.made_with["cpu"]
    assert "device_id" not in State.made_with


@pytest.mark.parametrize(("tf32", "expected"), [("true", "high"), ("false", "highest")])
def test_the_key_tf32_decides_the_products_of_fp32(order: list[str], tf32: str, expected: str) -> None:
    _start("precision=fp32", f"tf32={tf32}")
    assert State.made_with["fp32 products"] == expected


def test_nothing_is_connected_where_gpus_are_short(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process needs one GPU"):
        _start()
    assert order == []
