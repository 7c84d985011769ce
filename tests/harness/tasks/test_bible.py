"""The test material itself: labels that follow from the text, the same on every machine, and nothing in both splits."""

from __future__ import annotations

from .bible import pair_rows, question_rows, similarity_rows


def test_labelled_verses_are_what_they_say() -> None:
    pairs = pair_rows(260)
    assert pairs == pair_rows(260) != pair_rows(260, seed=1)
    assert {row["label"] for row in pairs} == {0, 1}
    assert len({row["sentence1"] for row in pairs}) == 260
    scores = [row["score"] for row in similarity_rows(260)]
    # One verse in two translations shares more words than two verses do.
    assert min(scores[1::2]) > sum(scores[0::2]) / 130
    assert max(scores) <= 5
    for row in question_rows(60):
        word, verse = row["question"].split('"', 2)[1:]
        words = "".join(c if c.isalpha() else " " for c in verse.partition(":")[2].lower()).split()
        assert row["answer"].endswith(f"#### {words.count(word)}")
