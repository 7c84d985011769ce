"""What a checkpoint holds of a run on this process: weights and optimizer state by name, counters, random states."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import optimizers
from harness.checkpoint.files import Saved
from harness.checkpoint.plugin_state import ForeignState
from harness.loop import Run
from harness.protocols import Probe
from harness.tracked_optimizer import tracked
from optimizers import named_state
from optimizers.layouts.layout import Layout
from optimizers.named_state import StatePiece, parameter_shape

WEIGHT = "weight"
"""Kind of a parameter's own numbers (fp32 masters under ZeRO)."""
_SEED_STRIDE = 1_000_003


def parameter_layout(run: Run) -> Layout:
    """Return how the processes hold the trainable parameters: by the optimizer or, for a plug-in, the engine."""
    if isinstance(run.optimizer, optimizers.Optimizer):
        return run.optimizer.layout
    return run.engine.parameter_layout()


def weight_pieces(run: Run) -> Iterator[StatePiece]:
    """Yield this process' part of every trainable parameter: views."""
    layout = parameter_layout(run)
    for name, parameter in run.engine.named_parameters().items():
        dim, start = layout.interval(parameter)
        shape = tuple(parameter_shape(parameter))
        # Replicas hold the same numbers: one of them writes. Flat slices have no replicas.
        is_primary = layout.is_first_replica or dim == named_state.FLAT
        yield StatePiece(name, WEIGHT, shape, dim, start, layout.weight(parameter), is_primary)


class OwnState:
    """State of an optimizer of `optimizers` by parameter name, with the interface of `ForeignState`."""

    def __init__(self, optimizer: optimizers.Optimizer) -> None:
        self._optimizer = optimizer

    def pieces(self) -> Iterator[StatePiece]:
        """Yield this process' part of every state tensor: views."""
        return named_state.pieces(self._optimizer)

    def facts(self) -> dict[str, Any]:
        """Return what the optimizer has besides tensors, the same on every process: JSON."""
        return {"steps": self._optimizer.steps_by_name()}

    def load(self, facts: Mapping[str, Any], saved: Saved) -> None:
        """Overwrite the state from a checkpoint."""
        named_state.load(self._optimizer, facts["steps"], saved.read)


def optimizer_state(run: Run) -> OwnState | ForeignState:
    """Return the optimizer's state by parameter name."""
    if isinstance(run.optimizer, optimizers.Optimizer):
        return OwnState(run.optimizer)
    return ForeignState(run.optimizer, run.engine.named_parameters(), parameter_layout(run))


def load_tensors(run: Run, saved: Saved) -> None:
    """Overwrite weights and optimizer state (a collective).

    Raises:
        DamagedCheckpoint: something is missing, or has another shape.
    """
    for part in weight_pieces(run):
        part.tensor.copy_(saved.read(part))
    run.engine.sync_from_masters()
    optimizer_state(run).load(saved.facts[0]["optimizer"], saved)


class Randomness(NamedTuple):
    """The random states of a process, as their generators give them."""

    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """Copy the current random states: a few kB, in microseconds, without waiting for the device."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # Plug-ins may draw from numpy's global generator.
        numpy = np.random.get_state(legacy=True)  # noqa: NPY002
        return cls(torch.get_rng_state(), cuda, numpy, random.getstate())

    def tensors(self) -> dict[str, Tensor]:
        """Return the states as tensors, which `set_randomness` takes."""
        version, internal, _ = self.python
        tensors = {
            # safetensors holds tensors alone: Python's and numpy's states become integers.
            "torch": self.torch,
            "numpy": torch.from_numpy(self.numpy[1].astype(np.int64)),
            "numpy_position": torch.tensor(self.numpy[2:4], dtype=torch.int64),
            "numpy_cached": torch.tensor(self.numpy[4], dtype=torch.float64),
            "python": torch.tensor([version, *internal], dtype=torch.int64),
        }
        return tensors if self.cuda is None else {**tensors, "cuda": self.cuda}


def set_randomness(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the random states of this process.

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


def counters(run: Run, probes: Sequence[Probe]) -> dict[str, Any]:
    """Return the counters of this process and its probes, as JSON. Waits for the device."""
    state = run.state
    return {
        "step": state.step,
        "tokens": state.tokens,
        "wall_s": state.wall_s,
        "skipped": state.skipped,
        "loss": None if state.loss is None else state.loss.item(),
        "aux_loss": None if state.aux_loss is None else state.aux_loss.item(),
        "loss_tokens": state.loss_tokens,
        "clock": run.clock.peek(),
        "spikes": run.spikes.state() if run.spikes else None,
        "scaler": run.engine.scaler_state(),
        "fallbacks": int(tracked(run.optimizer).fallbacks),
        "probes": {type(probe).__name__: probe.state() for probe in probes},
    }


def restore_counters(
    run: Run,
    probes: Sequence[Probe],
    all_counters: Sequence[Mapping[str, Any]],
    own: Mapping[str, Tensor] | None,
) -> list[str]:
    """Restore counters and probes; return one line for each of their files that is lost.

    Args:
        run: about to train.
        probes: of the run.
        all_counters: `counters` of all processes that saved.
        own: random states of the process of this rank; None: another number of processes saved, so this one draws
            numbers of its own from here on (they matter to dropout alone).
    """
    engine, state = run.engine, run.state
    same = len(all_counters) == engine.world_size
    mine = all_counters[engine.rank if same else 0]
    state.step, state.tokens = int(mine["step"]), int(mine["tokens"])
    state.wall_s, state.skipped = float(mine["wall_s"]), int(mine["skipped"])
    state.loss_tokens = int(mine["loss_tokens"])
    for key in ("loss", "aux_loss"):
        if mine.get(key) is not None:
            # Sums of this process: those of processes that are no more go to the first one.
            own_sum = mine[key] if same else sum(f[key] for f in all_counters) if engine.rank == 0 else 0.0
            setattr(state, key, torch.tensor(own_sum, dtype=torch.float32, device=engine.device))
    # Seconds since the last row continue, so that the next row covers the whole interval.
    run.clock.resume(mine["clock"])
    engine.load_scaler_state(mine["scaler"])
    if run.spikes is not None:
        run.spikes.restore(mine["spikes"])
    # Counts of processes that are no more go to the first one.
    others = sum(f["fallbacks"] for f in all_counters) if engine.rank == 0 else 0
    tracked(run.optimizer).add_fallbacks(mine["fallbacks"] if same else others)
    problems = []
    for probe in probes:
        saved = mine["probes"].get(type(probe).__name__)
        if saved is not None and (problem := probe.restore(saved, state.step)):
            problems.append(problem)
    if own is not None and same:
        set_randomness(own, engine.device)
    else:
        # Another number of processes: each draws numbers that no other process or step draws.
        torch.manual_seed((run.config.seed * _SEED_STRIDE + state.step) * _SEED_STRIDE + engine.rank + 1)
    return problems
