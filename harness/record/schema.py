"""The run folder: its files, and the one table of metric keys (the same in metrics.jsonl and in W&B).

    runs/<group>/<name>/
        config.yaml          resolved configuration
        config.diff.yaml     what differs from the defaults
        environment.json     versions, the device of each process, GPUs and topology of rank 0's machine, git commit,
                             corpus and tokenizer hashes
        parameters.json      list of {name, shape, numel, rule, reason}: which parameter took which rule
        deepspeed.json       with engine=zero…: what DeepSpeed was initialized with
        metrics.jsonl        one JSON object a row (keys below), one row per `log_every` steps, first and last step;
                             a value that is not finite is null
        metrics.superseded.jsonl   rows of steps that a later attempt did again; before each group a line
                             {"attempt", "goes_on_after", "rows"}
        moments.parquet      step, layer, rule, condition_number, effective_rank, stable_rank,
                             orthogonality_error, polar_error (null where the rule applies no factor)
        summary.json         SUMMARY_KEYS; written at the end, also of a diverged or interrupted run
        status.json          {"schema_version", "state", "step", "steps", "updated", "attempts": [{"started", "ended",
                             "state", "reason", "first_step", "last_step", "world_size"}]}
        predictions.parquet  of a task's last evaluation, a row for each validation example: example (row in the source,
                             from 0), reference, prediction, correct (null for numbers), loss (nats, or the squared
                             error), probability (of the predicted class), text (that was generated)
        checkpoints/         step_00001000/, latest (harness/checkpoint/store.py)
        checkpoints.attempt1/  checkpoints that later attempts did not resume from
        config.steps1000.yaml, summary.steps1000.json   of the run of so many steps that this one continues
        memory/              with memory_snapshot, after CUDA memory ran out: rank<k>.pickle, torch's allocator
        heartbeat/           a file a process: the step it is in, the line it executes; a few seconds old
        crash/               stacks of the threads of a process that crashed in native code, a file a process
        flight_recorder/     on several GPUs: the last collectives of each process where NCCL timed out (torchfrtrace)
        REQUEUE              only in a run that was stopped and can be resumed: the steps done
        log.txt  wandb/  DONE (empty; only in a finished run)

A run that was killed lacks summary.json and DONE; everything else is readable up to its last row.
"""

from __future__ import annotations

from typing import NamedTuple

from harness.protocols import MOMENT_FIGURES

SCHEMA_VERSION = 1
STATES = ("running", "finished", "diverged", "interrupted", "failed")


class Metric(NamedTuple):
    unit: str
    meaning: str


TIME_PARTS = ("data", "forward_backward", "optimizer", "communication", "probes", "other")
MEMORY_KINDS: dict[str, str] = {
    "weights": "weights, with buffers and master copies",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "peak": "most that was held at once, in all phases: torch's CUDA allocator, or on a CPU the resident set",
    **{
        f"{phase}_peak": f"the same, {meaning}; absent where a CPU's kernel does not let a process reset the peak"
        for phase, meaning in {
            "build": "until the first step: building and cutting the model, resuming",
            "training": "in training steps, without the figures of moments: what optimizers are compared by",
            "evaluation": "in evaluations",
            "probes": "while figures of moments are computed",
        }.items()
    },
    "reserved_peak": "most that torch's CUDA allocator reserved in training, cached blocks included; GPUs only",
    "device": "in use on the device at this row, CUDA context, NCCL and other programs included; GPUs only",
}
"""Kinds of memory, and their meanings."""

TASK_METRICS: dict[str, tuple[str, str]] = {
    "accuracy": ("fraction", "share of the validation examples with the right class"),
    "f1": ("", "F1 of the second of two classes, or the mean over classes"),
    "matthews": ("", "Matthews correlation"),
    "pearson": ("", "Pearson correlation"),
    "spearman": ("", "Spearman rank correlation"),
    "exact_match": ("fraction", "share of the validation examples with the reference's very answer"),
}
"""Metrics of tasks (`harness.tasks.metrics`) → unit and meaning."""

