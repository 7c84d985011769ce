"""`watch` on a DeepSpeed engine: its built-in Muon on ZeRO 1 to 3, a client optimizer, and its known traps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.harness.verify.watch.loops import batches, loss_of, net

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool


def trained(
    rank: int, stage: int, clip: float, optimizer: str, accumulation: int = 1
) -> tuple[bool | None, list[str], dict[str, str], dict[str, Any]]:
    """Train under DeepSpeed and `watch`; return verdict, defects, details and scales by parameter, on rank 0."""
    from harness.audit import watch
    from harness.engines.deepspeed import _library
    from optimizers.layouts import deepspeed_binding

    deepspeed = _library()
    linear = torch.nn.functional.linear
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = net()
    config: dict[str, Any] = {
        "train_batch_size": 2 * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "reduce_scatter": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
    }
    client: Any = None
    if optimizer == "built-in":
        config["optimizer"] = {
            "type": "Muon",
            "params": {
                "lr": 0.02,
                "momentum": 0.95,
                "weight_decay": 0.0,
                "ns_method": "standard",
                "adam_lr": 2e-3,
            },
        }
    elif optimizer == "flat torch":
        client = torch.optim.AdamW(model.parameters(), lr=2e-3)
    else:
        import optimizers

        client = optimizers.build(
            optimizer, model.named_parameters(), modules=model, lr=0.02, layout="partitioned"
        )
    parameters = list(model.parameters()) if client is None else None
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, optimizer=client, config=config
    )
    try:
        if client is not None and hasattr(client, "attach"):
            deepspeed_binding.attach(client, engine)
        with watch(engine, quiet=True) as report:
            for ids in batches(3):
                for part in ids.chunk(2)[rank].chunk(accumulation):
                    engine.backward(loss_of(engine, part))
                    engine.step()
    finally:
        engine.destroy()
        torch.nn.functional.linear = linear
    details = {p.name: f"{p.claim.kind}: {p.explanation.detail}" for p in report.parameters}
    scales = {p.name: [f.scales for f in p.explanation.fits] for p in report.parameters}
    return report.is_right, [f.name for f in report.defects], details, {**scales, "text": str(report)}


# DeepSpeed compiles Adam with g++ for its Muon, and its Newton–Schulz iteration with inductor: a minute on two cores.
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_built_in_muon_without_clipping(two_ranks: RankPool, stage: int) -> None:
    right, defects, details, facts = two_ranks.run(trained, stage, 0.0, "built-in")[0]
    assert defects == [], facts["text"]
    assert right is True
    assert details["up.weight"].startswith("matrix: newton_schulz of momentum 0.95, nesterov")


@pytest.mark.slow  # as above; test_defects.py has this clipping without DeepSpeed
def test_the_built_in_muon_with_the_default_clipping_clips_the_update(two_ranks: RankPool) -> None:
    _, defects, _, facts = two_ranks.run(trained, 1, 1.0, "built-in")[0]
    assert defects == ["clipping after orthogonalization"], facts["text"]


@pytest.mark.parametrize(
    ("stage", "optimizer"), [(2, "muon"), pytest.param(3, "flat torch", marks=pytest.mark.slow)]
)
def test_client_optimizers(two_ranks: RankPool, stage: int, optimizer: str) -> None:
    right, defects, _, facts = two_ranks.run(trained, stage, 0.5, optimizer)[0]
    assert defects == [], facts["text"]
    assert right is True
