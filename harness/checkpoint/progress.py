"""Where a run stands beside weights and optimizer state: counters, clocks, probes, random states of a process."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.loop import Run
from harness.tracked_optimizer import tracked

_SEED_STRIDE = 1_000_003


class Randomness(NamedTuple):
    """The random states of a process, as their generators give them."""

    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """A copy of a few kB, taken in microseconds and without waiting for the device."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # Plug-ins may draw from numpy's global generator.
        numpy = np.random.get_state(legacy=True)  # noqa: NPY002
        return cls(torch.get_rng_state(), cuda, numpy, random.getstate())

    def tensors(self) -> dict[str, Tensor]:
        """What `set_randomness` takes."""
        version, internal, _ = self.python
        found = {
            "torch": self.torch,
            "numpy": torch.from_numpy(self.numpy[1].astype(np.int64)),
            "numpy_position": torch.tensor(self.numpy[2:4], dtype=torch.int64),
            "numpy_cached": torch.tensor(self.numpy[4], dtype=torch.float64),
            "python": torch.tensor([version, *internal], dtype=torch.int64),
        }
        return found if self.cuda is None else {**found, "cuda": self.cuda}


def set_randomness(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the random states back.

    Raises:
        ValueError: they are none of this version of torch.
    """
    try:
        torch.set_rng_state(states["torch"].clone())
    except RuntimeError as error:
        raise ValueError(f"random state: {error}") from error
    position, has_cached = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_cached, states["numpy_cached"].item()))  # noqa: NPY002
    version, *internal = states["python"].tolist()
    random.setstate((version, tuple(internal), None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)


def facts(run: Run) -> dict[str, Any]:
    """Counters of this process, as JSON. Waits for the device."""
    ledger = run.ledger
    return {
        "step": ledger.step,
        "tokens": ledger.tokens,
        "wall_s": ledger.wall_s,
        "skipped": ledger.skipped,
        "loss": None if ledger.loss is None else ledger.loss.item(),
        "aux_loss": None if ledger.aux_loss is None else ledger.aux_loss.item(),
        "loss_tokens": ledger.loss_tokens,
        "clock": run.clock.peek(),
        "spikes": run.spikes.state() if run.spikes else None,
        "scaler": run.engine.scaler_state(),
        "fallbacks": int(tracked(run.optimizer).fallbacks),
        "probes": {type(probe).__name__: probe.state() for probe in run.probes},
    }


def restore(run: Run, all_facts: Sequence[Mapping[str, Any]], own: Mapping[str, Tensor] | None) -> list[str]:
    """Take the counters over; returns what could not be, a line each.

    Args:
        run: about to train.
        all_facts: `facts` of all processes that saved.
        own: random states of the process of this rank; None: another number of processes saved, so this one draws
            numbers of its own from here on (they matter to dropout alone).
    """
    engine, ledger = run.engine, run.ledger
    same = len(all_facts) == engine.world_size
    mine = all_facts[engine.rank if same else 0]
    ledger.step, ledger.tokens = int(mine["step"]), int(mine["tokens"])
    ledger.wall_s, ledger.skipped = float(mine["wall_s"]), int(mine["skipped"])
    ledger.loss_tokens = int(mine["loss_tokens"])
    for key in ("loss", "aux_loss"):
        if mine.get(key) is not None:
            # Sums of this process: those of processes that are no more go to the first one.
            own_sum = mine[key] if same else sum(f[key] for f in all_facts) if engine.rank == 0 else 0.0
            setattr(ledger, key, torch.tensor(own_sum, dtype=torch.float32, device=engine.device))
    run.clock.resume(mine["clock"])
    engine.load_scaler_state(mine["scaler"])
    if run.spikes is not None:
        run.spikes.restore(mine["spikes"])
    # Counts of processes that are no more go to the first one.
    lost = sum(f["fallbacks"] for f in all_facts) if engine.rank == 0 else 0
    tracked(run.optimizer).add_fallbacks(mine["fallbacks"] if same else lost)
    lost = []
    for probe in run.probes:
        state = mine["probes"].get(type(probe).__name__)
        if state is not None and (problem := probe.restore(state, ledger.step)):
            lost.append(problem)
    if own is not None and same:
        set_randomness(own, engine.device)
    else:
        torch.manual_seed((run.config.seed * _SEED_STRIDE + ledger.step) * _SEED_STRIDE + engine.rank + 1)
    return lost
