"""What tasks with examples have in common: metric, sizes, and what is said of the data. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.tasks import metrics

if TYPE_CHECKING:
    from harness.tasks.examples import Examples


def metric_of(config: RunConfig, data: Examples) -> str:
    """Return the metric of the run: the one that was asked for, else by the labels."""
    name = config.task.metric or metrics.default_metric(config.task.name, data.labels)
    assert name is not None
    return name


def metrics_of(config: RunConfig, data: Examples) -> list[str]:
    """Return all metrics of the run's kind of answer, the run's own first."""
    own = metric_of(config, data)
    kind = metrics.METRICS[own].kind
    return [own, *(name for name, metric in metrics.METRICS.items() if metric.kind == kind and name != own)]


def references_of(data: Examples) -> list[str]:
    """Return the reference of every validation example."""
    return [data.validation.reference(index) for index in range(len(data.validation))]


def context_length(data: Examples) -> float:
    """Return the length of the example that a token is in, on average over training tokens: Σ length² / Σ length."""
    lengths = data.train.lengths
    return float((lengths**2).sum() / lengths.sum())


def check(config: RunConfig, data: Examples) -> None:
    """Refuse a batch larger than an epoch, and a metric that the validation examples leave undefined.

    Raises:
        InputError: naming batch_size or task.metric.
    """
    examples = len(data.train)
    if config.batch_size > examples:
        reason = f"is larger than the data ({examples} training examples)"
        raise InputError(
            "batch_size",
            config.batch_size,
            reason,
            allowed=f"1 to {examples}",
            fix=f"batch_size={examples}",
        )
    metrics.check_defined(config.task.name, metric_of(config, data), references_of(data), data.labels)


def facts(data: Examples) -> dict[str, Any]:
    """Return what `summary.json` says of examples."""
    return {
        "labels": None if data.labels is None else list(data.labels),
        "examples": {
            "train": len(data.train),
            "validation": len(data.validation),
            "rows": {split: data.facts[split] for split in ("train", "validation")},
        },
        "train_tokens_available": int(data.train.lengths.sum()),
        "unigram_entropy": None,
    }


def describe(config: RunConfig, data: Examples) -> str:
    """Return the number of examples, what was truncated, and the metric in one line."""
    parts = [
        f"{len(split):,} {name} examples of up to {int(split.lengths.max())} tokens"
        for name, split in (("training", data.train), ("validation", data.validation))
    ]
    return f"data {data.sha256[:12]}: {', '.join(parts)}; metric {metric_of(config, data)}"
