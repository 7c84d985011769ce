"""The blocks of docs/use_elsewhere.md do what the page says: each is cut out of it and run."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

PAGE = Path(__file__).parents[2] / "docs" / "use_elsewhere.md"
STEPS = 12


def blocks() -> dict[str, list[str]]:
    """Heading → its Python blocks."""
    found: dict[str, list[str]] = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        found[part.splitlines()[0]] = re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
    return found


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def batches(count: int = STEPS) -> list[torch.Tensor]:
    """Rows that count upwards modulo 32 from a random start: learnable within a dozen steps."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 32, (count, 8, 1), generator=generator)
    return list((starts + torch.arange(16)) % 32)


def loss_of(net: LlamaForCausalLM) -> float:
    net.eval()
    with torch.no_grad():
        ids = batches(1)[0]
        loss = float(net(input_ids=ids, labels=ids).loss)
    net.train()
    return loss


def run(heading: str, index: int = 0, **given: Any) -> dict[str, Any]:
    """Run a block; returns its names."""
    names: dict[str, Any] = {"model": model(), "batches": batches(), "steps": STEPS, **given}
    names["before"] = loss_of(names["model"])
    exec(compile(blocks()[heading][index], f"{PAGE.name}: {heading}", "exec"), names)
    names["after"] = loss_of(names["model"])
    return names


def rules_of(optimizer: Any) -> dict[str, str]:
    return {route.name: route.rule for route in optimizer.routes}


def assert_routed(optimizer: Any, rule: str) -> None:
    """The 14 projections of two layers take the rule, and nothing else does."""
    rules = rules_of(optimizer)
    on_rule = {name for name, taken in rules.items() if taken == rule}
    assert on_rule == {name for name in rules if "proj" in name}
    assert len(on_rule) == 14
    assert {rules[name] for name in rules if name not in on_rule} == {"adamw"}


# The uniform guess costs ln 32 = 3.47 nats; a block whose optimizer did nothing stays there.
FELL = 0.75
# Half batches averaged over two processes: another order of summation, 12 steps. Measured: 1e-6.
SAME = 1e-5


def test_every_block_is_run_here() -> None:
    expected = {
        "A plain loop": 1,
        "The rule of each parameter": 1,
        "fp16": 2,
        "Hugging Face Trainer": 1,
        "Replicas (DDP)": 1,
        "Shards (FSDP2)": 1,
    }
    assert {heading: len(found) for heading, found in blocks().items()} == expected


def test_a_plain_loop() -> None:
    names = run("A plain loop")
    assert names["after"] < FELL * names["before"]
    assert_routed(names["optimizer"], "sumo")
    rates = {group["rule"]: group["lr"] for group in names["optimizer"].param_groups}
    assert rates == pytest.approx({"sumo": 0.001, "adamw": 0.001})  # the schedule ends at a tenth


def test_the_control_without_a_step_learns_nothing() -> None:
    text = blocks()["A plain loop"][0].replace("    optimizer.step()\n", "")
    names: dict[str, Any] = {"model": model(), "batches": batches(), "steps": STEPS}
    before = loss_of(names["model"])
    exec(text, names)
    assert loss_of(names["model"]) > FELL * before


