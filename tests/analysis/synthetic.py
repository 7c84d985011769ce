"""Run folders with real files in the documented format, made from closed-form curves.

The curves are L(t) = end + (start − end)·exp(−rate·t/T) + noise, so that a report can be checked by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from harness.record.schema import SCHEMA_VERSION
from harness.tasks.metrics import METRICS, score

LAYER_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = {"name": "llama_tiny", "model_type": "llama", "config": {"hidden_size": 128, "num_hidden_layers": 4}}
UNIGRAM_ENTROPY = 6.21


@dataclass
class Recipe:
    """One synthetic run. Losses in nats/token, times in seconds per step, sizes in bytes."""

    optimizer: str = "adamw"
    seed: int = 0
    end: float = 3.4
    """Noise-free final validation loss."""
    rate: float = 6.0
    seed_effect: float = 0.02
    """Standard deviation of the shift that all arms of a seed share."""
    noise: float = 0.004
    """Standard deviation of the run's own shift of the final loss."""
    steps: int = 200
    log_every: int = 10
    eval_every: int = 20
    batch_tokens: int = 2048
    step_s: float = 0.12
    optimizer_s: float = 0.01
    state_bytes: dict[str, int] = field(
        default_factory=lambda: {"moment": 4_800_000, "second_moment": 4_800_000}
    )
    lr: float = 1e-3
    lr_source: str = "tuned at 1.3M, 200 steps of 2,048 tokens"
    lr_tuned: bool = True
    epochs: float = 0.4
    options: dict[str, Any] = field(default_factory=dict)
    state: str = "finished"
    stop_at: int | None = None
    """Step at which a run that does not finish stops."""
    has_moments: bool = True
    overrides: dict[str, Any] = field(default_factory=dict)
    """Top-level configuration keys to replace."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Summary keys to replace."""
    layers: int = 4
    answers: Answers | None = None
    """Of a task: per-example results, and what they make of the run's files."""


@dataclass
class Answers:
    """What a run of a task answered: one entry per validation example."""

    metric: str
    references: list[str]
    predictions: Sequence[str | None]
    labels: list[str] | None = None
    texts: list[str] | None = None
    has_file: bool = True
    """False: predictions.parquet is missing."""


_AUX, _LOW_RANK = {"aux": 4_200_000}, {"moment": 1_300_000, "basis": 900_000}
_PARTS = {"data": 0.001, "communication": 0.008, "probes": 0.001, "other": 0.002}
_SIZES = {"weights": 5_200_000, "gradients": 5_200_000, "peak": 612_000_000}
TYPICAL = {
    "adamw": Recipe("adamw", end=3.46, optimizer_s=0.004, lr=1e-3, lr_source="default: GaLore protocol, 60M"),
    "galore": Recipe(
        "galore",
        end=3.52,
        optimizer_s=0.011,
        lr=1e-2,
        state_bytes={**_LOW_RANK, "second_moment": 1_300_000, **_AUX},
    ),
    "muon": Recipe("muon", end=3.34, optimizer_s=0.016, lr=2e-2, state_bytes={"moment": 3_100_000, **_AUX}),
    "sumo": Recipe("sumo", end=3.31, optimizer_s=0.019, lr=1e-2, state_bytes={**_LOW_RANK, **_AUX}),
}


def group(
    root: Path, optimizers: Iterable[str] = TYPICAL, seeds: Iterable[int] = (0, 1, 2), **changes: Any
) -> Path:
    """A comparison as `optbench compare` leaves it: one folder per optimizer and seed."""
    for seed in seeds:
        for name in optimizers:
            write(root, Recipe(**{**vars(TYPICAL.get(name, Recipe(name))), "seed": seed, **changes}))
    return root


def write(root: Path, recipe: Recipe, name: str | None = None) -> Path:
    """Write one run below ``root``; returns its folder."""
    folder = root / (name or f"{recipe.optimizer}-seed{recipe.seed}")
    folder.mkdir(parents=True)
    rng = np.random.default_rng([recipe.seed, *recipe.optimizer.encode()])
    shared = np.random.default_rng(recipe.seed).normal() * recipe.seed_effect
    end = recipe.end + shared + rng.normal() * recipe.noise
    last = recipe.steps if recipe.stop_at is None else recipe.stop_at
    config = _config(recipe)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(_ENVIRONMENT))
    (folder / "parameters.json").write_text(json.dumps(_parameters(recipe)))
    rows = _metrics(recipe, rng, end, last)
    if recipe.answers is not None:
        _answer(folder, recipe.answers, rows, config, recipe)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if recipe.has_moments:
        _moments(recipe, rng, last).to_parquet(folder / "moments.parquet")
    status = {"schema_version": SCHEMA_VERSION, "state": recipe.state, "step": last, "steps": recipe.steps}
    attempt = {
        "started": "2026-01-01T00:00:00Z",
        "state": recipe.state,
        "reason": "",
        "first_step": 1,
        "last_step": last,
    }
    (folder / "status.json").write_text(json.dumps({**status, "attempts": [attempt]}))
    if recipe.state != "running":
        (folder / "summary.json").write_text(json.dumps(_summary(recipe, config, rows, last)))
    if recipe.state == "finished":
        (folder / "DONE").touch()
    return folder


