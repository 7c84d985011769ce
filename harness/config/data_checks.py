"""Checks of the data's keys against its source and the task, before any file is read. Torch-free."""

from __future__ import annotations

from harness.config.schema import DataConfig, RunConfig
from harness.errors import InputError

ROW_SOURCES = ("jsonl", "json", "csv", "tsv", "parquet", "datasets")
"""Values of ``data.source`` whose rows have named columns."""
_FOR_DELIMITED = ("columns", "quotes")
_FOR_EXAMPLES = ("validation_files", "validation_split")
_FOR_PRETRAINING = {
    "field": "task.text=[COLUMN] or task.prompt names the columns",
    "max_tokens": "leave out data.max_tokens: every example is read",
    "mode": "leave out data.mode: examples are padded to the longest of their batch",
    "validation_tokens": "leave out data.validation_tokens: the validation data are a file or split of their own",
}
"""Key → what to do instead where a task has examples."""


def check(config: RunConfig) -> None:
    """Refuse keys that the source or the task does not use, and a task with examples without two splits.

    Raises:
        InputError: naming the key below data.
    """
    data, task = config.data, config.task.name
    if data.source not in ("csv", "tsv"):
        for key in _FOR_DELIMITED:
            if _is_set(data, key):
                reason = f"is for data.source=csv and tsv, and data.source={data.source}"
                raise InputError(f"data.{key}", getattr(data, key), reason, fix=f"leave out data.{key}")
    _check_columns(data)
    _check_canaries(config)
    if task == "pretrain":
        for key in _FOR_EXAMPLES:
            if _is_set(data, key):
                reason = (
                    "is for tasks with examples: pretraining sets data.validation_tokens of its text aside"
                )
                fix = f"leave out data.{key}, or task=classify or task=answer"
                raise InputError(f"data.{key}", getattr(data, key), reason, fix=fix)
        return
    check_splits(data)
    for key, instead in _FOR_PRETRAINING.items():
        if _is_set(data, key):
            reason = f"is for task=pretrain, and this run has task={task}"
            raise InputError(f"data.{key}", getattr(data, key), reason, fix=instead)


def check_splits(data: DataConfig) -> None:
    """Refuse data whose rows have no columns, and data without a training and a validation split.

    Raises:
        InputError: naming the key below data.
    """
    if data.source not in ROW_SOURCES:
        raise InputError(
            "data.source",
            data.source,
            "holds text, not examples",
            allowed=ROW_SOURCES,
            fix="data=jsonl data.files=[FILE] data.validation_files=[FILE], or another source with columns",
        )
    if data.source == "datasets":
        if data.validation_split is None:
            raise InputError(
                "data.validation_split",
                None,
                f"names no split of {data.dataset} to evaluate on",
                fix="data.validation_split=validation",
            )
        if data.validation_split == data.split:
            reason = "is the split that is trained on (data.split)"
            raise InputError(
                "data.validation_split", data.split, reason, fix="data.validation_split=validation"
            )
        return
    for key, purpose in (("files", "train"), ("validation_files", "evaluate")):
        if not getattr(data, key):
            fix = f"data.{key}=[FILE.{data.source}]"
            raise InputError(f"data.{key}", "[]", f"names no file to {purpose} on", fix=fix)


def _check_columns(data: DataConfig) -> None:
    names = data.columns
    if names is None:
        return
    if not names:
        fix = "data.columns=null, where the files have a header"
        raise InputError("data.columns", "[]", "names no column", fix=fix)
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise InputError("data.columns", double, "is given twice", fix="a name of its own for each column")


def _check_canaries(config: RunConfig) -> None:
    canaries, key = config.data.canaries, "data.canaries.count"
    if not canaries.count:
        if _is_set(config.data, "canaries"):
            raise InputError(key, 0, "inserts no canaries, and their other keys are set", fix=f"{key}=24")
        return
    if config.task.name != "pretrain":
        reason = f"is for task=pretrain, and this run has task={config.task.name}"
        raise InputError(key, canaries.count, reason, fix=f"leave out {key}")
    if config.data.mode == "padded":
        reason = "needs data.mode=packed: padded rows lose the ends of documents, and canaries with them"
        raise InputError(key, canaries.count, reason, fix="data.mode=packed")
    if len(set(canaries.copies)) < len(canaries.copies):
        fix = f"data.canaries.copies={sorted(set(canaries.copies))}".replace(" ", "")
        raise InputError("data.canaries.copies", canaries.copies, "names a number twice", fix=fix)
    if canaries.count < len(canaries.copies):
        reason = f"is less than one for each of the {len(canaries.copies)} data.canaries.copies"
        raise InputError(key, canaries.count, reason, fix=f"{key}={8 * len(canaries.copies)}")


def _is_set(data: DataConfig, key: str) -> bool:
    return getattr(data, key) != DataConfig.model_fields[key].get_default(call_default_factory=True)
