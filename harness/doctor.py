"""`optbench doctor`: what this machine can run, what is missing, and how to fix it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from harness import command_line
from harness.config.launcher import visible_devices
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.output import json_document

Verdict = Literal["ok", "missing", "broken"]
_LITTLE_SPACE = 5e9
"""Bytes: a checkpoint of a 60M model with its moments, a few times."""


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: of it.
        verdict: ok; missing: something optional is not there; broken: runs will fail.
        found: what there is.
        fix: what to do, where something is to be done.
    """

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def main(argv: Sequence[str]) -> int:
    """Print what this machine can run; return 1 where something is broken.

    Raises:
        InputError: any argument but ``--json``.
    """
    arguments = command_line.parse("doctor", argv)
    if arguments.rest:
        first = arguments.rest[0]
        raise InputError("doctor", first, "is not expected", allowed="--json", fix="optbench doctor")
    findings = [finding for look in _LOOKS for finding in look()]
    if arguments.options.json:
        print(json_document(findings=[finding._asdict() for finding in findings]))
    else:
        _show(findings)
    return int(any(finding.verdict == "broken" for finding in findings))


def _show(findings: Sequence[Finding]) -> None:
    table = Table("", "", "found", "to do", box=None, pad_edge=False)
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    for finding in findings:
        colour = colours[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", finding.name, finding.found, finding.fix)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    console.print(table)


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", platform.python_version())


def _packages() -> Iterator[Finding]:
    """Compare every required package with its version range."""
    from packaging.requirements import Requirement

    wrong: list[tuple[str, str]] = []
    count = 0
    for line in metadata.requires("optbench") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append((requirement.name, f"not installed, required {requirement.specifier}"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement.name, f"{version}, required {requirement.specifier}"))
    if not wrong:
        yield Finding("packages", "ok", f"all {count} within their ranges")
    for name, what in wrong:
        yield Finding(name, "broken", what, f'pip install "{name}{what.rpartition("required ")[2]}"')


def _devices() -> Iterator[Finding]:
    """Find the driver's GPUs, and whether torch can use them."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "broken", str(error), "make setup, or docs/install.md")
        return
    present, usable = visible_devices(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    build = f"torch {torch.__version__}"
    if usable:
        names = sorted({torch.cuda.get_device_name(i) for i in range(usable)})
        yield Finding("GPUs", "ok", f"{usable}: {', '.join(names)}; {build}, CUDA {torch.version.cuda}")
    elif present:
        fix = (
            "install a CUDA build of torch (docs/install.md)" if torch.version.cuda is None else "nvidia-smi"
        )
        yield Finding("GPUs", "broken", f"the driver shows {present}, {build} can use none", fix)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        yield Finding("GPUs", "missing", f"none; runs use the CPU ({cores} cores, gloo); {build}")
    if usable:
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding(
            "bf16", "ok" if bf16 else "missing", "on the GPU" if bf16 else "emulated: use fp32 or fp16"
        )
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        native = "AMX" in capability or "bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
        found = f"{capability}, bf16 " + (
            "in hardware" if native else "emulated: precision=bf16 is slow here"
        )
        yield Finding("CPU", "ok", found)


def _cpu_flags() -> str:
    try:
        match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match[1] if match else ""


def _engines() -> Iterator[Finding]:
    import torch.distributed as dist

    if dist.is_available():
        backends = [b for b in ("gloo", "nccl") if getattr(dist, f"is_{b}_available")()]
        yield Finding("engines ddp, fsdp2, hsdp", "ok", ", ".join(backends))
    else:
        yield Finding("engines ddp, fsdp2, hsdp", "broken", "torch was built without distributed")
    if importlib.util.find_spec("deepspeed") is None:
        yield Finding(
            "engines zero0 … zero3", "missing", "no deepspeed", 'pip install "deepspeed>=0.19.8,<0.20"'
        )
    else:
        yield Finding("engines zero0 … zero3", "ok", f"deepspeed {metadata.version('deepspeed')}")


def _folders() -> Iterator[Finding]:
    """Check that the folders of runs and corpora can be written."""
    from harness.files.cache import cache_root

    config = RunConfig()
    for name, path in (("runs_dir", Path(config.runs_dir)), ("corpora", cache_root(config.data.cache_dir))):
        place = path.expanduser().absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
            key = "runs_dir" if name == "runs_dir" else "data.cache_dir"
            yield Finding(name, "broken", f"{path} cannot be written", f"{key}=FOLDER")
            continue
        free = shutil.disk_usage(place).free
        verdict: Verdict = "ok" if free >= _LITTLE_SPACE else "missing"
        yield Finding(name, verdict, f"{path}, {free / 1e9:.0f} GB free")


def _services() -> Iterator[Finding]:
    """Show the services that are used where they exist."""
    from harness.record.wandb import resolve_mode

    yield Finding("W&B", "ok", f"wandb.mode=auto means {resolve_mode('auto')} here")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    hub = (
        "HF_HUB_OFFLINE is set: only what is cached"
        if offline
        else "asked only by data sets and tokenizers by name"
    )
    yield Finding("Hugging Face hub", "ok", hub)
    sbatch = shutil.which("sbatch")
    yield Finding(
        "SLURM",
        "ok" if sbatch else "missing",
        "sbatch" if sbatch else "no sbatch: optbench submit --dry-run only",
    )


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _devices,
    _engines,
    _folders,
    _services,
)
