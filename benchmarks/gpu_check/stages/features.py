"""Stage 10: claims of single features that only a GPU can prove."""

from __future__ import annotations

from benchmarks.gpu_check.record import StageContext


def run(context: StageContext) -> None:
    """Check the claims one after the other."""
