"""The shipped accelerate configuration files start the processes that they promise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.sources import package_root

# What harness.train does where there is no GPU: ask Accelerate for the CPU.
SCRIPT = """
import sys
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=not torch.cuda.is_available())
total = accelerator.reduce(torch.ones(1) * (accelerator.process_index + 1), "sum").item()
with open(f"{sys.argv[1]}/{accelerator.process_index}", "w") as file:
    file.write(f"{accelerator.num_processes} {total}")
accelerator.end_training()
"""


def start(folder: Path, config: str, *flags: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    file = package_root() / "accelerate" / f"{config}.yaml"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(file),
    ]
    return subprocess.Popen(
        [*launch, *flags, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".py"}


@pytest.mark.launch
def test_two_processes_on_the_cpu(tmp_path: Path) -> None:
    process = start(tmp_path, "ddp_cpu", "--main_process_port", str(free_port()))
    output, _ = process.communicate(timeout=180)
    # Ranks 1 and 2 add up to 3 only if both were in one group.
    assert answers(tmp_path) == {"0": "2 3.0", "1": "2 3.0"}, output


@pytest.mark.launch
@pytest.mark.slow  # tests/harness/jobs/test_launch.py trains over two launchers, too
def test_two_machines_as_two_launchers_on_loopback(tmp_path: Path) -> None:
    address = [
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        str(free_port()),
    ]
    machines = [start(tmp_path, "ddp_two_machines", "--machine_rank", str(rank), *address) for rank in (0, 1)]
    outputs = [machine.communicate(timeout=180)[0] for machine in machines]
    assert answers(tmp_path) == {"0": "2 3.0", "1": "2 3.0"}, "\n".join(outputs)
