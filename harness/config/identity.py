"""Which runs are the same, and which may be compared: hashes of what changes a result.

World size, engine, micro-batch, cadence of logs, names and folders do not change what is learned (beyond
rounding) and stay out; so do attention implementation, chunks of the loss, compilation and activation checkpointing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from harness.config import model_folder
from harness.config.model_facts import router_coefficient
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.files.cache import Fingerprints, cache_root
from optimizers.presets import identifying_options

_DIGITS = 16


def identity(config: RunConfig, corpus_sha256: str, tokenizer_sha256: str) -> str:
    """Return the hash of all that changes the result of a run, seed and optimizer included.

    Args:
        config: a checked configuration (defaults filled in).
        corpus_sha256: hash of the tokenized corpus, which stands for the source and the split.
        tokenizer_sha256: hash of the tokenizer.

    Returns:
        16 hexadecimal digits.
    """
    return _hash({**_facts(config), "corpus": corpus_sha256, "tokenizer": tokenizer_sha256})


def comparison_key(config: RunConfig, corpus_sha256: str, tokenizer_sha256: str) -> str:
    """Return the `identity` without optimizer and seed: runs that share it had the same task and budget."""
    facts = _facts(config)
    for name in ("optimizer", "seed"):
        del facts[name]
    return _hash({**facts, "corpus": corpus_sha256, "tokenizer": tokenizer_sha256})


def differing_keys(a: RunConfig, b: RunConfig) -> list[str]:
    """Return the dotted keys in which the identities of two runs differ, apart from their corpora."""
    first, second = _flat(_facts(a)), _flat(_facts(b))
    missing = object()
    names = dict.fromkeys([*first, *second])
    return [name for name in names if first.get(name, missing) != second.get(name, missing)]


def _facts(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    model, data, optimizer, schedule = (values[group] for group in ("model", "data", "optimizer", "schedule"))
    facts = {
        "model": {
            "model_type": model["model_type"],
            "config": model["config"],
            "path": weights_sha256(config),
        },
        # Where the text came from is in the corpus hash; what is done with it is not.
        "data": {"mode": data["mode"], "validation_tokens": data["validation_tokens"]},
        "optimizer": _optimizer(optimizer),
        "schedule": schedule,
        # The loss is read on these tokens: another number of them is another result.
        "eval": {"tokens": values["eval"]["tokens"]},
    }
    if config.model.adapter is not None:
        facts["model"] |= {"adapter": model["adapter"], "lora": model["lora"]}
    if router_coefficient(config.model):
        # The load-balancing loss is that of a forward pass, so the cut into passes changes the result.
        facts["micro_batch_size"] = values["micro_batch_size"]
    scalars = ("steps", "seed", "batch_size", "seq_len", "precision", "max_grad_norm")
    if config.task.name != "pretrain":
        # Which rows and labels these are is in the hash of the data; what is done with them is not.
        # How often answers are generated, and how many at a time, changes none of them.
        facts["task"] = {
            k: v for k, v in values["task"].items() if k not in ("generate", "generation_batch_size")
        }
        del facts["data"], facts["eval"]
    if values["tf32"]:
        facts["tf32"] = True
    if values["max_loss_rise"] is not None:
        facts["max_loss_rise"] = values["max_loss_rise"]
    return {**facts, **{name: values[name] for name in scalars}}


def _optimizer(section: dict[str, Any]) -> dict[str, Any]:
    """Return what the optimizer is, without options that came later and change nothing."""
    chosen = {key: value for key, value in section.items() if key not in ("lr_source", "lr_tuned")}
    return identifying_options(None if section["target"] else section["name"], chosen)


def weights_sha256(config: RunConfig) -> str | None:
    """Return the hash of the contents of a starting point: weight files, and its Python code where that is run.

    The path is a fact about the machine, and its config.json is part of ``model.config``.
    """
    if config.model.path is None:
        return None
    fingerprints = Fingerprints(cache_root(config.data.cache_dir))
    try:
        files = list(model_folder.weight_files(config.model.path))
        if config.trust_remote_code:
            files += sorted(Path(config.model.path).expanduser().glob("*.py"))
        contents = [fingerprints.sha256(file) for file in files]
    except (OSError, InputError):
        # Of a run whose starting point is gone, only keys can be compared.
        return "not available"
    return hashlib.sha256("|".join(contents).encode()).hexdigest()


def _hash(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
