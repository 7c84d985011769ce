"""Examples for tasks, encoded once into the cache that all runs and processes share.

Files of a cached set of examples:

    train.arrow, validation.arrow   one row an example, see `example_store`
    tokenizer/                      loads with transformers.AutoTokenizer
    manifest.json                   counts, classes, checksums
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.config.model_facts import facts
from harness.config.schema import RunConfig
from harness.data import tokenizer
from harness.data.cache import check_vocabulary
from harness.data.cached_folder import open_or_build
from harness.data.manifest import TOKENIZER_FILES, CachedFile, Count, Kind, Sha256, Strict
from harness.data.rows import describe_rows
from harness.data.spool import Say, throttle
from harness.data.tokenizer import cached_bpe, load
from harness.files.cache import Fingerprints, cache_root
from harness.tasks.example_encoding import Encoded, encode_answers, encode_texts, positions
from harness.tasks.example_rows import RawExamples, draw_shots, read_examples, with_shots
from harness.tasks.example_store import ExampleSplit
from harness.tasks.labels import encode_labels

_KEYS = {
    "classify": ("text", "label", "labels", "target"),
    "answer": ("prompt", "answer", "shots", "truncate", "extract", "max_new_tokens"),
}
"""Task → keys below task that decide the examples, or whether they are refused."""


class _Tokenizer(Strict):
    sha256: Sha256
    vocab_size: Count
    eos_id: Count
    pad_id: Count


class _Manifest(Strict):
    format: Literal[3]
    sha256: Sha256
    labels: list[str] | None
    used_vocab_size: Count
    tokenizer: _Tokenizer
    files: dict[str, CachedFile]
    facts: dict[str, Any]
    warnings: list[str]


EXAMPLES = Kind("examples", 3, ("train.arrow", "validation.arrow", *TOKENIZER_FILES), _Manifest)


class Examples:
    """The examples of a run, prepared by `prepare_examples`.

    Attributes:
        folder: in the cache.
        train, validation: the splits.
        sha256: identity of both: ids, labels, references and rows, and the order of the classes.
        tokenizer_sha256: of ``tokenizer/tokenizer.json``.
        tokenizer_folder: loads with ``transformers.AutoTokenizer.from_pretrained``.
        vocab_size: entries of the tokenizer (largest id + 1).
        used_vocab_size: largest id that occurs, eos and pad included, + 1: what a model must have at least.
        pad_id, eos_id: token ids; a tokenizer without a pad token pads with eos.
        labels: classes in the order of the model's outputs; None: labels are numbers, or the task has none.
        facts: of each split: rows read, kept and left out, truncated and longest examples; JSON.
        warnings: what a user should know about the data, one line each.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.sha256: str = manifest["sha256"]
        self.used_vocab_size: int = manifest["used_vocab_size"]
        settings = manifest["tokenizer"]
        self.tokenizer_sha256: str = settings["sha256"]
        self.tokenizer_folder = folder / "tokenizer"
        self.vocab_size: int = settings["vocab_size"]
        self.eos_id: int = settings["eos_id"]
        self.pad_id: int = settings["pad_id"]
        labels = manifest["labels"]
        self.labels: tuple[str, ...] | None = None if labels is None else tuple(labels)
        self.facts: dict[str, Any] = manifest["facts"]
        self.warnings: tuple[str, ...] = tuple(manifest["warnings"])
        is_labelled = self.facts["task"] == "classify"
        self.train, self.validation = (
            ExampleSplit(folder / f"{split}.arrow", self.labels, is_labelled)
            for split in ("train", "validation")
        )


def prepare_examples(config: RunConfig, say: Say) -> Examples:
    """Return the examples of a task: opened from the cache, or encoded into it.

    Safe in many processes at once, as `harness.data.cached_folder.open_or_build`.

    Args:
        config: checked; ``task.name`` is classify or answer.
        say: told in one line what takes long; not called where the cache is there.

    Raises:
        InputError: data that `read_examples`, `encode_labels` or `draw_shots` refuse; an example that is longer than
            the context; a tokenizer without eos; a vocabulary larger than the model's.
    """
    root = cache_root(config.data.cache_dir)
    model_vocabulary = facts(config.model).vocab_size
    check_vocabulary(config.data, None, model_vocabulary)
    identity, source = describe_rows(config.data, Fingerprints(root))
    task = config.task.model_dump(mode="json", include={"name", *_KEYS[config.task.name]})
    parts = {
        "source": identity,
        "tokenizer": tokenizer.identity(config.data.tokenizer, config.data.vocab_size),
        "task": task,
        "seq_len": config.seq_len,
        "positions": positions(config) if config.task.name == "answer" else None,
    }

    def build(folder: Path) -> dict[str, Any]:
        return _build(config, folder, root / "tokenizers", source, say)

    examples = Examples(*open_or_build(root, config.data.name, parts, EXAMPLES, build, _summary, say))
    check_vocabulary(config.data, examples.used_vocab_size, model_vocabulary)
    return examples


