"""What `without_places` cuts, and what it must leave alone."""

from __future__ import annotations

import pytest

from harness.record.places import without_places


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/users/alice/data/text.jsonl", "text.jsonl"),
        ("/users/alice/My Texts/a.txt", "a.txt"),
        ("[Errno 2] No such file: '/users/alice/x.bin'", "[Errno 2] No such file: 'x.bin'"),
        (
            "optbench train data.files=[/a/b/c.txt,/a/d.txt] runs_dir=/scratch/alice/",
            "optbench train data.files=[c.txt,d.txt] runs_dir=alice",
        ),
        ("~/runs/one went", "one went"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text: str, kept: str) -> None:
    assert without_places({"a": [text]}) == {"a": [kept]}


@pytest.mark.parametrize(
    "text",
    [
        "val/loss and/or train/loss", "https://arxiv.org/abs/2203.15556", "1 / 2", "runs/quickstart/sumo-seed0",
        "± 0.01 tokens/s", "× ddp × fp32", "../shared/x", "",
    ],
)  # fmt: skip
def test_all_else_stays(text: str) -> None:
    assert without_places(text) == text


def test_what_is_no_text_stays() -> None:
    assert without_places({"n": 3, "x": None, "t": (1.5, True)}) == {"n": 3, "x": None, "t": [1.5, True]}
