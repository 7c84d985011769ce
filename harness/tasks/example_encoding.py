"""From texts of examples to token ids, and what does not fit into the context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.config.model_facts import facts
from harness.config.schema import RunConfig
from harness.data.rows import Split
from harness.data.spool import Say
from harness.data.tokenizer import Encoder
from harness.errors import InputError
from harness.tasks.example_rows import RawExamples
from harness.tasks.example_store import EncodedSplit
from harness.tasks.templates import literal_texts

AT_ONCE = 4096
"""Examples tokenized in one call."""


class Encoded(NamedTuple):
    """A split, encoded.

    Attributes:
        examples: their ids and labels.
        truncated: examples that lost tokens.
        longest: tokens of the longest example before any was cut.
    """

    examples: EncodedSplit
    truncated: int
    longest: int


def encode_texts(
    config: RunConfig, encoder: Encoder, raw: RawExamples, labels: NDArray[Any], tell: Say
) -> Encoded:
    """Encode texts and pairs, cut to ``seq_len`` tokens.

    Args:
        labels: of `encode_labels`, (examples,).
        tell: told how many are done.

    Raises:
        InputError: a text of which the tokenizer leaves nothing; ``seq_len`` that leaves no room for text.
    """
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int8]] = []
    lengths: list[int] = []
    for first, inputs in _batches(raw.inputs):
        try:
            encoded = encoder.encode_inputs(inputs, config.seq_len)
        except ValueError as error:
            raise InputError("seq_len", config.seq_len, f"is too short: {error}") from error
        for index, item in enumerate(encoded, first):
            if not len(item.ids):
                raise _no_token(config, raw.places[index])
            ids.append(item.ids.astype(np.int32))
            types.append(item.type_ids.astype(np.int8))
            lengths.append(item.length)
        tell(f"{len(ids):,} of {len(raw.inputs):,} examples tokenized")
    count = len(ids)
    examples = EncodedSplit(ids, types, [0] * count, labels, [""] * count, raw.rows)
    return Encoded(examples, sum(length > config.seq_len for length in lengths), max(lengths))


def encode_answers(
    config: RunConfig,
    encoder: Encoder,
    split: Split,
    raw: RawExamples,
    prompts: Sequence[tuple[str, ...]],
    shots: int,
    tell: Say,
) -> Encoded:
    """Encode prompts and answers: what the tokenizer puts before a text, prompt, answer, eos.

    The two are tokenized separately, because generation starts from the tokens of the prompt. All of an example fits
    into ``seq_len``; in validation, the prompt and ``task.max_new_tokens`` also fit into the model's positions.
    Special tokens that the templates spell (chat formats do) are these tokens; what the templates begin and end with
    themselves is not put there twice.

    Args:
        prompts: those of ``raw``, with worked examples in front where there are any.
        shots: number of these.
        tell: told how many are done.

    Raises:
        InputError: an example that does not fit, unless ``task.truncate=left`` cuts the start of its prompt off; a
            prompt of which the tokenizer leaves nothing; a column that spells a special token, where the templates do.
    """
    in_prompt = _spelled(encoder, config.task.prompt or "", "task.prompt")
    in_answer = _spelled(encoder, config.task.answer or "", "task.answer")
    spelled = bool(in_prompt or in_answer)
    if spelled:
        in_prompts = (in_prompt + in_answer) * shots + in_prompt
        _check_columns(encoder, raw, [prompt for (prompt,) in prompts], in_prompts)
        _check_columns(encoder, raw, raw.answers, in_answer)
    prefix, reach = encoder.prefix, max(config.seq_len, positions(config) or 0)
    ids: list[NDArray[np.int32]] = []
    prompt_lengths: list[int] = []
    too_long: list[tuple[int, int, int]] = []
    longest = truncated = 0
    for first, batch in _batches(prompts):
        encoded = encoder.encode_bare([prompt for (prompt,) in batch], spelled=spelled)
        answers = encoder.encode_bare(raw.answers[first : first + AT_ONCE], spelled=spelled)
        for index, (prompt, answer) in enumerate(zip(encoded, answers), first):
            if np.array_equal(prompt[: len(prefix)], prefix):
                prompt = prompt[len(prefix) :]
            if not len(prompt):
                raise _no_token(config, raw.places[index])
            if not len(answer) or answer[-1] != encoder.eos_id:
                answer = np.append(answer, encoder.eos_id)
            whole, room = len(prefix) + len(prompt), config.seq_len - len(answer)
            if split == "validation":
                # The answer that is generated may be longer than the reference.
                room = min(room, reach - config.task.max_new_tokens)
            longest = max(longest, whole + len(answer))
            if whole > room:
                if config.task.truncate == "error" or room <= len(prefix):
                    too_long.append((whole, room, index))
                    continue
                truncated += 1
                prompt = prompt[whole - room :]
            ids.append(np.concatenate([prefix, prompt, answer], dtype=np.int32))
            prompt_lengths.append(len(prefix) + len(prompt))
        tell(f"{first + len(batch):,} of {len(prompts):,} examples tokenized")
    if too_long:
        raise _too_long(config, split, raw, too_long)
    labels = np.zeros(len(ids), dtype=np.int64)
    # Generated answers are decoded without special tokens, too.
    references = [encoder.without_special_tokens(text) for text in raw.answers] if in_answer else raw.answers
    examples = EncodedSplit(ids, None, prompt_lengths, labels, references, raw.rows)
    return Encoded(examples, truncated, longest)


def positions(config: RunConfig) -> int | None:
    """Return the longest sequence that the model takes, as far as it is known."""
    return facts(config.model).max_positions


def _spelled(encoder: Encoder, template: str, key: str) -> list[str]:
    return [token for text in literal_texts(template, key) for token in encoder.spelled_tokens(text)]


def _check_columns(encoder: Encoder, raw: RawExamples, texts: Sequence[str], expected: list[str]) -> None:
    """Refuse texts that spell other special tokens than their templates: a column could end a turn of a dialogue."""
    for text, place in zip(texts, raw.places):
        found = encoder.spelled_tokens(text)
        if found != expected:
            surplus = next(iter((Counter(found) - Counter(expected)).elements()), found[0])
            raise InputError(
                "data.tokenizer",
                surplus,
                f"is a special token, which the text of {place} spells; next to templates with special tokens it "
                "would be one",
                fix=f"a template without special tokens, or data without {surplus}",
            )


def _batches(inputs: Sequence[tuple[str, ...]]) -> Iterator[tuple[int, list[tuple[str, ...]]]]:
    for first in range(0, len(inputs), AT_ONCE):
        yield first, list(inputs[first : first + AT_ONCE])


def _no_token(config: RunConfig, place: str) -> InputError:
    return InputError("data.tokenizer", config.data.tokenizer, f"leaves no token of the text in {place}")


def _too_long(
    config: RunConfig, split: Split, raw: RawExamples, found: list[tuple[int, int, int]]
) -> InputError:
    """Return the error for examples (tokens of the prompt, room for it, index) that do not fit."""
    whole, room, index = found[0]
    missing = max(whole - room for whole, room, _ in found)
    others = "its answer"
    if split == "validation":
        others += f" and for task.max_new_tokens={config.task.max_new_tokens}"
    reason = (
        f"leaves {max(0, room)} tokens for the prompt next to {others}, and the prompt in {raw.places[index]} "
        f"has {whole}; {len(found):,} of {len(raw.inputs):,} {split} examples are too long"
    )
    enough = -(-(config.seq_len + missing) // 64) * 64
    cut = " or task.truncate=left" if config.task.truncate == "error" else ""
    return InputError("seq_len", config.seq_len, reason, fix=f"seq_len={enough}{cut}")
