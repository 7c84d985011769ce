"""The controls of an audit: each defect in a cell where it must be detected. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.verify.audit.cells import CELLS, EngineCell
from harness.verify.audit.targets import Target

MUON = "harness.verify.audit.defects.DefectiveMuon"

LOOP_DEFECTS: Mapping[str, str] = {
    "micro-batch momentum": "momentum and Newton–Schulz run once per micro-batch",
    "clipping forgotten": "gradients arrive unclipped",
    "gradients halved": "gradients are averaged once too often",
}
"""Defect of the training loop, put in by `harness.verify.audit.loop_defects` → its meaning."""


@dataclass(frozen=True)
class Control:
    """A defect and the cell in which it must be detected.

    Attributes:
        name: of `defects.DEFECTS` or `LOOP_DEFECTS`.
        target: the optimizer; its defect is active on several ranks only, so that the reference is right.
        cell: where it runs.
    """

    name: str
    target: Target
    cell: EngineCell

    @property
    def loop_defect(self) -> str | None:
        """Return the defect of the loop; None: it is the optimizer's."""
        return self.name if self.name in LOOP_DEFECTS else None


def _control(name: str, label: str) -> Control:
    cell = next(cell for cell in CELLS if cell.label == label)
    # The matrix rule is right there, and takes no flat vectors.
    has_own = name not in LOOP_DEFECTS and name != "flat parameters routed to AdamW"
    return Control(name, Target(MUON, {"defect": name} if has_own else {}), cell)


CONTROLS: tuple[Control, ...] = (
    # Found in large engines in September 2026.
    _control("plain SGD under Muon's name", "zero0"),
    _control("no matrix routed", "fsdp2"),
    _control("stale gradient of offload", "zero0"),
    _control("whole QKV orthogonalized", "fsdp2"),
    _control("padding rows change the scale", "fsdp2 uneven"),
    _control("flat parameters routed to AdamW", "zero1"),
    # The controls of `optbench certify`.
    _control("shard-local Newton–Schulz", "fsdp2"),
    _control("clipping after orthogonalization", "ddp"),
    _control("micro-batch momentum", "ddp accumulation"),
    _control("unsynchronized basis, shards", "fsdp2"),
    _control("unsynchronized basis, replicas", "ddp"),
    _control("smooth cut", "fsdp2"),
    _control("clipping forgotten", "ddp clipping"),
    _control("gradients halved", "fsdp2"),
)
