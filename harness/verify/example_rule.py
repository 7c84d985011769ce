"""A rule such as a user's package may bring, certified to show that layouts hand plug-ins whole matrices.

It is installed in the certifying processes only, by the entry point that a package would declare.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from optimizers.interfaces import MatrixBatch, Update
from optimizers.rule import Rule


class UnitMomentum(Rule):
    """Momentum divided by its Frobenius norm: M ← βM + G, W ← W - η·α·√(mn)·M/‖M‖_F.

    The norm is one of the whole matrix, so a shard or slice of it gives another update.
    """

    doc: ClassVar[str] = "momentum of unit root mean square"
    source: ClassVar[str] = (
        "normalized gradient descent, Nesterov 1984; Cutkosky & Mehta 2020, arXiv 2002.03305"
    )
    defaults: ClassVar[Mapping[str, Any]] = {"momentum": 0.9}

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the moment: mn numbers."""
        return {"moment": shape}

    def update(self, b: MatrixBatch) -> Update:
        """Take one step; see the class' formula."""
        moment = b.blend("moment", b.gradient, b.options["momentum"], 1.0)
        norm = moment.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-12)
        return Update(b.options["alpha"] * math.sqrt(math.prod(b.shape)) * moment / norm)


def install(folder: Path, name: str) -> None:
    """Register the rule in this process, as an installed package would.

    Args:
        folder: scratch; the package's metadata is written there.
        name: of the rule.
    """
    from optimizers import presets

    metadata = folder / "optbench_example_rule-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: optbench_example_rule\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[{presets.ENTRY_POINTS}]\n{name} = {__name__}:{UnitMomentum.__name__}\n"
    )
    sys.path.append(str(folder))
    presets._entry_points.cache_clear()
