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
from collections.abc import Iterator, Sequence
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
from harness.data.tokenizer import EncodedInput, Encoder, cached_bpe, load
from harness.errors import InputError
from harness.files.cache import Fingerprints, cache_root
from harness.tasks.example_rows import RawExamples, draw_shots, read_examples, with_shots
from harness.tasks.example_store import EncodedSplit, ExampleSplit
from harness.tasks.labels import encode_labels

_KEYS = {
    "classify": ("text", "label", "labels", "target"),
    "answer": ("prompt", "answer", "shots", "truncate", "extract", "max_new_tokens"),
}
"""Task → keys below task that decide the examples, or whether they are refused."""
AT_ONCE = 4096
"""Examples tokenized in one call."""


class _Tokenizer(Strict):
    sha256: Sha256
    vocab_size: Count
    eos_id: Count
    pad_id: Count


class _Manifest(Strict):
    format: Literal[1]
    sha256: Sha256
    labels: list[str] | None
    used_vocab_size: Count
    tokenizer: _Tokenizer
    files: dict[str, CachedFile]
    facts: dict[str, Any]
    warnings: list[str]


EXAMPLES = Kind("examples", 1, ("train.arrow", "validation.arrow", *TOKENIZER_FILES), _Manifest)


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
        "positions": _positions(config),
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
    classes, shots = None, []
    if task.name == "classify":
        classes, *labels = encode_labels(task, training, validation)
    else:
        labels = [np.zeros(len(raw.inputs), dtype=np.int64) for raw in (training, validation)]
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
        inputs = with_shots(raw, training, shots) if split == "validation" and shots else raw.inputs
        encode = _classified if task.name == "classify" else _answered
        encoded, truncated, longest = encode(config, encoder, split, raw, inputs, targets, throttle(say))
        encoded.write(folder / f"{split}.arrow")
        digest.update(encoded.sha256().encode())
        largest = max(largest, *(int(ids.max()) for ids in encoded.ids))
        split_facts[split] = {
            "read": raw.read,
            "kept": len(raw.inputs),
            "null": raw.null_rows,
            "blank": raw.blank_rows,
            "truncated": truncated,
            "longest": longest,
            "tokens": sum(map(len, encoded.ids)),
        }
    held_out = set(validation.hashes())
    split_facts["train"]["in_validation"] = sum(digest in held_out for digest in training.hashes())
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


def _texts(raw: RawExamples) -> Iterator[str]:
    """Yield the text that a tokenizer is trained on."""
    for texts in raw.inputs:
        yield from texts
    yield from raw.answers


def _classified(
    config: RunConfig,
    encoder: Encoder,
    split: str,
    raw: RawExamples,
    inputs: Sequence[tuple[str, ...]],
    labels: Any,
    tell: Say,
) -> tuple[EncodedSplit, int, int]:
    """Encode texts and pairs; return them with the number of truncated ones and the length of the longest."""
    encoded: list[EncodedInput] = []
    for first in range(0, len(inputs), AT_ONCE):
        try:
            encoded += encoder.encode_inputs(list(inputs[first : first + AT_ONCE]), config.seq_len)
        except ValueError as error:
            raise InputError("seq_len", config.seq_len, f"is too short: {error}") from error
        tell(f"{len(encoded):,} of {len(inputs):,} examples tokenized")
    empty = next((place for item, place in zip(encoded, raw.places) if not len(item.ids)), None)
    if empty is not None:
        raise InputError("data.tokenizer", config.data.tokenizer, f"leaves no token of the text in {empty}")
    truncated = sum(item.length > config.seq_len for item in encoded)
    split_ = EncodedSplit(
        [item.ids for item in encoded],
        [item.type_ids for item in encoded],
        [0] * len(encoded),
        labels,
        [""] * len(encoded),
        raw.rows,
    )
    return split_, truncated, max(item.length for item in encoded)


def _answered(
    config: RunConfig,
    encoder: Encoder,
    split: str,
    raw: RawExamples,
    inputs: Sequence[tuple[str, ...]],
    labels: Any,
    tell: Say,
) -> tuple[EncodedSplit, int, int]:
    """Encode prompts and answers; return them with the number of truncated ones and the length of the longest.

    A prompt is tokenized without its answer, because generation starts from the same ids.
    """
    ids, prompt_lengths, too_long = [], [], []
    longest = truncated = 0
    for first in range(0, len(inputs), AT_ONCE):
        prompts = encoder.encode_bare([prompt for (prompt,) in inputs[first : first + AT_ONCE]])
        answers = encoder.encode_bare(raw.answers[first : first + AT_ONCE])
        for index, (prompt, answer) in enumerate(zip(prompts, answers), first):
            answer = np.append(answer, encoder.eos_id)
            room = config.seq_len - len(answer)
            if split == "validation":
                # The answer that is generated may be longer than the reference.
                room = min(room, max(config.seq_len, _positions(config) or 0) - config.task.max_new_tokens)
            whole = len(encoder.prefix) + len(prompt)
            longest = max(longest, whole + len(answer))
            if whole > room:
                if config.task.truncate == "error" or room <= len(encoder.prefix):
                    too_long.append((whole, room, index))
                    continue
                truncated += 1
                prompt = prompt[len(prompt) - (room - len(encoder.prefix)) :]
            ids.append(np.concatenate([encoder.prefix, prompt, answer]))
            prompt_lengths.append(len(encoder.prefix) + len(prompt))
        tell(f"{len(ids):,} of {len(inputs):,} examples tokenized")
    if too_long:
        raise _too_long(config, split, raw, too_long, len(inputs))
    types = [np.zeros(len(example), dtype=np.int64) for example in ids]
    return EncodedSplit(ids, types, prompt_lengths, labels, raw.answers, raw.rows), truncated, longest


def _too_long(
    config: RunConfig, split: str, raw: RawExamples, found: list[tuple[int, int, int]], count: int
) -> InputError:
    whole, room, index = found[0]
    missing = max(whole - room for whole, room, _ in found)
    others = "task.max_new_tokens generated ones" if split == "validation" else "its answer"
    reason = (
        f"leaves {max(0, room)} tokens for the prompt next to {others}, and the prompt in {raw.places[index]} "
        f"has {whole}; {len(found):,} of {count:,} {split} examples are too long"
    )
    enough = -(-(config.seq_len + missing) // 64) * 64
    cut = " or task.truncate=left" if config.task.truncate == "error" else ""
    return InputError("seq_len", config.seq_len, reason, fix=f"seq_len={enough}{cut}")


def _positions(config: RunConfig) -> int | None:
    """Return the longest sequence that the model can generate; None for tasks that generate nothing."""
    return facts(config.model).max_positions if config.task.name == "answer" else None


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
