"""A checkpoint of two FSDP2 ranks, resumed in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.verify.audit.checks_ranks import resume_across
from harness.verify.audit.document import Check
from harness.verify.audit.targets import Target
from tests.distributed.pool import RankPool

DEFECTIVE = "tests.harness.verify.audit.defective"


def resumed(_rank: int, target: Target, folder: str) -> Check | None:
    """Run the check on this rank."""
    return resume_across(target, folder)


@pytest.mark.parametrize(
    ("target", "passed", "words"),
    [
        (Target("torch.optim.AdamW", {"lr": 2e-3}), True, "2 FSDP2 ranks"),
        (Target(f"{DEFECTIVE}.Forgets"), False, "differs by"),
        (Target(f"{DEFECTIVE}.TakesShards"), None, "already differs on FSDP2 shards"),
    ],
    ids=["AdamW", "state in an attribute", "works on its shard"],
)
def test_resume_across(
    two_ranks: RankPool, tmp_path: Path, target: Target, passed: bool | None, words: str
) -> None:
    found, other = two_ranks.run(resumed, target, str(tmp_path))
    assert other is None
    assert isinstance(found, Check)
    assert found.passed is passed, found.detail
    assert words in found.detail
