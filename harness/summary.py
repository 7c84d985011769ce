"""summary.json: the result of a run, and what its reader must be warned of."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from harness.config import checks, model_checks
from harness.config.schema import RunConfig
from harness.device_specs import device_spec
from harness.devices import cpu_cores, device_name
from harness.loop import Run
from harness.preparation import Prepared
from harness.protocols import MetricRow
from harness.record.folder import finite
from harness.record.schema import MEMORY_KINDS, SCHEMA_VERSION, TIME_PARTS
from harness.redaction import redact_argv
from harness.tasks import task_of
from harness.tasks.metrics import METRICS
from harness.tracked_optimizer import tracked

ENOUGH_CORES = 4
"""CPU cores for a process on a GPU: its main thread, autograd's, NCCL's proxies and a writer of checkpoints."""


def reason(state: str, run: Run, problem: str) -> str:
    """Return why a run ended, in one line; ``problem`` is that of its checkpoints."""
    reasons = {
        "finished": "all steps done",
        "interrupted": f"stopped by {run.stop.reason} after step {run.state.step}",
        "diverged": f"{run.state.skipped} steps with non-finite gradients "
        f"(max_skipped_steps={run.config.max_skipped_steps})",
    }
    what = reasons.get(state, "")
    return "; ".join(part for part in (what, problem) if part) or state


def warnings(run: Run, facts: Mapping[str, Any]) -> list[str]:
    """Return what makes this run's numbers weaker than they look, a line each.

    Args:
        run: assembled.
        facts: of the data, as its task has them.
    """
    config, lines = run.config, []
    epochs = run.loader.epoch(config.steps - 1)
    # Tasks train for several epochs as a rule; text that is read again is memorized.
    if epochs > 1 and config.task.name == "pretrain":
        lines.append(
            f"{epochs:.1f} epochs: the training split of {facts['train_tokens_available']:,} tokens is seen more than "
            "once"
        )
    lines += checks.warnings(config)
    is_said = any(line.startswith("optimizer.lr") for line in lines)
    if config.optimizer.lr_source != "given" and not config.optimizer.lr_tuned and not is_said:
        lines.append(
            f"learning rate {config.optimizer.lr:g} was not tuned at this size ({config.optimizer.lr_source})"
        )
    lines += mixed_devices(run.devices)
    if run.engine.device.type == "cuda":
        lines += gpu_warnings(config, device_name(run.engine.device), run.info.peak_flops)
    return lines


def mixed_devices(devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line if the processes have devices of different kinds, which names the ranks of each kind.

    Args:
        devices: facts of each process' device, by rank (`harness.gpu_facts.of_process`).
    """
    ranks: dict[str, list[int]] = {}
    for rank, device in enumerate(devices):
        ranks.setdefault(f"{device['name']}, compute capability {device.get('capability')}", []).append(rank)
    if len(ranks) < 2:
        return []
    found = "; ".join(f"{kind}: ranks {', '.join(map(str, on))}" for kind, on in ranks.items())
    return [
        f"the processes have different GPUs ({found}): all wait for the slowest, and replicas may drift apart because "
        "each kind rounds in its own way; use equal GPUs, or engine=fsdp2"
    ]


FP64_FACTORS = ("auto", "qr_svd", "gram", "dwh")
"""Methods of `optimizer.orthogonalizer` whose products are in fp64."""
SLOW_FP64 = 8
"""fp64 at less than this share of the fp32 rate is worth a warning; data-center GPUs for training have 1 to 1/2."""


def gpu_warnings(config: RunConfig, name: str, peak_flops: float | None) -> list[str]:
    """Return what makes a run on GPUs slower than it could be, or its speed unknown, a line each.

    Args:
        config: of the run.
        name: of the GPU, as its driver reports it.
        peak_flops: dense peak of one device, FLOP/s; None: unknown.
    """
    lines: list[str] = []
    spec = device_spec(name)
    if config.precision == "fp32" and not config.tf32:
        cost = ""
        if spec is not None and spec.bf16 is not None:
            cost = f" ({spec.fp32 / 1e12:g} of {spec.bf16 / 1e12:g} TFLOP/s on this GPU)"
        lines.append(
            f"precision=fp32 leaves the tensor cores unused{cost}: precision=bf16, or tf32=true, is faster"
        )
    if config.precision in ("bf16", "bf16_pure") and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        lines.append(f"precision={config.precision} is emulated on {name}: precision=fp16 or fp32 is faster")
    method = config.optimizer.options.get("orthogonalizer")
    # The method stays the same: a result must not depend on the speed of a device.
    if spec is not None and method in FP64_FACTORS and spec.fp64 * SLOW_FP64 < spec.fp32:
        lines.append(
            f"optimizer.orthogonalizer={method} computes exact factors in fp64, which {name} multiplies at 1/"
            f"{spec.fp32 / spec.fp64:.0f} of its fp32 rate: orthogonalizer=polar_express is approximate and needs none"
        )
    if line := model_checks.alignment_warning(config):
        lines.append(line)
    if peak_flops is None:
        lines.append(
            f"no throughput/mfu: the {config.precision} peak of {name} is unknown (peak_flops=… FLOP/s gives it)"
        )
    cores = cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cores < ENOUGH_CORES:
        lines.append(
            f"{cores} CPU core(s) a process: kernels are launched, data read and checkpoints written by at least "
            f"{ENOUGH_CORES} (on SLURM: cluster.cpus, --cpus-per-task)"
        )
    return lines


