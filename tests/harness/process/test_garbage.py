"""Cyclic garbage is collected between steps, in the same ones everywhere."""

from __future__ import annotations

import gc
import weakref

import pytest

from harness.process.garbage import EVERY, collected_between_steps, kept_while_importing


class Node:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("has_imported", [False, True])
def test_cycles_wait_for_the_steps_of_all_processes(has_imported: bool) -> None:
    """Those from before the steps are looked at, or left out and looked at again afterwards."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    if has_imported:
        with kept_while_importing():
            kept = [Node() for _ in range(100)]
        assert gc.get_freeze_count() >= len(kept)
    before = gc.get_freeze_count()
    assert gc.isenabled()
    with collected_between_steps() as collect:
        assert not gc.isenabled()
        cycle = weakref.ref(Node())
        for step in range(1, EVERY):
            collect(step)
        assert cycle() is not None
        collect(EVERY)
        assert cycle() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
    if frozen:
        gc.freeze()


def test_the_collector_is_as_before_also_after_an_exception_and_where_it_was_off() -> None:
    with pytest.raises(ValueError, match="x"), collected_between_steps():
        raise ValueError("x")
    assert gc.isenabled()
    gc.disable()
    try:
        with collected_between_steps():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
