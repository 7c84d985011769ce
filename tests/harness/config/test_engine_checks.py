"""What an engine needs, which keys are its own, and a user's DeepSpeed file or launcher that says something else."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.config import checks, deepspeed_config
from harness.config.schema import EngineConfig, RunConfig
from harness.errors import InputError

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def run_check(environ: dict[str, str] | None = None, world_size: int = 4, **changes: Any) -> RunConfig:
    engine = {
        key.removeprefix("engine__"): changes.pop(key) for key in list(changes) if key.startswith("engine__")
    }
    config = RunConfig.model_validate({"engine": engine, "world_size": world_size, **changes})
    return checks.check(config, environ or {}, 0)


def refusal(environ: dict[str, str] | None = None, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        run_check(environ, **changes)
    assert "fix: " in str(caught.value)
    return str(caught.value)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"engine__name": "hsdp"},
        ["engine.replicas: null is required with engine=hsdp", "allowed: 1, 2, 4", "replicas=2"],
    ),
    ({"engine__name": "hsdp", "engine__replicas": 3}, ["engine.replicas: 3 does not divide world_size = 4"]),
    (
        {"engine__name": "fsdp2", "engine__replicas": 2},
        ["engine.replicas: 2 has no effect with engine=fsdp2", "hsdp"],
    ),
    (
        {"engine__name": "ddp", "engine__shard_axis": 1},
        ["engine.shard_axis: 1 has no effect with engine=ddp"],
    ),
    ({"engine__name": "zero3", "engine__reshard_after_forward": False}, ["has no effect with engine=zero3"]),
    ({"engine__name": "ddp", "engine__reduce_every_micro_batch": True}, ["has no effect with engine=ddp"]),
    (
        {"engine__name": "fsdp2", "engine__reduce_every_micro_batch": True, "precision": "bf16_pure"},
        ["engine.reduce_every_micro_batch: true would add", "fix: engine.reduce_every_micro_batch=auto"],
    ),
    (
        {"engine__name": "fsdp2", "engine__check_replicas_every": 5},
        ["engine.check_replicas_every: 5 has no effect with engine=fsdp2", "hsdp"],
    ),
    ({"engine__name": "fsdp2", "engine__optimizer_work": "split"}, ["engine.optimizer_work: split"]),
    (
        {"engine__name": "fsdp2", "engine__config_file": "x.json"},
        ["engine.config_file: x.json has no effect"],
    ),
    (
        {"engine__name": "zero2", "engine__config_file": "no.json"},
        ["engine.config_file: no.json cannot be read"],
    ),
    ({"engine__name": "zero1", "precision": "bf16_pure"}, ["precision: bf16_pure", "fp32 master weights"]),
    (
        {"engine__name": "zero3", "optimizer": {"target": "torch.optim.Muon", "lr": 0.1}},
        ["optimizer.target: torch.optim.Muon gets flat 1-D slices under zero3", "AdamW", "engine=fsdp2"],
    ),
    (
        {"engine__name": "zero1", "optimizer": {"target": "elsewhere.AdamW", "lr": 0.1}},
        ["optimizer.target: elsewhere.AdamW"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), BAD, ids=[parts[0] for _, parts in BAD])
def test_what_an_engine_cannot_do_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    text = refusal(**changes)
    for part in parts:
        assert part in text


def test_what_an_engine_can_do_passes() -> None:
    for name in ("fsdp2", "zero0", "zero1", "zero2", "zero3"):
        assert run_check(engine__name=name).engine.name == name
        assert run_check(engine__name=name, world_size=1).engine.name == name
    assert run_check(engine__name="hsdp", engine__replicas=4).engine.replicas == 4
    plugin = {"target": "torch.optim.AdamW", "lr": 0.1}
    assert run_check(engine__name="zero2", optimizer=plugin).optimizer.target == plugin["target"]
    # Whole weights, or DTensors: an optimizer of matrices can see them.
    for name in ("zero0", "fsdp2"):
        assert run_check(engine__name=name, optimizer={**plugin, "target": "torch.optim.Muon"})
    checked = run_check(engine__name="zero1", engine__optimizer_work="replicated")
    assert checks.check(checked, {}, 0) == checked


def test_auto_stays_with_whole_weights() -> None:
    assert run_check(world_size=1).engine.name == "single"
    assert run_check(world_size=4).engine.name == "ddp"


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    assert "needs the package deepspeed, which is not installed" in refusal(engine__name="zero2")
    assert run_check(engine__name="fsdp2")


LAUNCHERS: list[tuple[dict[str, str], dict[str, Any], str]] = [
    (DEEPSPEED, {}, "engine.name: auto disagrees with the launcher, which asks for DeepSpeed"),
    (DEEPSPEED, {"engine__name": "fsdp2"}, "which asks for DeepSpeed"),
    (DEEPSPEED, {"engine__name": "zero3"}, "asks for ZeRO stage 2; fix: engine=zero2"),
    ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {"engine__name": "zero2"}, "clips at 0.5"),
    (
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        {"engine__name": "zero2"},
        "--offload_optimizer_device, which is not supported",
    ),
    (
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a.json"},
        {"engine__name": "zero2", "engine__config_file": "b.json"},
        "engine.config_file: b.json disagrees with the launcher, which was given a.json",
    ),
    (FSDP, {"engine__name": "ddp"}, "which asks for FSDP"),
    ({**FSDP, "FSDP_VERSION": "1"}, {"engine__name": "fsdp2"}, "asks for FSDP 1"),
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {"engine__name": "fsdp2"}, "parameters in host memory"),
    (
        {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"},
        {"engine__name": "fsdp2"},
        "engine.reshard_after_forward: true disagrees with the launcher, which was given false",
    ),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "was given --mixed_precision bf16; fix: precision=bf16"),
]


@pytest.mark.parametrize(("environ", "changes", "part"), LAUNCHERS, ids=[part for *_, part in LAUNCHERS])
def test_a_launcher_that_says_something_else_is_refused(
    environ: dict[str, str], changes: dict[str, Any], part: str
) -> None:
    assert part in refusal(environ, **changes)


LEFT: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}),
    ({"ACCELERATE_USE_FSDP": "1"}, {}),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"engine__name": "zero2"}),
    ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"engine__name": "fsdp2"}),
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "True"}, {"engine__name": "fsdp2"}),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}),
    ({"TORCHDYNAMO_DISABLE": "1"}, {"model": {"compile": True}}),
    ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, {}),
    ({"WORLD_SIZE": "8"}, {}),
    ({"WORLD_SIZE": "8", "RANK": "0"}, {}),
    ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, {}),
    ({"RANK": "3"}, {}),
    ({"LOCAL_RANK": "1"}, {}),
    ({"RANK": "9" * 5000}, {}),
]


@pytest.mark.parametrize(("environ", "changes"), LEFT, ids=[" ".join(environ) for environ, _ in LEFT])
def test_the_fix_unsets_what_is_left_in_the_environment(
    environ: dict[str, str], changes: dict[str, Any]
) -> None:
    fix = refusal(environ, **changes).partition("fix: ")[2]
    named = [name for name in environ if re.search(rf"unset [A-Z_0-9 ]*\b{name}\b", fix)]
    assert named, fix
    assert run_check({name: value for name, value in environ.items() if name not in fix}, **changes)


def test_control_variables_that_change_nothing_pass() -> None:
    harmless = {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "RANK": "0"}
    harmless |= {"TORCHDYNAMO_DISABLE": "1", "LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": ""}
    assert run_check(harmless)


def test_a_launcher_that_says_the_same_passes(tmp_path: Path) -> None:
    assert run_check({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, engine__name="zero2")
    assert run_check({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "true"}, engine__name="fsdp2")
    file = write(tmp_path, {"zero_optimization": {"stage": 3}})
    checked = run_check({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}, engine__name="zero3")
    assert checked.engine.config_file == file


def write(folder: Path, content: Any) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


FILES: list[tuple[Any, str]] = [
    ([], "is not a DeepSpeed configuration"),
    ({"gradient_clipping": 1.0}, "decides gradient_clipping, which is optbench's key max_grad_norm"),
    ({"train_batch_size": 8}, "decides train_batch_size, which is optbench's key batch_size"),
    ({"bf16": {"enabled": True}}, "decides bf16, which is optbench's key precision"),
    ({"optimizer": {"type": "Muon"}}, "decides optimizer, which is optbench's key optimizer"),
    ({"scheduler": {"type": "WarmupLR"}}, "decides scheduler, which is optbench's key schedule"),
    (
        {"zero_optimization": {"stage": 3}},
        "asks for ZeRO stage 3, and the engine is zero2; fix: engine=zero3",
    ),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
    ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_optimization.zero_hpz_partition_size"),
    ({"tensor_parallel": {"autotp_size": 2}}, "asks for tensor_parallel, which is not supported"),
]


@pytest.mark.parametrize(("content", "part"), FILES, ids=[part for _, part in FILES])
def test_a_deepspeed_file_that_contradicts_us_is_refused(content: Any, part: str, tmp_path: Path) -> None:
    assert part in refusal(engine__name="zero2", engine__config_file=write(tmp_path, content))


def test_what_a_deepspeed_file_may_say_arrives(tmp_path: Path) -> None:
    content = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": "auto"},
        "communication_data_type": "bf16",
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": "auto",
            "offload_optimizer": {"device": "none"},
        },
    }
    with pytest.raises(InputError, match="decides optimizer"):
        run_check(engine__name="zero2", engine__config_file=write(tmp_path, content))
    del content["optimizer"]
    checked = run_check(engine__name="zero2", engine__config_file=write(tmp_path, content), max_grad_norm=0.5)
    effective = deepspeed_config.effective(checked)
    assert effective["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert effective["communication_data_type"] == "bf16"
    assert (effective["train_batch_size"], effective["gradient_clipping"]) == (16, 0.5)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_everything_that_changes_the_result_is_written_down(
    name: str, precision: str, max_grad_norm: float | None
) -> None:
    checked = run_check(
        engine__name=name, precision=precision, max_grad_norm=max_grad_norm, micro_batch_size=2
    )
    effective = deepspeed_config.effective(checked)
    # Stage 0 leaves whole gradients to our own clipping and precision.
    own = name == "zero0"
    assert effective["gradient_clipping"] == (0.0 if own or max_grad_norm is None else 0.3)
    assert effective["bf16"]["enabled"] == (precision == "bf16" and not own)
    assert effective["fp16"]["enabled"] == (precision == "fp16" and not own)
    assert effective["zero_optimization"]["stage"] == int(name[-1])
    assert effective["gradient_accumulation_steps"] == 2
    accumulates_in_fp32 = precision == "bf16" and name in ("zero2", "zero3")
    assert effective.get("data_types") == ({"grad_accum_dtype": "fp32"} if accumulates_in_fp32 else None)


def test_deepspeeds_own_default_clips() -> None:
    """Why it is always written: the day this default goes, so may the sentence in docs/engines.md."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    assert GRADIENT_CLIPPING_DEFAULT == 1.0


def test_every_engine_has_a_file_and_every_key_an_owner() -> None:
    from typing import get_args

    from harness.config.engine_checks import _OWNERS
    from harness.config.schema import EngineName
    from harness.config.sources import options

    assert set(options("engine")) == set(get_args(EngineName))
    assert set(EngineConfig.model_fields) == {"name", "threads", "bucket_mb", "timeout_s", *_OWNERS}
