"""Extraction from a model that continues one sequence with certainty: all of it, no other one, nothing shifted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.memorization import extraction
from analysis.memorization.windows import Rows

VOCABULARY, SEQ_LEN = 50, 12


class Counting(LlamaForCausalLM):
    """Says t + 1 after t."""

    def forward(self, *args: Any, **keys: Any) -> Any:
        out: Any = super().forward(*args, **keys)
        ids = args[0] if args else keys["input_ids"]
        after = (ids[:, -out.logits.shape[1] :] + 1) % VOCABULARY
        out.logits = out.logits + 1e3 * torch.nn.functional.one_hot(after, VOCABULARY)
        return out


@pytest.fixture(scope="module")
def model() -> Counting:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=7,
    )
    return Counting(shape).eval()


def rows(sequences: list[NDArray[np.int64]]) -> Rows:
    table = np.array(sequences)
    index = np.arange(len(table))
    return Rows(index, table[:, :-1], table[:, 1:], index, index)


@pytest.mark.parametrize(("prefix", "length"), [(5, 8), (1, 12), (12, 1), (4, 3)])
def test_a_known_sequence_is_extracted_and_another_one_is_not(
    model: Counting, prefix: int, length: int
) -> None:
    # Rows hold seq_len + 1 tokens; 7, which ends texts, is among those of the first.
    counting = [(np.arange(SEQ_LEN + 1) + start) % VOCABULARY for start in (0, 20, 45)]
    assert extraction.extract(model, rows(counting), prefix, length).tolist() == [1.0, 1.0, 1.0]
    backwards = [row[::-1].copy() for row in counting]
    assert extraction.extract(model, rows(backwards), prefix, length).tolist() == [0.0, 0.0, 0.0]
    # Control: what follows is one token off.
    shifted = [np.where(np.arange(SEQ_LEN + 1) < prefix, row, (row + 1) % VOCABULARY) for row in counting]
    assert extraction.extract(model, rows(shifted), prefix, length).tolist() == [0.0, 0.0, 0.0]


def test_the_last_label_is_the_last_token_compared(model: Counting) -> None:
    row = np.arange(SEQ_LEN + 1)
    row[-1] = 30
    assert extraction.extract(model, rows([row]), 5, 8).tolist() == [7 / 8]


def test_splits_are_described_over_documents() -> None:
    shares, documents = np.array([1.0, 1.0, 0.5, 0.0]), np.array([0, 0, 1, 2])
    found = extraction.describe((shares, documents), (shares * 0, documents), 5, 8)
    assert found["train"]["tokens_right"] == found["difference"]["tokens_right"] == 0.625
    assert (found["train"]["whole"], found["train"]["documents"]) == (0.5, 3)
    assert found["validation"]["low"] == found["validation"]["high"] == 0.0
    # Deviations by document: 0.75, −0.125, −0.625; times 3/2, over 4².
    variance = 1.5 * (0.75**2 + 0.125**2 + 0.625**2) / 16
    half = found["difference"]["high"] - 0.625
    # t with two degrees of freedom, 97.5 %.
    assert half == pytest.approx(4.302653 * variance**0.5, rel=1e-6)
