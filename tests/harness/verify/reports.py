"""Reports of ranks as `harness.verify.certify_rank` makes them, for tests of verdicts."""

from __future__ import annotations

from typing import Any

from harness.verify.cells import MAX_NORM

NAMES = ["layers.0.w", "layers.1.w"]


def report(**more: Any) -> dict[str, Any]:
    """Return what a rank of a good cell reports, with other values where they are named."""
    return {
        "state": "finished",
        "grad_norms": [1.0, 2.0],
        "received_norms": [MAX_NORM, MAX_NORM],
        "orthogonalized": [dict.fromkeys(NAMES, 1)] * 2,
        "bytes_per_step": 10.0,
        "collectives_per_step": 3,
        "digests": {},
        "matrices": 2,
        "matrix_names": NAMES,
        "replay_error": 1e-6,
        "replay_worst": NAMES[0],
        "end_to_end_error": 1e-5,
        "delivery_error": 1e-7,
        **more,
    }