def _answer(
    folder: Path, answers: Answers, rows: list[dict[str, Any]], config: dict[str, Any], recipe: Recipe
) -> None:
    """Turn a run into one of a task: its metric rises to the final value, and predictions.parquet holds the end."""
    kind = METRICS[answers.metric].kind
    name = "answer" if kind == "text" else "classify"
    config["task"] = {"name": name, "metric": answers.metric, "labels": answers.labels}
    final = score(answers.metric, answers.references, answers.predictions, answers.labels)
    for row in rows:
        if "val/loss" in row:
            row.pop("val/perplexity")
            row[f"val/{answers.metric}"] = final * (1 - np.exp(-5 * row["step"] / recipe.steps)) + (
                final * np.exp(-5.0) if row["step"] == recipe.steps else 0
            )
    facts = {"value": final, "better": METRICS[answers.metric].better, "unit": METRICS[answers.metric].unit}
    recipe.summary = {**recipe.summary, "metrics": {answers.metric: facts}, "unigram_entropy": None}
    count = len(answers.references)
    pairs = list(zip(answers.references, answers.predictions, strict=True))
    frame = pd.DataFrame(
        {
            "example": np.arange(count, dtype=np.int64),
            "reference": answers.references,
            "prediction": pd.Series(answers.predictions, dtype="string"),
            "correct": pd.array([None if kind == "number" else r == p for r, p in pairs], dtype="boolean"),
            "loss": np.full(count, 0.5),
            "probability": np.full(count, 0.7 if kind == "class" else np.nan),
            "text": pd.Series(answers.texts or [None] * count, dtype="string"),
        }
    )
    if answers.has_file and recipe.state == "finished":
        frame.to_parquet(folder / "predictions.parquet")


def _config(recipe: Recipe) -> dict[str, Any]:
    return {
        "model": MODEL,
        "data": {"name": "kjv", "source": "package", "vocab_size": 4096},
        "optimizer": {
            "name": recipe.optimizer,
            "target": None,
            "lr": recipe.lr,
            "lr_source": recipe.lr_source,
            "lr_tuned": recipe.lr_tuned,
            "seed": recipe.seed,  # resolved: follows the run's
            **recipe.options,
        },
        "engine": {"name": "ddp", "threads": 1},
        "schedule": {"name": "cosine", "warmup": 0.1, "decay": 0.2, "min_lr_ratio": 0.1},
        "eval": {"every": recipe.eval_every, "tokens": 32768},
        "steps": recipe.steps,
        "seed": recipe.seed,
        "world_size": 2,
        "batch_size": 16,
        "seq_len": 128,
        "precision": "fp32",
        "max_grad_norm": 1.0,
        "group": "synthetic",
        "name": f"{recipe.optimizer}-seed{recipe.seed}",
        **recipe.overrides,
    }


def _metrics(recipe: Recipe, rng: np.random.Generator, end: float, last: int) -> list[dict[str, Any]]:
    start, rows = 8.3, []
    logged = sorted({1, *range(recipe.log_every, last + 1, recipe.log_every), last})
    for step in logged:
        loss = end + (start - end) * float(np.exp(-recipe.rate * step / recipe.steps))
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * recipe.batch_tokens,
            "wall_s": step * recipe.step_s,
            "train/loss": loss + float(rng.normal()) * 0.03,
            "lr": recipe.lr,
            "grad_norm": 1.0,
            "skipped_steps": 0,
            "throughput/tokens_per_s": recipe.batch_tokens / recipe.step_s,
            "flops": step * recipe.batch_tokens * 6.0 * 1.3e6,
            "memory/peak_bytes": 612_000_000,
        }
        if step % recipe.eval_every == 0 or step == recipe.steps:
            row["val/loss"] = loss
            row["val/perplexity"] = float(np.exp(loss))
        rows.append(row)
    if recipe.state == "diverged":
        rows[-1]["train/loss"] = None
        rows[-1].pop("val/loss", None)
    return rows