def _build(config: RunConfig, folder: Path, shared: Path, source: dict[str, Any], say: Say) -> dict[str, Any]:
    task = config.task
    given = None if config.data.tokenizer == "bpe" else load(config.data.tokenizer, config.trust_remote_code)
    say(f"reading examples of {source['name']}")
    training, validation = read_examples(config, "train"), read_examples(config, "validation")
    classes, shots, labels = None, [], [np.zeros(0), np.zeros(0)]
    if task.name == "classify":
        classes, *labels = encode_labels(task, training, validation)
    else:
        shots = draw_shots(config, training, validation)
    if given is None:
        say(f"training a tokenizer of {config.data.vocab_size} entries")
    encoder = given or cached_bpe(_texts(training), _texts(training), config.data.vocab_size, shared)
    is_separated = len(task.text) == 2 and encoder.separate_pairs()
    say("tokenizing")
    digest = hashlib.sha256(json.dumps([task.name, classes]).encode())
    split_facts: dict[str, Any] = {}
    largest = max(encoder.eos_id, encoder.pad_id)
    for split, raw, targets in zip(("train", "validation"), (training, validation), labels):
        if task.name == "classify":
            encoded = encode_texts(config, encoder, raw, targets, throttle(say))
        else:
            drawn = shots if split == "validation" else []
            prompts = with_shots(raw, training, drawn)
            encoded = encode_answers(config, encoder, split, raw, prompts, len(drawn), throttle(say))
        encoded.examples.write(folder / f"{split}.arrow")
        digest.update(encoded.examples.sha256().encode())
        largest = max(largest, int(encoded.examples.all_ids.max()))
        split_facts[split] = _counts(raw, encoded)
    held_out = set(validation.hashes())
    split_facts["train"]["in_validation"] = sum(text in held_out for text in training.hashes())
    split_facts["train"]["without_answer"] = training.without_answer
    return {
        "sha256": digest.hexdigest(),
        "labels": None if classes is None else list(classes),
        "used_vocab_size": largest + 1,
        "tokenizer": {
            "name": config.data.tokenizer,
            "sha256": encoder.save(folder / "tokenizer"),
            "vocab_size": encoder.vocab_size,
            "eos_id": encoder.eos_id,
            "pad_id": encoder.pad_id,
        },
        "facts": {
            "task": task.name,
            "source": source,
            **split_facts,
            "shots": [training.rows[index] for index in shots],
            "pads_with_eos": encoder.pad is None,
            "pairs_joined_by_eos": is_separated,
        },
        "warnings": _warnings(config, split_facts),
        "versions": {
            name: importlib.metadata.version(name) for name in ("tokenizers", "pyarrow", "datasets")
        },
    }


def _counts(raw: RawExamples, encoded: Encoded) -> dict[str, int]:
    return {
        "read": raw.read,
        "kept": len(raw.inputs),
        "null": raw.null_rows,
        "blank": raw.blank_rows,
        "truncated": encoded.truncated,
        "longest": encoded.longest,
        "tokens": len(encoded.examples.all_ids),
    }


def _texts(raw: RawExamples) -> Iterator[str]:
    """Yield the text that a tokenizer is trained on."""
    for texts in raw.inputs:
        yield from texts
    yield from raw.answers


def _warnings(config: RunConfig, splits: dict[str, Any]) -> list[str]:
    train = splits["train"]
    lines = []
    if train["in_validation"]:
        lines.append(
            f"{train['in_validation']:,} of {train['kept']:,} training examples have the text of a validation example: "
            "the validation metric counts what was memorized"
        )
    for split, counts in splits.items():
        left_out = counts["null"] + counts["blank"]
        if left_out:
            lines.append(
                f"{left_out:,} of {counts['read']:,} {split} rows are left out: {counts['null']:,} with null, "
                f"{counts['blank']:,} blank"
            )
        if counts["truncated"]:
            lines.append(
                f"{counts['truncated']:,} of {counts['kept']:,} {split} examples are longer than "
                f"seq_len={config.seq_len} and truncated (the longest has {counts['longest']:,} tokens)"
            )
    if train["without_answer"]:
        lines.append(
            f"{train['without_answer']:,} of {train['kept']:,} training answers hold nothing that "
            f"task.extract={config.task.extract} finds"
        )
    return lines


def _summary(manifest: dict[str, Any]) -> str:
    counts = manifest["facts"]
    labels = manifest["labels"]
    classes = f", {len(labels)} classes" if labels is not None else ""
    return (
        f"{counts['train']['kept']:,} training examples of {counts['train']['tokens']:,} tokens, "
        f"{counts['validation']['kept']:,} for validation{classes}"
    )
