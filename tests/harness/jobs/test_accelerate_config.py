"""What the user once answered to `accelerate config` reaches no process of ours, whichever option it was."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config import config_args
from accelerate.utils.launch import prepare_multi_gpu_env

from harness.config import compose
from harness.config.checks import check
from harness.jobs import launch
from harness.process import gpu_environment

HOSTILE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "fp16",
    "use_cpu": True,
    "debug": True,
    "num_processes": 3,
    "machine_rank": 1,
    "num_machines": 2,
    "gpu_ids": "0,1",
    "main_process_ip": "10.9.9.9",
    "main_process_port": 12345,
    "rdzv_backend": "c10d",
    "same_network": True,
    "main_training_function": "other",
    "enable_cpu_affinity": True,
    "fp8_config": {"backend": "TE", "fp8_format": "E4M3"},
    "deepspeed_config": {"zero_stage": 3, "gradient_accumulation_steps": 7},
    "fsdp_config": {"fsdp_version": 1, "fsdp_offload_params": True},
    "parallelism_config": {"parallelism_config_tp_size": 2},
    "megatron_lm_config": {"megatron_lm_tp_degree": 2},
    "mpirun_config": {"mpirun_hostfile": "hosts"},
    "downcast_bf16": True,
    "tpu_name": "tpu",
    "tpu_zone": "zone",
    "tpu_use_cluster": True,
    "tpu_use_sudo": True,
    "command_file": "file",
    "commands": ["ls"],
    "tpu_vm": ["vm"],
    "tpu_env": ["A=1"],
    "dynamo_config": {"dynamo_backend": "inductor", "dynamo_mode": "max-autotune"},
}
"""An answer to every question, different from the default."""


def _environment(words: list[str]) -> dict[str, str]:
    """Return the environment that `accelerate launch` gives its processes."""
    parser = accelerate_launch.launch_command_parser()
    arguments, _, _ = accelerate_launch._validate_launch_command(parser.parse_args(words))
    return prepare_multi_gpu_env(arguments)


def _words(scratch: Path) -> list[str]:
    config = check(compose.load(["world_size=2"]), {}, 2)
    command, _ = launch.launch_command(config, ["world_size=2"], scratch)
    words = command[command.index("accelerate.commands.launch") + 1 :]
    words[words.index("--main_process_port") + 1] = "29411"
    return words


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "default_config.yaml"
    file.write_text(yaml.safe_dump(HOSTILE))
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(file))
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    return file


def test_every_option_of_such_a_file_is_tried() -> None:
    assert HOSTILE.keys() == {field.name for field in fields(config_args.ClusterConfig)}


def test_nothing_of_the_users_file_reaches_the_processes(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = _words(tmp_path)
    with_file = _environment(words)
    monkeypatch.setattr(accelerate_launch, "default_config_file", "/nowhere")
    assert with_file == _environment(words)
    changed = {name for name, value in with_file.items() if os.environ.get(name) != value}
    # What the launcher always writes; switches among it are off.
    assert changed <= {"ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"} | {
        name for name in with_file if name.startswith("ACCELERATE_DYNAMO_")
    }
    assert with_file["ACCELERATE_MIXED_PRECISION"] == "no"
    assert with_file["ACCELERATE_DYNAMO_BACKEND"] == "NO"


def test_without_our_file_the_users_would_count(hostile: Path, tmp_path: Path) -> None:
    words = _words(tmp_path)
    place = words.index("--config_file")
    leaked = _environment(words[:place] + words[place + 2 :])
    assert leaked["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert leaked["ACCELERATE_DEBUG_MODE"] == "true"


def test_a_launcher_on_gpus_keeps_torchs_way_to_end_after_a_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check(compose.load(["world_size=2"]), {}, 2)
    monkeypatch.setattr(launch, "visible_devices", lambda: 2)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    _, extra = launch.launch_command(config, [], tmp_path)
    assert extra["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert "ACCELERATE_USE_CPU" not in extra
    assert gpu_environment.of_launcher({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}) == {}


def test_processes_get_the_precision_that_was_resolved_for_all_of_them() -> None:
    config = check(compose.load(["world_size=2"]), {}, 2)
    assert launch.worker_argv(config, ["steps=3"]) == ["steps=3", "world_size=2", "precision=bf16"]
    assert launch.worker_argv(config, ["precision=auto"]) == ["world_size=2", "precision=bf16"]
    given = ["world_size=2", "precision=fp16"]
    assert launch.worker_argv(config, given) == given


def test_what_the_user_exports_for_the_allocator_stays(tmp_path: Path) -> None:
    ours = gpu_environment.of_process({}, tmp_path)
    assert ours["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert ours["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/flight_recorder/rank_"
    for name in gpu_environment.ALLOCATOR:
        assert not set(gpu_environment.ALLOCATOR) & gpu_environment.of_process({name: "x"}, tmp_path).keys()