def _summary(recipe: Recipe, config: dict[str, Any], rows: list[dict[str, Any]], last: int) -> dict[str, Any]:
    final = rows[-1].get("val/loss") if recipe.state == "finished" else None
    compared = {k: v for k, v in config.items() if k not in ("optimizer", "seed", "name", "group", "eval")}
    key = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]
    rest = max(recipe.step_s - recipe.optimizer_s - 0.012, 0)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "state": recipe.state,
        "reason": "" if recipe.state == "finished" else f"{recipe.state} at step {last}",
        "optimizer": recipe.optimizer,
        "seed": recipe.seed,
        "identity": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "comparison_key": key,
        "lr": recipe.lr,
        "lr_source": recipe.lr_source,
        "lr_tuned": recipe.lr_tuned,
        "steps": last,
        "steps_planned": recipe.steps,
        "tokens": last * recipe.batch_tokens,
        "wall_s": last * recipe.step_s,
        "world_size": 2,
        "val/loss": final,
        "val/perplexity": None if final is None else float(np.exp(final)),
        "train/loss": rows[-1]["train/loss"],
        "best_val_loss": min((row["val/loss"] for row in rows if "val/loss" in row), default=None),
        "skipped_steps": 0,
        "tokens_per_s": recipe.batch_tokens / recipe.step_s,
        "step_ms": recipe.step_s * 1000,
        "time_s": {**_PARTS, "forward_backward": rest, "optimizer": recipe.optimizer_s},
        "memory_bytes": {**_SIZES, "optimizer_state": sum(recipe.state_bytes.values())},
        "state_bytes": recipe.state_bytes,
        "optimizer_fallbacks": 0,
        "parameters": 1_312_000,
        "matrix_parameters": 787_000,
        "corpus_sha256": "c" * 64,
        "train_tokens_available": int(recipe.steps * recipe.batch_tokens / recipe.epochs),
        "epochs": recipe.epochs,
        "unigram_entropy": UNIGRAM_ENTROPY,
        "device": "cpu",
        "engine": "ddp",
        "precision": "fp32",
        "command": f"optbench train optimizer={recipe.optimizer} seed={recipe.seed} steps={recipe.steps}",
        "warnings": [],
    }
    return {**summary, **recipe.summary}


def _parameters(recipe: Recipe) -> list[dict[str, Any]]:
    matrix_rule = "adamw" if recipe.optimizer == "adamw" else recipe.optimizer
    rows = [
        {"name": "model.embed_tokens.weight", "shape": [4096, 128], "rule": "adamw", "reason": "embedding"}
    ]
    for layer in range(recipe.layers):
        for part in LAYER_PARTS:
            where = "mlp" if part in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"model.layers.{layer}.{where}.{part}.weight"
            rows.append(
                {"name": name, "shape": [128, 128], "rule": matrix_rule, "reason": "2-D hidden weight"}
            )
        rows.append(
            {
                "name": f"model.layers.{layer}.input_layernorm.weight",
                "shape": [128],
                "rule": "adamw",
                "reason": "norm",
            }
        )
    rows.append({"name": "lm_head.weight", "shape": [4096, 128], "rule": "adamw", "reason": "lm_head"})
    return [{**row, "numel": int(np.prod(row["shape"]))} for row in rows]


def _moments(recipe: Recipe, rng: np.random.Generator, last: int) -> pd.DataFrame:
    """log10 κ rises with depth and time; orthogonality error only where a factor is applied."""
    rows = []
    applies = recipe.optimizer in ("muon", "sumo")
    error = 1e-6 if recipe.optimizer == "sumo" else 0.2
    rank = 128 if recipe.optimizer in ("muon", "adamw") else 32
    for step in sorted({1, *range(25, last + 1, 25), last}):
        for layer in range(recipe.layers):
            for index, part in enumerate(LAYER_PARTS):
                where = "mlp" if part in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                log_kappa = 1 + 2 * step / recipe.steps + 0.3 * layer + 0.15 * index + rng.normal() * 0.1
                rows.append(
                    {
                        "step": step,
                        "layer": f"model.layers.{layer}.{where}.{part}.weight",
                        "rule": recipe.optimizer,
                        "condition_number": 10**log_kappa,
                        "effective_rank": rank - rng.integers(0, 4),
                        "stable_rank": 4 + rng.random(),
                        "orthogonality_error": error * (1 + rng.random()) if applies else None,
                        "polar_error": 0.8 * error * (1 + rng.random()) if applies else None,
                    }
                )
    return pd.DataFrame(rows)


_ENVIRONMENT = {
    "python": "3.11.2",
    "system": "Linux x86_64",
    "packages": {"optbench": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.0.0"},
    "device": "cpu",
    "world_size": 2,
    "threads_per_process": 1,
    "cpu_cores": 2,
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "modified": False},
    "engine": "ddp",
    "corpus_sha256": "c" * 64,
    "tokenizer_sha256": "d" * 64,
    "certificate": {
        "cell": "× ddp × fp32 × accumulation 1 × clipping on",
        "passed": True,
        "replay_error": 9.6e-7,
        "coverage": "exact",
        "current": True,
    },
}
