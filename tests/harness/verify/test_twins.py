"""Twins see the samples of their run: each once, in another order, whatever a micro-batch consists of."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from harness.verify.twins import reordered

MicroBatch = tuple[Tensor, ...]


def batch(rows: list[int], width: int, parts: int = 2) -> MicroBatch:
    """Return a micro-batch whose rows say everywhere which sample they are; the last part is a label."""
    ids = torch.tensor(rows)
    return (*(ids[:, None].expand(-1, width) for _ in range(parts - 1)), ids)


def rows_of(batches: list[MicroBatch]) -> Counter[int]:
    """Return how often each sample occurs; its parts must have stayed together."""
    for parts in batches:
        *tables, labels = parts
        assert all(torch.equal(table, labels[:, None].expand_as(table)) for table in tables)
    return Counter(int(label) for parts in batches for label in parts[-1])


def test_samples_of_a_step_are_dealt_out_anew() -> None:
    given = [batch(list(range(start, start + 4)), width=3, parts=3) for start in (0, 4)]
    generator = torch.Generator().manual_seed(0)
    sizes: set[int] = set()
    mixed = False
    for _ in range(12):
        made = reordered(given, generator)
        assert rows_of(made) == Counter(range(8))
        sizes |= {len(parts[0]) for parts in made}
        mixed |= any(_is_mixed(parts[-1]) for parts in made)
    assert sizes == {1, 2, 4}
    assert mixed, "no sample left its micro-batch"


def test_rows_that_are_padded_to_another_length_stay_in_their_micro_batch() -> None:
    given = [batch([0, 1, 2, 3], width=3), batch([4, 5, 6, 7], width=5)]
    generator = torch.Generator().manual_seed(0)
    orders = set()
    for _ in range(12):
        made = reordered(given, generator)
        assert rows_of(made) == Counter(range(8))
        for table, labels in made:
            assert table.shape[1] == (3 if int(labels.max()) < 4 else 5)
            assert not _is_mixed(labels)
        orders.add(tuple(int(label) for _, labels in made for label in labels))
    assert len(orders) > 1


def _is_mixed(labels: Tensor) -> bool:
    return bool((labels < 4).any() and (labels >= 4).any())
