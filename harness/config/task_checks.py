"""Checks of the task's keys that need no data, and the steps of a run that is given in epochs. Torch-free."""

from __future__ import annotations

import math

from harness.config.model_facts import router_coefficient
from harness.config.schema import RunConfig, TaskConfig
from harness.errors import InputError

_CLASSIFY, _ANSWER = (
    ("text", "label", "labels", "target"),
    ("prompt", "answer", "shots", "truncate", "extract"),
)
KEYS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "classify": (*_CLASSIFY, "metric"),
    "answer": (*_ANSWER, "metric", "max_new_tokens", "stop", "generate", "generation_batch_size"),
}
"""Task → its keys below `task`, apart from the name."""


def check(config: RunConfig) -> None:
    """Refuse keys of another task, and a task without the keys that it needs.

    Raises:
        InputError: naming the key below task, or eval.tokens.
    """
    task = config.task
    for key, field in TaskConfig.model_fields.items():
        value = getattr(task, key)
        if key == "name" or key in KEYS[task.name] or value == field.get_default(call_default_factory=True):
            continue
        owner = next(name for name, keys in KEYS.items() if key in keys)
        reason = f"is for task={owner}, and this run has task={task.name}"
        raise InputError(f"task.{key}", value, reason, fix=f"task={owner}, or leave out task.{key}")
    if task.name == "classify":
        if not task.text:
            raise _required("text", task.name, "task.text=[sentence], or task.text=[premise,hypothesis]")
        if task.label is None:
            raise _required("label", task.name, "task.label=label")
        if router_coefficient(config.model):
            reason = "asks for the routers' loss, which a classifier does not compute"
            key = "model.config.output_router_logits"
            raise InputError(key, True, reason, fix=f"{key}=false")
        if task.labels is not None and len(set(task.labels)) < len(task.labels):
            twice = next(label for label in task.labels if task.labels.count(label) > 1)
            raise InputError("task.labels", twice, "is given twice", fix="each class once")
        if task.labels is not None and task.target == "number":
            raise InputError(
                "task.labels", task.labels, "is for classes, and task.target=number", fix="task.labels=null"
            )
    if task.name == "answer":
        for key in ("prompt", "answer"):
            if getattr(task, key) is None:
                raise _required(key, task.name, f'task.{key}="{{column}}"')
        if "" in task.stop:
            reason = "holds an empty text, which would end every answer at its start"
            raise InputError("task.stop", '""', reason, fix=r'e.g. task.stop=["\n\n"]')
    if task.name != "pretrain" and config.eval.tokens != "auto":
        reason = f"is for task=pretrain: evaluations of task={task.name} read every validation example"
        raise InputError("eval.tokens", config.eval.tokens, reason, fix="eval.tokens=auto")


def _required(key: str, task: str, example: str) -> InputError:
    return InputError(f"task.{key}", "null", f"is required with task={task}", fix=f"e.g. {example}")


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """Return the steps in which a run reads its examples ``epochs`` times: ceil(epochs × examples / batch_size)."""
    # The small term keeps a whole number of steps from being rounded up.
    return max(1, math.ceil(epochs * examples / batch_size - 1e-9))
