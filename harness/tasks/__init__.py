"""What a run learns, behind one interface: pretraining, classification, answers. Importing it imports no torch."""

from __future__ import annotations

from typing import Any

from harness.config.schema import RunConfig
from harness.tasks.task import Task

__all__ = ["Task", "task_of"]


def task_of(config: RunConfig) -> Task[Any]:
    """Return the task of a run."""
    if config.task.name == "pretrain":
        from harness.tasks.pretrain import Pretrain

        return Pretrain()
    if config.task.name == "classify":
        from harness.tasks.classify import Classify

        return Classify()
    from harness.tasks.answer import Answer

    return Answer()
