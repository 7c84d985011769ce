"""Reading one step ahead: the samples of every step, errors, the end, and the order of streams on CUDA."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import micro_batches
from harness.data.micro_batches import MicroBatchLoader

BATCH, MICRO, WORLD, STEPS = 8, 2, 2, 4


class _Samples:
    """Sample n is a row of n; notes what was read, and in which thread."""

    length = 100

    def __init__(self) -> None:
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.broken_from = 10**6

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        if first >= self.broken_from:
            raise OSError("tokens.bin was cut short")
        self.read.append(first)
        self.threads.add(threading.current_thread().name)
        rows = np.repeat(np.arange(first, first + count, dtype=np.int64)[:, None], 3, axis=1)
        return rows, rows + 1

    def loss_tokens(self, first: int, count: int) -> int:
        self.threads.add(threading.current_thread().name)
        return sum(range(first, first + count))

    def tokens(self, first: int, count: int) -> int:
        return 3 * count


def _loader(samples: Any, rank: int = 0, device: str = "cpu") -> MicroBatchLoader:
    sizes = {"batch_size": BATCH, "micro_batch_size": MICRO, "world_size": WORLD, "steps": STEPS}
    return MicroBatchLoader(samples, rank=rank, device=torch.device(device), **sizes)


def _numbers(batches: list[Any]) -> list[list[int]]:
    return [ids[:, 0].tolist() for ids, _ in batches]


def _expected(step: int, rank: int) -> list[list[int]]:
    first = step * BATCH + rank * BATCH // WORLD
    return [[first, first + 1], [first + 2, first + 3]]


@pytest.mark.parametrize("rank", [0, 1])
def test_steps_in_order_after_a_jump_and_again(rank: int) -> None:
    samples = _Samples()
    loader = _loader(samples, rank)
    # In order; a resume that jumps; a step twice, as for a warm-up.
    for step in (0, 1, 3, 3, 0, 1, 2, 3):
        batches = loader.micro_batches(step)
        assert _numbers(batches) == _expected(step, rank)
        assert all(torch.equal(labels, ids + 1) for ids, labels in batches)
        assert loader.loss_tokens(step) == sum(range(step * BATCH, (step + 1) * BATCH))
    loader.close()
    # One thread reads and counts everything, and no step after the last is read.
    assert samples.threads == {"data_0"}
    assert max(samples.read) < STEPS * BATCH


def test_the_next_step_is_read_while_this_one_computes() -> None:
    samples = _Samples()
    loader = _loader(samples)
    loader.micro_batches(0)
    # Closing waits for what is being read; nobody asked for step 1.
    loader._thread.submit(lambda: None).result()
    assert samples.read == [0, 2, BATCH, BATCH + 2]
    loader.micro_batches(1)
    loader.close()
    assert samples.read[:4] == [0, 2, BATCH, BATCH + 2]
    assert BATCH not in samples.read[4:]


def test_an_error_while_reading_ahead_is_raised_by_its_own_step() -> None:
    samples = _Samples()
    samples.broken_from = BATCH
    loader = _loader(samples)
    assert _numbers(loader.micro_batches(0)) == _expected(0, 0)
    with pytest.raises(OSError, match="cut short"):
        loader.micro_batches(1)
    # Control: what was read ahead and failed does not count against another step.
    assert _numbers(loader.micro_batches(0)) == _expected(0, 0)
    loader.close()


def test_the_end_leaves_no_thread() -> None:
    loader = _loader(_Samples())
    loader.micro_batches(0)
    loader.close()
    assert not any(thread.is_alive() for thread in loader._thread._threads)


def test_on_cuda_the_step_waits_for_the_copy_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class _Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(f"enter {self.name}")

        def __exit__(self, *_: object) -> None:
            log.append(f"leave {self.name}")

        def record_event(self) -> str:
            log.append(f"record on {self.name}")
            return "copied"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    tensor = SimpleNamespace(record_stream=lambda stream: log.append(f"kept for {stream.name}"))

    def copy(rows: object, device: torch.device) -> Any:
        log.append("copy")
        return tensor, tensor

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream("main"))
    monkeypatch.setattr(micro_batches, "to_device", copy)
    loader = _loader(_Samples(), device="cuda")
    loader.micro_batches(STEPS - 1)
    loader.close()
    copies = ["enter side", "copy", "copy", "record on side", "leave side"]
    assert log == [*copies, "main waits for copied", *["kept for main"] * 4]