METRICS: dict[str, Metric] = {
    "step": Metric("", "optimizer steps done"),
    "tokens": Metric(
        "tokens",
        "tokens trained on, over all processes: those with a loss, for tasks all of their examples; no padding",
    ),
    "wall_s": Metric("s", "training seconds, summed over attempts; evaluation and probes included"),
    "train/loss": Metric(
        "nats/token",
        "token-weighted mean since the previous row; for task=classify nats/example, or the mean squared error",
    ),
    "train/aux_loss": Metric(
        "",
        "load-balancing loss of the routers before its coefficient, weighted as train/loss, which does not hold it; "
        "absent where the model computes none",
    ),
    "val/loss": Metric(
        "nats/token",
        "token-weighted mean over the fixed validation tokens; for task=classify the mean over all validation examples",
    ),
    "val/perplexity": Metric("", "exp(val/loss); absent for task=classify"),
    **{f"val/{name}": Metric(unit, meaning) for name, (unit, meaning) in TASK_METRICS.items()},
    "val/raw_loss": Metric(
        "nats/token",
        "the same of the weights themselves, where optimizer.average_decay makes val/loss that of their average; "
        "at the last evaluation alone, absent elsewhere",
    ),
    "lr": Metric("", "learning rate of the matrix rule in this step"),
    "grad_norm": Metric("", "global gradient norm before clipping"),
    "skipped_steps": Metric("steps", "steps skipped because of non-finite gradients, so far"),
    "throughput/tokens_per_s": Metric(
        "tokens/s", "over all processes, since the previous row, without evaluation and probes"
    ),
    "throughput/mfu": Metric(
        "", "model FLOP/s over the devices' dense peak; absent where the peak is unknown"
    ),
    "balance/ratio": Metric(
        "",
        "own time (data, forward passes) of the slowest process over the median of the others; null below 0.2 s",
    ),
    "balance/slowest_rank": Metric("", "which process that was"),
    "replicas/differing": Metric(
        "parameters", "parameters whose copies are not equal on all processes; in rows of the check alone"
    ),
    "flops": Metric("FLOP", "model FLOPs so far (forward and backward)"),
    **{
        f"time/{part}_s": Metric("s", f"per step, {part.replace('_', ' and ')}, mean since the previous row")
        for part in TIME_PARTS
    },
    **{
        f"memory/{kind}_bytes": Metric("bytes", f"{meaning}; max over processes")
        for kind, meaning in MEMORY_KINDS.items()
    },
    **{
        f"moments/{figure}/{stat}": Metric("", f"{stat} over layers of the {figure.replace('_', ' ')}")
        for figure in MOMENT_FIGURES
        for stat in ("median", "max")
    },
}

SUMMARY_KEYS: dict[str, str] = {
    "schema_version": "int",
    "state": "one of STATES",
    "reason": "why it ended, one line",
    "optimizer": "preset or plug-in name",
    "seed": "int",
    "task": "pretrain, classify or answer",
    "identity": "hash of all that changes the result (seed and optimizer included)",
    "comparison_key": "hash of data, model, budget and precision: runs that share it may be compared",
    "lr": "peak learning rate",
    "lr_source": "where it came from: 'given', or the source of the default",
    "lr_tuned": "bool: the default was tuned at this model size",
    "steps": "steps done",
    "steps_planned": "steps asked for",
    "tokens": "tokens trained on",
    "wall_s": "training seconds",
    "world_size": "processes",
    "val/loss": "at the last step, or null",
    "val/perplexity": "at the last step, or null",
    "val/raw_loss": "with optimizer.average_decay: of the weights themselves at the last step; else null",
    "metrics": "{name: {value, better: higher or lower, unit}} of the task at the last step, the run's metric first; "
    "{} for pretraining and runs that did not end",
    "best_metrics": "{name: {value, step}}: best over the evaluations, an optimistic figure",
    "train/loss": "last row",
    "best_val_loss": "lowest val/loss",
    "skipped_steps": "int",
    "resumed_from": "steps after which the run resumed from a checkpoint, one for each restart (0: anew)",
    "extended_from": "runs of fewer steps that it continues, after `steps` was raised: {identity, steps, …}",
    "tokens_per_s": "median of the rows",
    "step_ms": "mean milliseconds per step after the first row, without evaluation and probes",
    "time_s": "{part: mean seconds per step after the first row}",
    "memory_bytes": "{kind: bytes} by MEMORY_KINDS, of the last row: max over processes",
    "state_bytes": "{kind: bytes} of the optimizer state of rank 0",
    "optimizer_fallbacks": "factorizations that needed a fallback",
    "parameters": "number of trainable parameters",
    "matrix_parameters": "how many of them take the matrix rule",
    "corpus_sha256": "hash of the token file",
    "train_tokens_available": "tokens of the training split",
    "labels": "classes of task=classify in the order of the model's outputs; else null",
    "examples": "{train, validation, rows: {split: rows read, left out, truncated}} of a task; null for pretraining",
    "epochs": "passes over the training split",
    "unigram_entropy": "nats/token, of the training split of pretraining; else null",
    "device": "device kind, e.g. cpu or NVIDIA H100 80GB HBM3",
    "engine": "single, ddp, …",
    "precision": "fp32, bf16, …",
    "command": "command line that reproduces the run",
    "warnings": "list of strings",
}