def build(
    prepared: Prepared,
    run: Run,
    *,
    rows: Sequence[MetricRow],
    state: str,
    reason: str,
    warnings: Sequence[str],
    resumed_from: Sequence[int] = (),
    extended_from: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the summary, with the keys of `harness.record.schema.SUMMARY_KEYS`; medians leave the first row out."""
    config, totals = run.config, run.state
    # The first row holds allocation and compilation, which is not speed.
    last, warm = (rows[-1] if rows else {}), (rows[1:] or rows)
    losses = [loss for row in rows if (loss := finite(row.get("val/loss"))) is not None]
    ended = totals.step == config.steps
    optimizer = tracked(run.optimizer)
    return {
        "schema_version": SCHEMA_VERSION,
        "state": state,
        "reason": reason,
        "optimizer": config.optimizer.name,
        "seed": config.seed,
        "task": config.task.name,
        "identity": prepared.identity,
        "comparison_key": prepared.comparison_key,
        "lr": config.optimizer.lr,
        "lr_source": config.optimizer.lr_source,
        "lr_tuned": bool(config.optimizer.lr_tuned),
        "steps": totals.step,
        "steps_planned": config.steps,
        "tokens": totals.tokens,
        "wall_s": totals.wall_s,
        "world_size": run.engine.world_size,
        # An interrupted run has no final loss: that of its last row is of fewer steps.
        "val/loss": finite(last.get("val/loss")) if ended else None,
        "val/perplexity": finite(last.get("val/perplexity")) if ended else None,
        "val/raw_loss": finite(last.get("val/raw_loss")) if ended else None,
        "metrics": final_metrics(last) if ended else {},
        "best_metrics": best_metrics(rows),
        "train/loss": finite(last.get("train/loss")),
        "best_val_loss": min(losses, default=None),
        "skipped_steps": totals.skipped,
        "resumed_from": list(resumed_from),
        "extended_from": [dict(shorter) for shorter in extended_from],
        "tokens_per_s": median(warm, "throughput/tokens_per_s"),
        "step_ms": step_ms(rows),
        "time_s": mean_times(rows),
        "memory_bytes": {kind: last[key] for kind in MEMORY_KINDS if (key := f"memory/{kind}_bytes") in last},
        "state_bytes": optimizer.state_bytes(),
        "optimizer_fallbacks": int(optimizer.fallbacks),
        "parameters": run.info.parameters,
        "matrix_parameters": sum(route.numel for route in optimizer.routes if route.rule != "adamw"),
        "corpus_sha256": prepared.data.sha256,
        **task_of(config).facts(prepared.data),
        "epochs": run.loader.epoch(totals.step - 1) if totals.step else 0.0,
        "device": device_name(run.engine.device),
        "engine": run.engine.name,
        "precision": config.precision,
        "command": shlex.join(["optbench", "train", *redact_argv(prepared.overrides)]),
        "warnings": list(warnings),
    }


def final_metrics(row: MetricRow) -> dict[str, dict[str, Any]]:
    """Return name → value, direction and unit of the task's metrics in a row, the one of the run first."""
    return {
        name: {"value": finite(row[key]), "better": METRICS[name].better, "unit": METRICS[name].unit}
        for key in row
        if (name := key.removeprefix("val/")) in METRICS
    }


def best_metrics(rows: Sequence[MetricRow]) -> dict[str, dict[str, Any]]:
    """Return name → best value of the task's metrics and the step of it: chosen on the validation data themselves."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, metric in final_metrics(row).items():
            value, before = metric["value"], best.get(name)
            sign = 1 if metric["better"] == "higher" else -1
            if value is not None and (before is None or sign * value > sign * before["value"]):
                best[name] = {"value": value, "step": row["step"]}
    return best


def median(rows: Sequence[MetricRow], key: str) -> float | None:
    """Return the median of a key over the rows that have it; None where none has."""
    values = [value for row in rows if (value := finite(row.get(key))) is not None]
    return statistics.median(values) if values else None


def mean_times(rows: Sequence[MetricRow]) -> dict[str, float | None]:
    """Return mean seconds per step of each part, weighted by the steps of the rows; the first row warms up."""
    kept = list(pairwise(rows)) or [({"step": 0}, row) for row in rows]
    means: dict[str, float | None] = {}
    for part in TIME_PARTS:
        parts = [
            (after[f"time/{part}_s"] or 0.0, (after["step"] or 0) - (before["step"] or 0))
            for before, after in kept
            if f"time/{part}_s" in after
        ]
        steps = sum(count for _, count in parts)
        means[part] = sum(seconds * count for seconds, count in parts) / steps if steps else None
    return means


def step_ms(rows: Sequence[MetricRow]) -> float | None:
    """Return mean milliseconds per step without evaluation and probes."""
    times = mean_times(rows)
    seconds = [value for part, value in times.items() if part != "probes" and value is not None]
    return sum(seconds) * 1e3 if seconds else None
