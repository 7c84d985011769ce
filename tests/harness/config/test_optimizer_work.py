"""`engine.optimizer_work=auto`: divided on GPUs where orthogonalizing takes longer than sending, else not."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config import checks, compose, launcher
from harness.config.gpus import Gpu
from harness.config.optimizer_work import resolved
from harness.errors import InputError
from optimizers.presets import resolve

ONE_B = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
SIXTY_M = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]


def work(
    preset: str = "muon",
    shapes: list[tuple[int, int]] = ONE_B,
    gpu: str = "NVIDIA H100 80GB HBM3",
    gpus: int = 8,
    world_size: int = 8,
    **options: Any,
) -> str:
    found = [Gpu(gpu)] * gpus
    return resolved("auto", resolve(preset, options), shapes, found, world_size)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "split"),
        ({"gpu": "NVIDIA A100-SXM4-80GB"}, "split"),
        ({"gpu": ""}, "split"),  # of another machine
        ({"preset": "muon_svd"}, "split"),
        ({"preset": "muon_polar_express"}, "split"),
        # FLOP per byte grow with the short side: small matrices gain too little.
        ({"shapes": SIXTY_M}, "replicated"),
        # PCIe, or a network of 50 GB/s, carries the updates more slowly than bf16 units compute them …
        ({"gpu": "NVIDIA H100 PCIe"}, "replicated"),
        ({"world_size": 16}, "replicated"),
        # … but not more slowly than fp32 ones.
        ({"world_size": 16, "orthogonalizer_dtype": "float32"}, "split"),
        ({"preset": "sumo"}, "replicated"),
        ({"preset": "galore"}, "replicated"),
        ({"preset": "adamw"}, "replicated"),
        ({"shapes": []}, "replicated"),
        ({"gpu": "a GPU that nobody knows"}, "replicated"),
        ({"gpus": 0}, "replicated"),
        ({"world_size": 1}, "replicated"),
    ],
)
def test_auto_compares_the_time_of_products_and_of_sending(arguments: dict[str, Any], expected: str) -> None:
    assert work(**arguments) == expected


@pytest.mark.parametrize("given", ["split", "replicated"])
def test_what_is_given_stays(given: Any) -> None:
    assert resolved(given, resolve("sumo"), SIXTY_M, [], 8) == given


def checked(monkeypatch: pytest.MonkeyPatch, gpus: int, *words: str) -> str:
    monkeypatch.setattr(launcher, "visible_gpus", lambda environ: (Gpu("NVIDIA H200", (9, 0)),) * gpus)
    config = compose.load(["model=llama_1b", "batch_size=64", *words])
    run = checks.check(config, {}, gpus)
    assert checks.check(run, {}, gpus) == run
    return run.engine.optimizer_work


def test_a_checked_configuration_holds_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    muon = ("optimizer=muon", "world_size=8", "engine=ddp")
    assert checked(monkeypatch, 8, *muon) == "split"
    assert checked(monkeypatch, 0, *muon) == "replicated"
    assert checked(monkeypatch, 8, *muon, "engine.optimizer_work=replicated") == "replicated"
    assert checked(monkeypatch, 8, "optimizer=sumo", "world_size=8", "engine=ddp") == "replicated"
    # Not read there; its value is that of what is done.
    assert checked(monkeypatch, 8, "optimizer=muon", "world_size=8", "engine=fsdp2") == "replicated"


def test_a_bad_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer_work.*(?s:.*)replicated"):
        compose.load(["engine.optimizer_work=sometimes"])
