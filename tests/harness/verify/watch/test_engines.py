"""`watch` on DDP, FSDP2 and accelerate: two ranks, real wrappers; defects of distribution are red by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from harness.audit import watch
from tests.harness.verify.watch.loops import batches, loss_of, net, split, train

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool


def muon(model: nn.Module) -> list[Any]:
    hidden, rest = split(model)
    return [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=2e-3)]


def result(report: Any) -> tuple[bool | None, list[str], dict[str, str]]:
    """Return what a rank can send: verdict, defects, details by parameter."""
    details = {p.name: p.explanation.detail for p in report.parameters}
    return report.is_right, [finding.name for finding in report.defects], details


def under_ddp(rank: int, defect: str) -> tuple[bool | None, list[str], dict[str, str]]:
    """Train replicas on half batches; `defect` spoils what DDP reduced, or one replica."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = net()
    replica = DistributedDataParallel(model) if defect != "gradients not reduced" else model
    opts = muon(model)
    with watch(replica, opts, quiet=True) as report:
        for ids in batches(3):
            loss_of(replica, ids.chunk(2)[rank]).backward()
            for p in model.parameters():
                assert p.grad is not None
                if defect == "gradients halved":
                    p.grad /= dist.get_world_size()
                if defect == "gradients summed":
                    p.grad *= dist.get_world_size()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for o in opts:
                o.step()
                o.zero_grad()
            if defect == "unsynchronized basis, replicas" and rank == 1:
                with torch.no_grad():
                    model.up.weight += 1e-6
    return result(report)


@pytest.mark.parametrize(
    "defect",
    [
        "",
        "gradients halved",
        # The same measurement with another factor.
        pytest.param("gradients summed", marks=pytest.mark.slow),
        "gradients not reduced",
    ],
)
def test_ddp(two_ranks: RankPool, defect: str) -> None:
    first, second = two_ranks.run(under_ddp, defect)
    if defect == "gradients not reduced":
        # Replicas that train on their own data drift apart, too.
        assert first[1] == ["unsynchronized basis, replicas", "gradients not reduced"] * 2 or set(
            first[1]
        ) == {
            "unsynchronized basis, replicas",
            "gradients not reduced",
        }
    else:
        assert set(first[1]) == ({defect} if defect else set())
    assert first[0] is (not defect)
    assert second == (None, [], {}), "rank 0 has the report"


def test_replicas_that_differ(two_ranks: RankPool) -> None:
    first, _ = two_ranks.run(under_ddp, "unsynchronized basis, replicas")
    assert set(first[1]) == {"unsynchronized basis, replicas"}


class LocalMuon(torch.optim.Optimizer):
    """Muon that orthogonalizes the rows that a rank holds (the defect), on DTensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from tests.harness.verify.watch.defective import quintic

        for group in self.param_groups:
            for p in group["params"]:
                here: Tensor = p.grad.to_local()
                moment = self.state[p].setdefault("momentum_buffer", torch.zeros_like(here))
                moment.mul_(0.95).add_(here)
                p.to_local().add_(quintic(moment), alpha=-0.02)


def under_fsdp2(rank: int, kind: str) -> tuple[bool | None, list[str], dict[str, str]]:
    """Train shards on half batches."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    for part in (model.qkv, model.up, model.down):
        fully_shard(part)
    fully_shard(model)
    hidden, rest = split(model)
    if kind == "local":
        opts: Any = [LocalMuon(hidden), torch.optim.AdamW(rest, lr=2e-3)]
    elif kind == "torch":
        opts = muon(model)
    else:
        opts = optimizers.build(kind, model.named_parameters(), modules=model, lr=0.01)
    with watch(model, opts, quiet=True) as report:
        train(model, opts, [ids.chunk(2)[rank] for ids in batches(3)], max_norm=0.5)
    return result(report)


@pytest.mark.parametrize("kind", ["torch", pytest.param("muon", marks=pytest.mark.slow), "sumo", "adamw"])
def test_fsdp2(two_ranks: RankPool, kind: str) -> None:
    first, second = two_ranks.run(under_fsdp2, kind)
    assert first[:2] == (True, []), first
    assert len(first[2]) == 7
    assert second == (None, [], {})


def test_shard_local_newton_schulz_under_fsdp2(two_ranks: RankPool) -> None:
    first, _ = two_ranks.run(under_fsdp2, "local")
    assert first[1] == ["shard-local Newton–Schulz"], first
    assert "2 row slices" in first[2]["up.weight"]


def same_bits(rank: int) -> bool:
    """Train DDP replicas with and without `watch`; return whether the weights are the same bits."""
    from torch.nn.parallel import DistributedDataParallel

    ends = []
    for watching in (False, True):
        model = net()
        replica = DistributedDataParallel(model)
        opts = muon(model)
        data = [ids.chunk(2)[rank] for ids in batches(4)]
        if watching:
            with watch(replica, opts, quiet=True):
                train(model, opts, data, max_norm=0.5, call=replica)
        else:
            train(model, opts, data, max_norm=0.5, call=replica)
        ends.append([p.detach().clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_ddp_trains_the_same_bits(two_ranks: RankPool) -> None:
    assert two_ranks.run(same_bits) == [True, True]


def test_accelerate_with_accumulation() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        raw = net()
        hidden, rest = split(raw)
        groups = [
            {"params": hidden, "use_muon": True},
            {"params": rest, "use_muon": False, "lr": 2e-3},
        ]
        from tests.harness.verify.watch.defective import Muon

        model, optimizer = accelerator.prepare(raw, Muon(groups))
        with watch(model, optimizer, quiet=True) as report:
            for ids in batches(6):
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, ids))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert result(report)[:2] == (True, []), str(report)
    assert [f.micro_batches for f in report.optimizers[0].facts] == [2, 2, 2]
    assert report.optimizers[0].max_norm == 0.5


@pytest.mark.parametrize("given", [True, False])
def test_the_trainer(given: bool, tmp_path: Any) -> None:
    """Pass the Trainer alone; its optimizer is passed to it, or built by it when it starts."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for ids in batches(4) for row in ids]
    built = optimizers.build("muon", model.named_parameters(), modules=model, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(built, lambda step: 1.0 - 0.1 * step)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        optimizers=(built, scheduler) if given else (None, None),
    )
    before = len(trainer.callback_handler.callbacks)
    with watch(trainer, quiet=True) as report:
        trainer.train()
    assert len(trainer.callback_handler.callbacks) == before
    assert result(report)[:2] == (True, []), str(report)
    assert report.steps == 3
    assert report.optimizers[0].max_norm == 0.5
    rules = {p.explanation.rule for p in report.parameters if p.is_hidden}
    assert rules == ({"orthogonalized"} if given else {"adamw"})
