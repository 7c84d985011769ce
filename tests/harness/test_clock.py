"""The clock on a GPU: no wait before a read, and no more events than the device has still to pass."""

from __future__ import annotations

import pytest
import torch

from harness.profiling import Clock

STEPS, MICRO_BATCHES = 1000, 64


class FakeDevice:
    """A stream that takes events; the host is a number of parts ahead of it."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.made = self.recorded = self.waits = 0

    def event(self, *, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        self.made += 1
        return FakeEvent(self)

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1
        self.ahead = 0


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._at = device, -1

    def record(self) -> None:
        self._at = self._device.recorded
        self._device.recorded += 1

    def query(self) -> bool:
        return self._at < self._device.recorded - self._device.ahead

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query(), "would raise: not completed"
        return float(end._at - self._at)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice(ahead=2 * (2 + 2 * MICRO_BATCHES))
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    return fake


def test_events_are_used_again_and_every_part_is_counted(device: FakeDevice) -> None:
    clock = Clock(torch.device("cuda", 0))
    for _ in range(STEPS):
        with clock.part("step"):
            for _ in range(MICRO_BATCHES):
                with clock.part("forward"):
                    pass
    assert device.waits == 0
    # Two steps that the device has still to do, and one pair.
    assert device.made <= 2 * (2 + 2 * MICRO_BATCHES) + 4
    seconds = clock.read()
    assert device.waits == 1
    # A forward part is one tick of the fake stream, the step around it all of their ticks.
    assert seconds["forward"] == pytest.approx(STEPS * MICRO_BATCHES * 1e-3)
    assert seconds["step"] == pytest.approx(STEPS * (2 * MICRO_BATCHES + 1) * 1e-3)
    with clock.part("forward"):
        pass
    assert clock.read()["forward"] == pytest.approx(1e-3)


def test_a_host_that_is_further_ahead_makes_more_events_and_does_not_wait(device: FakeDevice) -> None:
    device.ahead = 10**9
    clock = Clock(torch.device("cuda", 0))
    for _ in range(100):
        with clock.part("forward"):
            pass
    assert (device.made, device.waits) == (200, 0)
    assert clock.read()["forward"] == pytest.approx(0.1)