def test_muon_and_its_routes(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("The rule of each parameter")
    assert names["after"] < FELL * names["before"]
    assert_routed(names["optimizer"], "muon")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == len(list(names["model"].parameters()))
    assert re.search(r"model\.embed_tokens\.weight +adamw +\S", printed)
    assert {group["rule"]: group["lr"] for group in names["optimizer"].param_groups} == {
        "muon": 0.02,
        "adamw": 3e-3,
    }


def test_without_modules_or_names_the_embedding_takes_the_rule() -> None:
    """What the page warns of."""
    from optimizers import SUMO

    net = model()
    by_name = SUMO(net.named_parameters(), lr=0.01)
    assert_routed(by_name, "sumo")
    plain = SUMO(net.parameters(), lr=0.01)
    assert [r.rule for r in plain.routes].count("sumo") == 16


def explosive(net: LlamaForCausalLM, at: int) -> None:
    """Make the gradient of the head's weight infinite in the backward pass number `at`."""
    calls = iter(range(10**6))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if next(calls) == at else gradient

    net.lm_head.weight.register_hook(spoil)


def test_the_scaler_leaves_a_bad_step_out() -> None:
    net = model()
    explosive(net, at=3)
    names = run("fp16", 0, model=net)
    assert names["after"] < FELL * names["before"]
    assert names["scaler"].get_scale() == 512.0
    counted = {state["step"] for state in names["optimizer"].state.values()}
    assert counted == {STEPS - 1}
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_a_masked_step_is_as_if_it_had_not_been() -> None:
    net = model()
    explosive(net, at=3)
    names = run("fp16", 1, model=net)
    assert names["after"] < FELL * names["before"]
    assert {state["step"] for state in names["optimizer"].state.values()} == {STEPS - 1}
    clean = batches()
    del clean[3]
    without = run("fp16", 1, batches=clean)
    for masked, never in zip(net.parameters(), without["model"].parameters()):
        assert torch.equal(masked, never)


def test_the_trainer_and_its_checkpoint(tmp_path: Path) -> None:
    names = run("Hugging Face Trainer", folder=str(tmp_path / "whole"))
    assert names["after"] < FELL * names["before"]
    assert_routed(names["optimizer"], "sumo")
    assert {state["step"] for state in names["optimizer"].state.values()} == {STEPS}
    first = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    assert (first / "optimizer.pt").exists()

    resumed = blocks()["Hugging Face Trainer"][0].replace(
        "trainer.train()", "trainer.train(resume_from_checkpoint=checkpoint)"
    )
    again: dict[str, Any] = {"model": model(), "batches": batches(), "steps": STEPS}
    again |= {"folder": str(tmp_path / "resumed"), "checkpoint": str(first)}
    exec(resumed, again)
    for whole, parts in zip(names["model"].parameters(), again["model"].parameters()):
        assert torch.equal(whole, parts)

    foreign = resumed.replace("lr=0.01,", "lr=0.01, rank=4,")
    other: dict[str, Any] = {**again, "model": model()}
    with pytest.raises(ValueError, match="rank"):
        exec(foreign, other)


def on_a_rank(rank: int, heading: str, old: str = "", new: str = "") -> list[torch.Tensor]:
    """Runs on each rank: a block, `old` in it replaced by `new`, on this rank's half of each batch; rank 1 finds
    other singular vectors. Returns the weights, whole."""
    from torch.distributed.tensor import DTensor

    from optimizers.rules.parts import subspaces

    text = blocks()[heading][0]
    assert old in text
    net = model()
    halves = [ids.chunk(2)[rank] for ids in batches()]
    originals = disturbed(subspaces) if rank == 1 else {}
    try:
        exec(text.replace(old, new), {"model": net, "batches": halves})
    finally:
        for name, original in originals.items():
            setattr(subspaces, name, original)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return [p.detach() for p in whole]


def assert_same_training(weights: list[torch.Tensor]) -> None:
    """Against one process on whole batches: each parameter's change over the run, Frobenius norm."""
    text = blocks()["Replicas (DDP)"][0]
    for old, new in (("DistributedDataParallel(model)", "model"), (", process_group=dist.group.WORLD", "")):
        assert old in text
        text = text.replace(old, new)
    net = model()
    exec(text, {"model": net, "batches": batches()})
    for start, alone, found in zip(model().parameters(), net.parameters(), weights):
        change = alone.detach() - start.detach()
        assert float((found - alone.detach()).norm()) < SAME * float(change.norm())


def disturbed(module: Any) -> dict[str, Any]:
    """Turn the bases that this process makes, as another machine's LAPACK may; returns the originals.

    A change of sign would not do: with transport no bit of the update depends on it.
    """
    originals = {name: getattr(module, name) for name in ("svd_basis", "randomized_basis")}
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5)))[0]
    for name, original in originals.items():
        setattr(module, name, lambda *a, make=original, **k: make(*a, **k) @ turn)
    return originals


def test_replicas_stay_equal(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(on_a_rank, "Replicas (DDP)")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second))
    assert_same_training(first)


def test_the_control_without_a_group_drifts_apart(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(on_a_rank, "Replicas (DDP)", ", process_group=dist.group.WORLD")
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(first, second))


def test_shards_train_what_one_process_trains(two_ranks: RankPool) -> None:
    first, _ = two_ranks.run(on_a_rank, "Shards (FSDP2)")
    assert_same_training(first)


def test_deepcopy_and_state_dict_carry_over() -> None:
    names = run("A plain loop")
    optimizer = names["optimizer"]
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(optimizer.state.values(), twin.state.values()):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine if isinstance(mine[k], torch.Tensor))
