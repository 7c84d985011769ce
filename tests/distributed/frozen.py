"""Imported last by the process that tests fork from: what every fork would do again, and a collection of the rest."""

import gc
import os
import threading
from importlib import import_module

from tqdm import tqdm

from harness.config import compose
from harness.engines import deepspeed
from harness.record import certificates

_LATE = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "harness.engines.fsdp2",
    "harness.probes.validation",
    "harness.tasks.pretrain",
    "optimizers.layouts.deepspeed_binding",
    "optimizers.layouts.pipeline",
    "optimizers.moment_figures",
    "optimizers.optimizer",
    "optimizers.step_stats",
    "torch._inductor.compile_fx",
)
"""What engines import when they start: up to three seconds in each rank of each pool."""

# Every run compares it with that of the certificates: a third of a second, remembered by the sources' text.
certificates.sources_sha256()
# Hydra's plugins and the shipped files, which the first composition of a process looks for.
compose.load([])
# Before inductor is imported: its pool of compilers would be the server's, not a rank's.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# tqdm's own lock holds a semaphore, which a rank that is killed would leave behind.
tqdm.set_lock(threading.RLock())
deepspeed._library()
for name in _LATE:
    import_module(name)

# A fork then neither looks at what was imported nor copies it.
gc.collect()
gc.freeze()
