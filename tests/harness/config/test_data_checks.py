"""Keys of the data that the source or the task does not use are refused, each with what to type."""

from __future__ import annotations

import pytest

from harness.config import compose, data_checks
from harness.errors import InputError

CLASSIFY = ("task=classify", "task.text=[a]", "task.label=b")
FILES = ("data.files=[x]", "data.validation_files=[y]")


def refusal(words: tuple[str, ...]) -> str:
    """Return the error about these words; empty: they are accepted."""
    try:
        data_checks.check(compose.load(words))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data=json", *FILES), "data.validation_files: ['y'] is for tasks with examples"),
        (("data=c4", "data.validation_split=validation"), "data.validation_split: validation is for tasks"),
        (("data=jsonl", "data.quotes=literal"), "data.quotes: literal is for data.source=csv and tsv"),
        (("data=jsonl", "data.columns=[a]"), "data.columns: ['a'] is for data.source=csv and tsv"),
        (("data=csv", "data.columns=[]"), "data.columns: [] names no column; fix: data.columns=null"),
        (("data=csv", "data.columns=[a,b,a]"), "data.columns: a is given twice"),
        (CLASSIFY, "data.source: package holds text, not examples"),
        (("data=csv", *CLASSIFY), "data.files: [] names no file to train on; fix: data.files=[FILE.csv]"),
        (("data=csv", "data.files=[x]", *CLASSIFY), "data.validation_files: [] names no file to evaluate on"),
        (
            ("data.source=datasets", "data.dataset=x", "data.validation_split=train", *CLASSIFY),
            "data.validation_split: train is the split that is trained on",
        ),
        (("data=csv", *FILES, "data.mode=padded", *CLASSIFY), "data.mode: padded is for task=pretrain"),
        (("data=csv", *FILES, "data.field=x", *CLASSIFY), "fix: task.text=[COLUMN]"),
        (("data=csv", *FILES, "data.max_tokens=10", *CLASSIFY), "data.max_tokens: 10 is for task=pretrain"),
        (("data=csv", *FILES, "data.validation_tokens=10", *CLASSIFY), "data.validation_tokens: 10 is for"),
        (
            ("data.canaries.seed=1",),
            "data.canaries.count: 0 inserts no canaries, and their other keys are set",
        ),
        (
            ("data.canaries.count=10001",),
            "data.canaries.count: 10001 is wrong; allowed: a whole number ≥ 0 and ≤ 10000",
        ),
        (("data.canaries.count=3",), "less than one for each of the 4 data.canaries.copies"),
        (
            ("data.canaries={count:4,copies:[2,1,2]}",),
            "names a number twice; fix: data.canaries.copies=[1,2]",
        ),
        (("data.canaries.count=8", "data.mode=padded"), "data.canaries.count: 8 needs data.mode=packed"),
        (
            ("data.canaries.count=8", "data=csv", *FILES, *CLASSIFY),
            "data.canaries.count: 8 is for task=pretrain",
        ),
    ],
)
def test_a_key_without_use_is_refused(words: tuple[str, ...], message: str) -> None:
    assert message in refusal(words)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("data=c4",),
        ("data.canaries={count:8,copies:[1,4],seed:2}",),
        ("data=tsv", "data.files=[x]", "data.columns=[a,b]", "data.quotes=literal", "data.field=a"),
        ("data=tsv", *FILES, "data.columns=[a,b]", *CLASSIFY),
        ("data.source=datasets", "data.dataset=x", "data.validation_split=validation", *CLASSIFY),
    ],
)
def test_keys_that_are_used_pass(words: tuple[str, ...]) -> None:
    assert not refusal(words)
