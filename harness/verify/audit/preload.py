"""What every rank process of an audit imports, once: the fork server imports this module, its children inherit it."""

import contextlib
import os
import threading
from importlib import import_module

import torch
from tqdm import tqdm

from harness.engines import deepspeed
from harness.verify.audit import judge, ranks

PACKAGES = "OPTBENCH_AUDIT_PACKAGES"
"""Environment variable: installed packages of the targets, separated by commas."""

_LATE = (
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",
)
"""What engines import when they start."""

torch.set_num_threads(1)
# Before inductor is imported: its pool of compilers would outlive the ranks.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# torch.compile shows progress; tqdm's own lock holds a semaphore, which a rank that is ended would leave behind.
tqdm.set_lock(threading.RLock())
deepspeed._library()
for name in (*_LATE, *filter(None, os.environ.get(PACKAGES, "").split(","))):
    # A rank that needs it names the error.
    with contextlib.suppress(BaseException):
        import_module(name)

__all__ = ["judge", "ranks"]
