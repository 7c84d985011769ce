"""Robustness of a checkpoint: closed forms of a model whose feature is the embedding itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.memorization import robustness
from analysis.memorization.windows import Rows

CLASSES, SIZE, SEQ = 7, 5, 20


class Linear(nn.Module):
    """Predict the next token from the embedding of the last one by a linear head."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(CLASSES, SIZE, dtype=torch.float64)
        self.head = nn.Linear(SIZE, CLASSES, bias=False, dtype=torch.float64)
        self.head.weight.data *= scale

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def base_model(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Any:
        return SimpleNamespace(
            last_hidden_state=self.table(input_ids) if inputs_embeds is None else inputs_embeds
        )


def rows_of(ids: np.ndarray, labels: np.ndarray) -> Rows:
    numbers = np.arange(len(ids))
    return Rows(numbers, ids, labels, numbers, numbers)


def distances(model: Linear) -> np.ndarray:
    """Signed distance of each token's embedding to the nearest decision against each label: (token, label)."""
    table, weight = model.table.weight.detach().numpy(), model.head.weight.detach().numpy()
    found = np.empty((CLASSES, CLASSES))
    for token in range(CLASSES):
        for label in range(CLASSES):
            ways = np.delete(weight[label] - weight, label, axis=0)
            found[token, label] = (ways @ table[token] / np.linalg.norm(ways, axis=1)).min()
    return found


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_margins_and_radii_of_a_linear_model(scale: float) -> None:
    model = Linear(scale)
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(CLASSES, size=(2, 40, SEQ))
    found = robustness.describe(model, rows_of(ids, labels))
    used = np.linspace(0, 39, robustness.WINDOWS).round().astype(int)
    ids, labels = (part[used, : robustness.WINDOW] for part in (ids, labels))
    table, signed = model.table.weight.detach().numpy(), distances(model)
    margins = signed[ids, labels] / np.linalg.norm(table, axis=1)[ids]
    assert found["head_margin"]["median"] == pytest.approx(np.median(margins), rel=1e-12)
    assert found["tokens_right"] == (margins > 0).mean()
    assert (found["tokens"], found["windows"]) == (margins.size, robustness.WINDOWS)
    # Of the prediction after each window, which only its last token decides.
    radii = signed.max(1)[ids[:, -1]] / np.median(np.linalg.norm(table, axis=1))
    excess = found["embedding_radius"]["median"] / np.median(radii) - 1.0
    assert 0.0 <= excess <= 1e-3
    for key in ("head_margin", "embedding_radius"):
        assert found[key]["low"] <= found[key]["median"] <= found[key]["high"]


def test_control_wrong_predictions_have_negative_margins_and_the_same_radius() -> None:
    model = Linear()
    ids = np.tile(np.arange(CLASSES), (CLASSES, 3))[:, :SEQ]
    order = distances(model).argsort(1)
    right, wrong = (robustness.describe(model, rows_of(ids, order[:, k][ids])) for k in (-1, 0))
    assert right["tokens_right"] == 1.0
    assert wrong["tokens_right"] == 0.0
    assert right["head_margin"]["low"] > 0.0 > wrong["head_margin"]["high"]
    assert right["embedding_radius"] == wrong["embedding_radius"]
