"""Collect cyclic garbage in the same steps on all processes. Torch-free.

Python's collector runs whenever a process has allocated enough. A full collection looks at all objects: 0.2 s of CPU
with torch, transformers and DeepSpeed loaded (measured), in which all other processes wait for this one. Here it runs
between two steps, the same ones on all processes, and leaves out what was imported, or else what was there before
training.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 50
"""Steps between two collections. A step's tensors are freed by their reference counts and never wait for one."""


@contextmanager
def kept_while_importing() -> Iterator[None]:
    """Turn the collector off for a block of imports, and leave what they made out of later collections.

    It would look at all objects again and again while they become more: an eighth of the time of importing torch and
    transformers.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Turn the automatic collector off for a block; yields what to call after each step, with the number of steps done.

    After the block the collector is as it was.
    """

    def after_step(step: int) -> None:
        if step % EVERY == 0:
            gc.collect()

    was_enabled = gc.isenabled()
    gc.collect()
    # Where imports are left out already (`kept_while_importing`), what is left is quickly looked at.
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    gc.disable()
    try:
        yield after_step
    finally:
        if freezes:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
