"""Leases: of many that want one, one gets it; an abandoned one is taken over, once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

from harness.jobs import leases

_CONTEXT = multiprocessing.get_context("fork")
PROCESSES = 8


def _racer(
    path: Path, name: str, start: Barrier, take: Callable[..., bool], won: multiprocessing.Queue[str]
) -> None:
    start.wait()
    if take(path, name):
        won.put(name)


def _race(path: Path, take: Callable[..., bool] = leases.take) -> list[str]:
    """Who of `PROCESSES` processes got the lease."""
    start, won = _CONTEXT.Barrier(PROCESSES), _CONTEXT.Queue()
    racers = [
        _CONTEXT.Process(target=_racer, args=(path, f"{n}", start, take, won)) for n in range(PROCESSES)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    time.sleep(0.05)  # the queue's feeder threads
    return [won.get() for _ in range(won.qsize())]


def _abandon(path: Path) -> None:
    old = time.time() - 2 * leases.FRESH_S
    os.utime(path, (old, old))


def test_one_of_many_gets_a_free_lease(tmp_path: Path) -> None:
    for attempt in range(10):
        path = tmp_path / f"{attempt}.lease"
        assert len(winners := _race(path)) == 1
        assert (held := leases.holder(path)) is not None
        assert held.job == winners[0]


def test_one_of_many_takes_an_abandoned_one_over(tmp_path: Path) -> None:
    for attempt in range(10):
        path = tmp_path / f"{attempt}.lease"
        assert leases.take(path, "before")
        _abandon(path)
        assert len(winners := _race(path)) == 1
        assert (held := leases.holder(path)) is not None
        assert held.job == winners[0]
    assert {entry.suffix for entry in tmp_path.iterdir()} == {".lease"}, "marks were left behind"


def _careless(path: Path, job: str) -> bool:
    """The obvious protocol: look, then write."""
    if leases.age_s(path) < leases.FRESH_S:
        return False
    time.sleep(0.01)
    path.write_text(job)
    return True


def test_looking_and_then_writing_gives_it_to_several(tmp_path: Path) -> None:
    # Negative control: the race is one.
    assert max(len(_race(tmp_path / f"{attempt}.lease", _careless)) for attempt in range(10)) > 1


def test_a_fresh_lease_is_left_alone_and_ones_own_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    assert leases.take(path, "12")
    assert not leases.take(path, "13")
    assert leases.take(path, "12"), "a job that was queued again"
    _abandon(path)
    assert leases.take(path, "12")
    assert leases.age_s(path) < 5, "taken again, it is fresh"
    assert not leases.take(path, "13")


def test_the_lease_of_a_job_that_is_gone_need_not_grow_old(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    assert leases.take(path, "12")
    assert not leases.take(path, "13", lambda job: job != "12")
    assert leases.take(path, "13", lambda job: job == "12")


def test_a_damaged_lease_stands_in_the_way_until_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    path.write_text("{")
    assert not leases.take(path, "12")
    _abandon(path)
    assert leases.take(path, "12")
