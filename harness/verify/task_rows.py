"""Rows for the cells of tasks other than pretraining: a class that words decide, and answers of unequal length.

They are a function of nothing, so that every rank and every session writes the same files. Torch-free.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from harness.files import atomic

TRAIN, VALIDATION = 192, 24
_NOUNS = "light water earth heaven day night field river"
_MORE = "stone bread king house wind fire tree star"
_WORDS = f"{_NOUNS} {_MORE}".split()
LABELS = ("first", "second", "third")


def data_words(folder: Path) -> list[str]:
    """Write the rows into a folder and return the overrides of the data that read them.

    Args:
        folder: exists; several processes may write the same files into it.
    """
    names = f"rows{TRAIN}.jsonl", f"rows{VALIDATION}.jsonl"
    rows = _rows()
    for name, part in zip(names, (rows[:TRAIN], rows[TRAIN:]), strict=True):
        atomic.write_text(folder / name, "".join(json.dumps(row) + "\n" for row in part))
    train, validation = (folder / name for name in names)
    return [
        "data=jsonl",
        f"data.files=[{train}]",
        f"data.validation_files=[{validation}]",
        f"data.cache_dir={folder / 'cache'}",
        "data.vocab_size=300",
    ]


def task_words(task: str) -> list[str]:
    """Return the overrides that choose a task over these rows."""
    if task == "classify":
        return ["task=classify", "task.text=[text]", "task.label=label"]
    return [
        "task=answer",
        'task.prompt="{text}:"',
        'task.answer=" {answer}"',
        "task.extract=text",
        "task.max_new_tokens=4",
        # A row of long words is longer than the cells' sequences.
        "task.truncate=left",
    ]


def _rows() -> list[dict[str, str]]:
    generator = random.Random(0)
    rows = []
    for _ in range(TRAIN + VALIDATION):
        words = generator.choices(_WORDS, k=generator.randint(2, 5))
        # From one word to four: a mean over micro-batches is not the mean over answers.
        answer = " ".join(sorted(set(words))[: generator.randint(1, 4)])
        label = LABELS[_WORDS.index(words[0]) % len(LABELS)]
        rows.append({"text": " ".join(words), "label": label, "answer": answer})
    return rows
