"""What started this process, read from its environment and the command lines above it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.config import gpus, launcher
from harness.errors import InputError


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("python /venv/bin/accelerate launch --cpu --num_processes 2 -m harness.train", 2),
        ("accelerate launch --cpu --num_processes=3 train.py", 3),
        ("accelerate-launch --num-processes 4 train.py", 4),
        ("python -m accelerate.commands.launch --num_processes 2 train.py", 2),
        ("accelerate launch train.py", None),
        ("torchrun --num_processes 2 train.py", None),
        ("accelerate launch --num_processes many train.py", None),
        ("bash", None),
    ],
)
def test_processes_asked_for(command: str, processes: int | None) -> None:
    assert launcher.requested_processes(command.split()) == processes


def test_processes_asked_for_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cpu.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    assert launcher.requested_processes(["accelerate", "launch", "--config_file", str(file), "x.py"]) == 2
    missing = ["accelerate", "launch", "--config_file", str(tmp_path / "none"), "x.py"]
    assert launcher.requested_processes(missing) is None


def test_one_process_where_several_were_asked_for() -> None:
    with pytest.raises(InputError) as caught:
        launcher.check_one_process_was_meant(
            [["bash"], ["accelerate", "launch", "--cpu", "--num_processes", "2", "x"]]
        )
    message = str(caught.value)
    assert message.startswith("--num_processes: 2 was asked of accelerate launch, which started one process")
    assert "optbench train world_size=2" in message
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in message
    launcher.check_one_process_was_meant([["accelerate", "launch", "--num_processes", "1", "x"]])


def test_the_parent_is_really_read(tmp_path: Path) -> None:
    """A parent whose command line looks like accelerate's, and this code in its child."""
    parent = tmp_path / "accelerate"
    child = tmp_path / "child.py"
    parent.write_text("import subprocess, sys\nsys.exit(subprocess.call([sys.executable, sys.argv[-1]]))\n")
    child.write_text(
        "from harness.config import launcher\n"
        "launcher.check_one_process_was_meant(launcher.parent_command_lines())\n"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, str(parent), "launch", "--cpu", "--num_processes", "2", str(child)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(root)}, check=False
    )
    assert "InputError: --num_processes: 2 was asked of accelerate launch" in result.stderr


def test_no_launcher() -> None:
    assert launcher.launched({}) is None
    assert launcher.launched({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}) == (2, 1, 1)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0,1", 2),
        ("1,-1,2", 1),
        ("0,1,2,3,4", 3),
        ("GPU-a,GPU-b", 2),
    ],
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    monkeypatch.setattr(gpus, "present", lambda: (gpus.Gpu(),) * 3)
    assert launcher.visible_devices({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_accelerates_cpu_switch_hides_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "present", lambda: (gpus.Gpu(),) * 3)
    assert launcher.visible_devices({"ACCELERATE_USE_CPU": "true"}) == 0
    assert launcher.visible_devices({"ACCELERATE_USE_CPU": "false"}) == 3
