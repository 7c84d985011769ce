"""The engine and the micro-batch that a run gets on GPUs, and the estimate behind the choice."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from harness.config import checks, compose, gpus, memory_estimate
from harness.config.gpus import Gpu
from harness.errors import InputError

GB = 10**9
LARGE = ("model=llama_7b", "precision=bf16", "seq_len=2048", "batch_size=64", "world_size=8")


def on_gpus(monkeypatch: pytest.MonkeyPatch, memory_gb: float | None, *words: str) -> Any:
    """Check a run on a machine with 8 GPUs of this memory."""
    memory = None if memory_gb is None else int(memory_gb * GB)
    monkeypatch.setattr(gpus, "present", lambda: (Gpu("H100", (9, 0), memory),) * 8)
    return checks.check(compose.load(["wandb.mode=disabled", *words]), environ={})


@pytest.mark.parametrize(
    ("memory_gb", "words", "engine", "micro_batch_size"),
    [
        (80, ("model=llama_60m", "batch_size=64", "seq_len=128", "world_size=8"), "ddp", 8),
        (80, LARGE, "fsdp2", 4),
        (192, LARGE, "ddp", 2),
        (80, (*LARGE, "micro_batch_size=1"), "fsdp2", 1),
        (80, (*LARGE, "model.activation_checkpointing=true"), "fsdp2", 8),
        # The memory is unknown: as on a CPU.
        (None, LARGE, "ddp", 8),
        # A name is taken at its word.
        (80, (*LARGE, "engine=ddp", "micro_batch_size=4"), "ddp", 4),
        (80, (*LARGE, "engine=zero2"), "zero2", 2),
    ],
)
def test_what_fits_is_chosen(
    monkeypatch: pytest.MonkeyPatch, memory_gb: float | None, words: Any, engine: str, micro_batch_size: int
) -> None:
    config = on_gpus(monkeypatch, memory_gb, *words)
    assert (config.engine.name, config.micro_batch_size) == (engine, micro_batch_size)


def test_on_cpus_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "present", lambda: ())
    config = checks.check(compose.load(["wandb.mode=disabled", *LARGE]), environ={})
    assert (config.engine.name, config.micro_batch_size) == ("ddp", 8)
    assert not [line for line in checks.warnings(config) if "device memory" in line]


def test_what_cannot_fit_names_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"finds no engine for the 16 GB .* fix: more processes"):
        on_gpus(monkeypatch, 16, *LARGE)
    words = (
        "model=llama_1b",
        "precision=bf16",
        "seq_len=2048",
        "batch_size=64",
        "world_size=8",
        "micro_batch_size=8",
    )
    with pytest.raises(InputError, match=r"fix: engine=fsdp2 micro_batch_size=\d") as failure:
        on_gpus(monkeypatch, 24, *words)
    # Control: what the error says is accepted.
    advice = failure.value.fields()["fix"].partition(";")[0].split()
    advised = on_gpus(monkeypatch, 24, *words[:-1], *advice)
    assert not [line for line in checks.warnings(advised) if "device memory" in line]


def test_an_engine_by_name_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    config = on_gpus(monkeypatch, 80, *LARGE, "engine=ddp")
    (line,) = [line for line in checks.warnings(config) if "device memory" in line]
    assert "ddp needs about" in line
    assert "engine=fsdp2 would fit" in line


def test_the_routers_cut_is_not_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of routed experts depends on the micro-batch, which is part of the run's identity."""
    monkeypatch.setattr(memory_estimate, "router_coefficient", lambda model: 0.01)
    config = on_gpus(monkeypatch, 192, *LARGE, "engine=ddp")
    assert config.micro_batch_size == 8


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from harness.config import checks, compose, gpus; from harness.config.gpus import Gpu\n"
        "gpus.present = lambda: (Gpu('H100', (9, 0), 80 * 10**9),) * 8\n"
        f"checks.check(compose.load({[*LARGE, 'optimizer=sumo']!r}), environ={{}}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "words",
    [
        ("optimizer=adamw", "engine=ddp"),
        ("optimizer=sumo", "engine=fsdp2"),
        pytest.param(
            ("optimizer=muon", "engine=ddp", "model.activation_checkpointing=true"), marks=pytest.mark.slow
        ),
        pytest.param(("optimizer=galore", "engine=zero1"), marks=pytest.mark.slow),
        pytest.param(("optimizer=adamw", "engine=fsdp2", "precision=fp32"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_estimate_is_near_the_plan_and_not_below(words: tuple[str, ...]) -> None:
    """Without the constant for the CUDA context, which would hide a wrong term.

    From 3 % below to 40 % above: the largest phase of the plan counts batches of the optimizer and groups of weights
    one by one, and the estimate rounds them up.
    """
    from harness.plan.estimate import plan

    keys = ["model=llama_350m", "seq_len=1024", "batch_size=16", "world_size=4", *words]
    if not any(word.startswith("precision=") for word in words):
        keys.append("precision=bf16")
    config = checks.check(compose.load(["wandb.mode=disabled", *keys]), environ={}, devices=0)
    assert config.micro_batch_size is not None
    asked = memory_estimate.Choice(
        config.engine.name, config.micro_batch_size, config.model.activation_checkpointing == "full"
    )
    planned = plan(config)["needed_bytes"] * memory_estimate.RESERVE - memory_estimate.CONTEXT_BYTES
    needed = memory_estimate.needed_by(config, config.optimizer.options, 4, asked)
    estimated = needed * memory_estimate.RESERVE - memory_estimate.CONTEXT_BYTES
    assert 0.97 * planned < estimated < 1.4 * planned
