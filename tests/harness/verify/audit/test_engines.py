"""Cells on real ranks: safe and wrong where theory says so; refusals and crashes are told apart and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.verify.audit import ranks
from harness.verify.audit.cells import CELLS, LATE_STEPS, EngineCell
from harness.verify.audit.document import CellReport
from harness.verify.audit.given_model import GivenModel, given
from harness.verify.audit.session import cell_report
from harness.verify.audit.targets import Target, parse, probe
from tests.distributed.pool import RankPool
from tests.harness.verify.audit.ranked import Ranks

RULES = "tests.harness.verify.audit.rules"


def cell_of(label: str) -> EngineCell:
    return next(cell for cell in CELLS if cell.label == label)


def probed(word: str) -> Target:
    data = given("even", steps=LATE_STEPS)
    (target,) = parse([word])
    return probe(target, lambda: GivenModel(data.start), lambda model: model(data.gradients[0]))


def audited(pool: RankPool, word: str, label: str, folder: Path) -> CellReport:
    target = probed(word)
    measured = ranks.measure_class(target)
    path = folder / "trajectory.pt"
    return cell_report(Ranks(pool), cell_of(label), target, measured, path, ranks.judge_cell)


ENGINES = [
    "ddp",
    "ddp split",
    "fsdp2 uneven",
    "fsdp2 empty",
    "zero0",
    "zero1",
    "zero2 clipping",
    "zero3 bf16",
]


@pytest.mark.parametrize("label", ENGINES)
def test_an_elementwise_rule_is_safe(label: str, two_ranks: RankPool, tmp_path: Path) -> None:
    report = audited(two_ranks, "torch.optim.AdamW", label, tmp_path)
    assert report.verdict == "safe", report.reason
    assert report.replay_error is not None
    assert report.replay_error < 1e-4


@pytest.mark.parametrize("label", ["zero1", "zero3"])
def test_the_optimizer_that_zero_builds_itself_is_the_audited_one(
    label: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    """DeepSpeed replaces Adagrad by a new one over its flat tensors."""
    report = audited(two_ranks, "torch.optim.Adagrad", label, tmp_path)
    assert report.verdict == "safe", report.reason


@pytest.mark.parametrize(("rule", "verdict"), [("Halved", "refused"), ("Momentum", "safe")])
def test_below_the_rounding_of_bf16_weights_equal_bits_alone_are_safe(
    rule: str, verdict: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    """At this rate rounding may move bf16 weights by more than an update, so that half an update is within bounds."""
    report = audited(two_ranks, f"{RULES}.{rule}(lr=0.01)", "ddp bf16", tmp_path)
    assert report.verdict == verdict, report.reason
    assert bool(report.replay_error) == (rule == "Halved")


@pytest.mark.slow
def test_an_elementwise_rule_is_safe_on_replicas_of_shards(four_ranks: RankPool, tmp_path: Path) -> None:
    report = audited(four_ranks, "torch.optim.AdamW", "hsdp", tmp_path)
    assert report.verdict == "safe", report.reason


@pytest.mark.parametrize(
    ("rule", "label", "verdict", "reason"),
    [
        ("Rowwise", "fsdp2 uneven", "safe", ""),
        ("Rowwise", "zero1", "wrong", "needs whole rows"),
        ("Matrix", "ddp split", "safe", ""),
        ("Matrix", "zero1", "wrong", "needs whole matrices"),
        ("Matrix", "zero3 uneven", "wrong", "needs whole matrices"),
        ("Counting", "zero1", "safe", ""),
        ("Counting", "zero3", "safe", ""),
        ("Global", "ddp", "safe", ""),
        ("Global", "ddp split", "wrong", "needs all parameters"),
        ("Drawing", "ddp", "safe", "only with the same random seed"),
        ("RankDependent", "ddp", "wrong", "copies of the weights"),
        ("Late", "zero2", "wrong", "needs whole matrices"),
        ("Refusing", "zero1", "refused", "flat slices are not supported"),
    ],
)
def test_a_verdict_follows_from_the_class(
    rule: str, label: str, verdict: str, reason: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    report = audited(two_ranks, f"{RULES}.{rule}", label, tmp_path)
    assert report.verdict == verdict, report.reason
    assert reason in report.reason
    assert (report.first_step is None) == (verdict == "safe")


def test_an_operation_that_dtensors_lack_is_a_crash_and_names_it(two_ranks: RankPool, tmp_path: Path) -> None:
    report = audited(two_ranks, "pytorch_optimizer.Shampoo", "fsdp2", tmp_path)
    assert (report.verdict, report.first_step) == ("crashes", 1)
    assert "DTensor" in report.reason


ELEMENTWISE = ("torch.optim.AdamW", "pytorch_optimizer.Lion", "pytorch_optimizer.Adan(foreach=False)")
WHOLE = (
    "pytorch_optimizer.Lamb",
    "pytorch_optimizer.AdaFactor",
    "torch.optim.Adafactor",
    "pytorch_optimizer.CAME",
    "pytorch_optimizer.SOAP",
    "pytorch_optimizer.Muon",
    "torch.optim.Muon",
    "pytorch_optimizer.Shampoo",
)


@pytest.mark.slow
@pytest.mark.parametrize("word", [*ELEMENTWISE, "muon", "sumo"])
def test_ground_truth_safe_everywhere(
    word: str, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    for cell in CELLS:
        if cell.world_size > 1:
            pool = four_ranks if cell.world_size == 4 else two_ranks
            report = audited(pool, word, cell.label, tmp_path)
            assert report.verdict == "safe", (cell.label, report.reason)


@pytest.mark.slow
@pytest.mark.parametrize("word", WHOLE)
def test_ground_truth_wrong_on_flat_slices_and_right_on_whole_parameters(
    word: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    for label in ("zero1", "zero2", "zero3", "zero1 uneven", "zero3 bf16"):
        assert audited(two_ranks, word, label, tmp_path).verdict in ("wrong", "refused"), label
    for label in ("ddp", "ddp split", "ddp bf16", "zero0"):
        assert audited(two_ranks, word, label, tmp_path).verdict == "safe", label
