"""When the subspaces of a group's matrices are renewed: all in one step, or spread over the interval. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Shape = tuple[int, int]

STAGGERED_SIDE = 2048
"""Short side from which `refresh_stagger="auto"` spreads refreshes: the matrices of 1B models and larger. There a
refresh of all matrices takes seconds, and holds the test matrices and products of all of them; below it takes a
fraction of the model's own step."""

STAGGER_GROUPS = 8
"""Steps over which "auto" spreads them. A refresh costs as much as five to eight ordinary steps, so that an eighth of
it costs about one; more groups would leave less in each of them for the processes to divide."""


def resolved_stagger(stagger: bool | str, shapes: Iterable[Shape]) -> bool | str:
    """Return `refresh_stagger` with "auto" replaced by False where no matrix is large enough for it."""
    if stagger == "auto" and all(min(shape) < STAGGERED_SIDE for shape in shapes):
        return False
    return stagger


def refresh_offsets(shapes: Sequence[Shape], options: Mapping[str, Any]) -> list[int]:
    """Return what is added to t of each matrix when its refresh is decided: (t + offset) mod interval = 0.

    Args:
        shapes: of the matrices that are stepped together, in order.
        options: of their group; "refresh_stagger": True spreads all of them evenly over the interval, "auto" the large
            ones in `STAGGER_GROUPS` steps, False none.
    """
    first, interval = options.get("refresh_offset", 0), options.get("refresh_interval", 1)
    stagger = options.get("refresh_stagger", False)
    if stagger != "auto":
        return [first + (number * interval // len(shapes) if stagger else 0) for number in range(len(shapes))]
    large = [number for number, shape in enumerate(shapes) if min(shape) >= STAGGERED_SIDE]
    offsets = [first] * len(shapes)
    for position, number in enumerate(large):
        # Neighbours share a step, so that a group holds matrices of all shapes: work that processes can divide.
        group = position * STAGGER_GROUPS // len(large)
        offsets[number] += group * interval // STAGGER_GROUPS
    return offsets
