"""Step buckets one after the other, while the gradients of the next one and the updates of the last one travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.profiler import record_function

from optimizers.interfaces import Collectives, MatrixBatch, Update
from optimizers.layouts.apply import ApplyConfig
from optimizers.layouts.batches import BatchEntry, OptimizerState
from optimizers.layouts.layout import Bucket, run_updates
from optimizers.rule import Rule
from optimizers.skipping import StepMask

Record = Callable[[Rule, MatrixBatch, Update, Collectives], Any]


def step_buckets(
    rule: str,
    buckets: Sequence[Bucket],
    state: OptimizerState,
    mask: StepMask,
    config: ApplyConfig,
    record: Record,
) -> None:
    """Step all buckets; all processes start the same collectives in the same order.

    Args:
        rule: name of the rule, for the profiler.
        buckets: of the unit.
        state: of the optimizer.
        mask: what skips the step.
        config: how updates reach the weights.
        record: called with each update before it is applied.
    """
    if buckets:
        buckets[0].begin()
    previous: Bucket | None = None
    for position, bucket in enumerate(buckets):
        for number, entries in enumerate(bucket.batches(state, mask)):
            if number == 0 and position + 1 < len(buckets):
                # The next bucket's gradients travel while this one computes.
                buckets[position + 1].begin()
            with record_function(f"{rule}/rule"):
                _step_batches(bucket, entries, config, record)
        if position + 1 < len(buckets):
            # Again, for a process that owns nothing in this bucket; otherwise it does nothing.
            buckets[position + 1].begin()
        bucket.send()
        if previous is not None:
            # Its updates travelled while this bucket was computed.
            previous.end(config)
        previous = bucket
    if previous is not None:
        previous.end(config)


def _step_batches(bucket: Bucket, entries: list[BatchEntry], config: ApplyConfig, record: Record) -> None:
    # A function of its own, so that nothing of these batches is held while the next ones are computed.
    entry_of = {id(entry.batch): entry for entry in entries}
    for batch, update in run_updates(bucket.rule, [entry.batch for entry in entries], bucket.collectives):
        record(bucket.rule, batch, update, bucket.collectives)
        with record_function(f"{batch.options['rule']}/apply"):
            bucket.apply(batch, update.delta, config)
        entry_of[id(batch)].finish()
