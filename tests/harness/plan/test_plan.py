"""The plan against what real ranks hold and send."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from harness import cli
from harness.config import checks, compose
from harness.config.errors import InputError
from harness.plan.command import main, plan

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

WORDS = ["wandb.mode=disabled"]


def configured(*words: str) -> Any:
    given = {word.partition("=")[0] for word in words}
    defaults = [word for word in ("model=llama_tiny", "batch_size=8") if word.partition("=")[0] not in given]
    return checks.check(compose.load([*WORDS, *defaults, *words]), environ={})


def real(rank: int, words: list[str]) -> dict[str, Any]:
    """Runs on each rank: two optimizer steps of the very model on random gradients."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import optimizers
    from harness import model
    from harness.optimizer import shard_axes
    from harness.plan.rank import shards_of

    config = configured(*words)
    network = model.build(config.model, seed=0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    named: list[tuple[str, Any]] = []
    if config.engine.name == "fsdp2":
        axes = shard_axes(config, network, shards_of(config))
        for name, p in network.named_parameters():
            cut = distribute_tensor(p.detach(), mesh, [Shard(axes.get(name, 0))])
            named.append((name, torch.nn.Parameter(cut)))
    else:
        named = list(network.named_parameters())
    options = {**config.optimizer.options, "lr": config.optimizer.lr}
    if config.engine.name == "ddp":
        options |= {"process_group": dist.group.WORLD, "work": config.engine.optimizer_work}
    optimizer: Any = optimizers.build(config.optimizer.name, named, modules=network, **options)
    sent = []
    for _ in range(2):
        for _, p in named:
            p.grad = torch.randn_like(p)
        before = sum(optimizer.bytes_sent().values())
        optimizer.step()
        sent.append(sum(optimizer.bytes_sent().values()) - before)
    return {"sent": sent, "state": optimizer.state_bytes()}


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer=sumo", "engine=fsdp2"],
        ["optimizer=galore", "engine=fsdp2"],
        ["optimizer=muon", "engine=fsdp2"],
        ["optimizer=sumo", "engine=ddp", "engine.optimizer_work=split"],
        ["optimizer=sumo", "engine=ddp"],
    ],
    ids=" ".join,
)
def test_the_plan_is_what_two_ranks_hold_and_send(two_ranks: RankPool, words: list[str]) -> None:
    """Byte for byte, the worst of the ranks: an ordinary step and one with a refresh."""
    words = [*words, "world_size=2"]
    found = plan(configured(*words))
    results = two_ranks.run(real, words)
    for kind in results[0]["state"]:
        assert found["per_rank"][f"optimizer/{kind}"] == max(r["state"][kind] for r in results)
    traffic = found["traffic_per_step"]
    assert traffic["optimizer"] == round(max(r["sent"][1] for r in results))
    refresh = traffic.get("optimizer/refresh", traffic["optimizer"])
    assert refresh == round(max(r["sent"][0] for r in results))


def test_a_cluster_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "model=llama_60m", "optimizer=sumo", "engine=fsdp2", "--world-size", "32", "--json"]
    assert cli.main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["world_size"] == 32
    assert document["fits"] is None
    # 58.07 M parameters in fp32 over 32 ranks, cut evenly but for norms.
    assert document["per_rank"]["weights"] == pytest.approx(58.07e6 * 4 / 32, rel=0.01)


def test_what_fully_shard_sends_is_what_was_counted_once() -> None:
    """Counted at the dispatcher on 64 ranks of torch's fake process group, bf16 weights, fp32 reduction, whole
    buffers: all-gathers of 160 MiB, reduce-scatters of 222 MiB."""
    words = [
        "model=llama_60m",
        "optimizer=adamw",
        "precision=bf16",
        "engine=fsdp2",
        "world_size=64",
        "batch_size=64",
    ]
    sent = plan(configured(*words))["traffic_per_step"]
    assert sent["weights"] == pytest.approx(160 * 2**20 * 63 / 64, rel=0.01)
    assert sent["gradients"] == pytest.approx(222 * 2**20 * 63 / 64, rel=0.01)


def test_muon_divides_its_moments_and_sums_to_the_formula() -> None:
    """mn numbers of each matrix, whole at owners: 4·mn·(W-1)/W² there and as much back, on average."""
    one = plan(configured("optimizer=muon", "engine=fsdp2", "world_size=2"))
    whole = plan(configured("optimizer=muon", "engine=ddp", "world_size=2"))
    assert whole["traffic_per_step"]["optimizer"] == 0
    assert one["per_rank"]["optimizer/moment"] == pytest.approx(
        whole["per_rank"]["optimizer/moment"] / 2, rel=0.1
    )


def test_bad_input() -> None:
    with pytest.raises(InputError, match="--world-size"):
        main(["--world-size", "many"])
    with pytest.raises(InputError, match="only optimizers of optbench"):
        plan(configured("optimizer.target=torch.optim.SGD", "optimizer.lr=0.1", "engine=fsdp2"))
