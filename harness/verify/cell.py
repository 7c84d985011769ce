"""What one rank does for a cell: the harness's own run with a witness, and on rank 0 the replay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import engines
from harness.config.schema import RunConfig
from harness.loop import Callbacks, Run, train
from harness.preparation import prepare
from harness.record import environment
from harness.record.certificates import Cell
from harness.run import assemble
from harness.schedule import Factor
from harness.tracked_optimizer import tracked
from harness.verify.cells import EXAMPLE_RULE, REFERENCE_STEPS, is_rounded, overrides
from harness.verify.replay import Build, of_preset, relative_error, replayed, update_error
from harness.verify.witness import Gradients, OfLayout, Witness, replica_digests


@dataclass
class Defect:
    """Something that is done wrong on purpose.

    Attributes:
        around: entered before the run is assembled, left after training.
        change: called with the assembled run and its witness.
    """

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    change: Callable[[Run, Witness], None] = lambda run, witness: None


@dataclass
class Trained:
    """A finished run of a cell."""

    config: RunConfig
    state: str
    witness: Witness
    factor: Factor
    digests: dict[str, str]
    matrices: int


def certify(cell: Cell, folder: Path, reference: Path | None) -> dict[str, Any]:
    """One cell on this rank (a collective).

    Args:
        cell: which; its `control` is put in.
        folder: scratch.
        reference: what `save_reference` left for the end-to-end figure.

    Returns:
        What `harness.verify.verdict.judge` asks of each rank.
    """
    from harness.verify import controls

    defect = controls.DEFECTS[cell.control] if cell.control else Defect()
    words = overrides(cell, str(folder))
    done = trained(words, defect)
    found = report(done)
    if done.witness.gradients:
        found |= figures(done, build_of(done.config), reference)
    if cell.is_base and is_rounded(cell.rule):
        rounded = trained(overrides(cell, str(folder), "bfloat16"), Defect())
        if rounded.witness.gradients:
            found["replay_error_bf16_orthogonalizer"] = _replay(rounded, build_of(done.config))[0]
    return found


def save_reference(cell: Cell, folder: Path, path: Path) -> None:
    """Train a `cells.reference_of` cell in this one process and write its weights and first gradients."""
    done = trained(overrides(cell, str(folder)), Defect())
    torch.save(
        {
            "start": done.witness.start,
            "end": done.witness.weights[REFERENCE_STEPS],
            "gradients": done.witness.gradients[0],
        },
        path,
    )


def trained(words: list[str], defect: Defect, gradients: Callable[[Run], Gradients] | None = None) -> Trained:
    """Train in this process as `harness.run` does, with a witness for its only probe.

    Args:
        words: configuration.
        defect: what is done wrong.
        gradients: how the witness sees gradients; None: through the layout of one of our optimizers.
    """
    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    with defect.around():
        run = assemble(prepared, engines.start(prepared.config))
        run.stop.restore()
        try:
            witness = Witness(run, gradients(run) if gradients else OfLayout(run.optimizer), REFERENCE_STEPS)
            defect.change(run, witness)
            state = train(run, Callbacks([witness]))
            digests = replica_digests(run, witness.end)
        finally:
            run.engine.release()
    routes = tracked(run.optimizer).routes
    matrices = sum(len(route.blocks) for route in routes if route.rule != "adamw")
    return Trained(prepared.config, state, witness, run.lr_factor, digests, matrices)


def build_of(config: RunConfig) -> Build:
    """The optimizer of a configuration, for whole matrices on one process."""
    chosen = config.optimizer
    return of_preset(chosen.name, {"lr": chosen.lr, **chosen.options})


def report(done: Trained) -> dict[str, Any]:
    """What every rank tells."""
    witness = done.witness
    return {
        "state": done.state,
        "grad_norms": witness.grad_norms,
        "orthogonalized": witness.orthogonalized,
        "bytes_per_step": sum(witness.sent) / max(1, len(witness.sent)),
        "collectives_per_step": max(witness.collectives, default=0),
        "digests": done.digests,
        "matrices": done.matrices,
    }


def figures(done: Trained, build: Build, reference: Path | None) -> dict[str, Any]:
    """What rank 0 tells beside: errors against the replay and against one process."""
    witness = done.witness
    error, worst, optimizer = _replay(done, build)
    routes = tracked(optimizer).routes
    found: dict[str, Any] = {
        "replay_error": error,
        "replay_worst": worst,
        "matrix_names": [block.name for route in routes if route.rule != "adamw" for block in route.blocks],
        "received_norms": [_norm(received) for received in witness.gradients],
        "end_to_end_error": None,
        "delivery_error": None,
    }
    if reference is not None:
        known = torch.load(reference)
        end = witness.weights.get(REFERENCE_STEPS, witness.end)
        found["end_to_end_error"] = update_error(known["start"], end, known["end"])[0]
        found["delivery_error"] = _gradient_error(witness.gradients[0], known["gradients"])
    return found


def _replay(done: Trained, build: Build) -> tuple[float, str, Any]:
    witness = done.witness
    optimizer, weights = replayed(build, witness.start, witness.gradients, done.factor)
    return *update_error(witness.start, witness.end, weights), optimizer


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def _gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients as one vector: single small ones are rounded more than they matter."""
    names = list(expected)
    return relative_error(
        torch.cat([found[name].double().reshape(-1) for name in names]),
        torch.cat([expected[name].double().reshape(-1) for name in names]),
    )


def start(rank: int, folder: Path) -> None:
    """Prepare a rank process: import what every cell needs, and install the example of a plug-in rule."""
    from harness.verify import example_rule

    example_rule.install(folder / f"rank{rank}", EXAMPLE_RULE)


def machine() -> dict[str, Any]:
    """On what certificates are made, for their record."""
    found = environment.describe(torch.device("cpu"), 1)
    return {key: found[key] for key in ("python", "system", "packages", "device", "cpu_cores")}
