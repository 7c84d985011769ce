"""Stage 9: what the launcher decides on a machine with GPUs: precision, devices, their memory, NCCL's settings."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runner import ROOT
from benchmarks.gpu_check.runs import StepLog, assembled, overrides
from harness.config import checks, compose, gpus
from harness.process import gpu_environment

AUTO = "precision=auto is bf16 on a GPU that has it."
TF32 = "An fp32 run with tf32=true takes less time than one without, and also runs compiled."
DRIVER = (
    "The GPUs that the driver lists without torch are those of torch: count, capability, memory within 3 %."
)
NO_DRIVER = "Without nvidia-smi, the GPUs are counted by their device files."
ON_CPU = "ACCELERATE_USE_CPU=true trains on the CPU, whatever GPUs there are."
HIDDEN = "With CUDA_VISIBLE_DEVICES empty, a run trains on the CPU."
ALLOCATOR = "The allocator accepts expandable segments."
WATCHDOG = "The launcher starts processes with torch's own way to end them after a time-out (3)."
_STEPS, _QUICK_STEPS = 14, 6


def run(context: StageContext) -> None:
    """Check the decisions one after the other."""
    with context.attempt("precision=auto", AUTO):
        config = checks.check(compose.load(overrides(context, "precision=auto")), environ=dict(os.environ))
        context.check_on_cuda(
            "precision=auto", AUTO, config.precision == "bf16", {"precision": config.precision}
        )
    with context.attempt("tf32", TF32):
        _tf32(context)
    with context.attempt("GPUs of the driver", DRIVER):
        _driver(context)
    with context.attempt("GPUs without nvidia-smi", NO_DRIVER):
        counted = _counted_without_driver()
        visible = len(gpus.present())
        figures = {"files": counted, "driver": visible}
        context.check_on_cuda("GPUs without nvidia-smi", NO_DRIVER, counted == visible, figures)
    for name, proves, environ in (
        ("asked for the CPU", ON_CPU, {"ACCELERATE_USE_CPU": "true"}),
        ("GPUs hidden", HIDDEN, {"CUDA_VISIBLE_DEVICES": ""}),
    ):
        if context.is_cuda:
            with context.attempt(name, proves):
                _trains_on_cpu(context, name, proves, environ)
        else:
            context.not_run(name, proves, "needs CUDA")
    with context.attempt("expandable segments", ALLOCATOR):
        _allocator(context)
    found = gpu_environment.of_launcher({})
    context.check("time-outs", WATCHDOG, found.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "3", found)


def _tf32(context: StageContext) -> None:
    if not context.is_cuda:
        # The key is refused where there is no GPU.
        context.not_run("tf32", TF32, "needs CUDA")
        return
    times: dict[str, float] = {}
    for name, keys in {
        "fp32": [],
        "tf32": ["tf32=true"],
        "tf32, compiled": ["tf32=true", "model.compile=true"],
    }.items():
        steps = f"steps={_QUICK_STEPS if context.quick else _STEPS}"
        with assembled(context, "optimizer=adamw", "precision=fp32", steps, *keys) as run_:
            log = StepLog(run_, context.folder)
            log.train()
            times[name] = log.step_ms()
    context.check("tf32", TF32, times["tf32"] < times["fp32"], {f"{n}_ms": ms for n, ms in times.items()})


def _driver(context: StageContext) -> None:
    listed = gpus.present()
    if not context.is_cuda:
        context.not_run("GPUs of the driver", DRIVER, "needs CUDA", {"listed": len(listed)})
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    first = listed[0] if listed else gpus.Gpu()
    total = torch.cuda.get_device_properties(0).total_memory
    figures: dict[str, Any] = {"listed": len(listed), "torch": count, "name": first.name}
    share = first.memory_bytes / total if first.memory_bytes else None
    figures["memory_ratio"] = share
    agrees = first.capability == torch.cuda.get_device_capability(0) and share is not None
    # Only part of the GPUs may be shown to this process.
    counts = len(listed) == count or visible is not None
    context.check("GPUs of the driver", DRIVER, counts and agrees and abs((share or 0) - 1) <= 0.03, figures)


def _counted_without_driver() -> int:
    code = "from harness.config import gpus; print(len(gpus.present()))"
    environ = {**os.environ, "PATH": "/nowhere"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    return int(ended.stdout)


def _trains_on_cpu(context: StageContext, name: str, proves: str, environ: dict[str, str]) -> None:
    keys = [
        "model=llama_tiny",
        "model.config.num_hidden_layers=1",
        "steps=2",
        "precision=fp32",
        "batch_size=2",
    ]
    keys += ["micro_batch_size=2", "seq_len=32", f"name={name.replace(' ', '_')}"]
    command = [sys.executable, "-m", "harness.cli", "train", *overrides(context, *keys)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)
    said = ended.stdout + ended.stderr
    figures = {"exit_code": ended.returncode}
    context.check(name, proves, ended.returncode == 0 and "on cpu" in said, figures, said.strip()[-300:])


def _allocator(context: StageContext) -> None:
    if not context.is_cuda:
        context.not_run("expandable segments", ALLOCATOR, "needs CUDA")
        return
    torch.zeros(1, device=context.device)
    # torch's stub of the snapshot leaves this key out.
    snapshot: Any = torch.cuda.memory._snapshot()
    settings = snapshot["allocator_settings"]
    accepted = bool(settings.get("expandable_segments"))
    context.check("expandable segments", ALLOCATOR, accepted, {"expandable_segments": accepted})
