"""What one rank process does for a cell: a run of the harness with a recorder, and on rank 0 the replay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import devices, engines, model
from harness.config.schema import RunConfig
from harness.loop import Callbacks, Run, train
from harness.preparation import prepare
from harness.record.certificates import Cell
from harness.run import assemble
from harness.schedule import Factor
from harness.tracked_optimizer import tracked
from harness.verify.cells import EXAMPLE_RULE, REFERENCE_STEPS, is_rounded, overrides, raises_cut
from harness.verify.controls import DEFECTS, Defect
from harness.verify.cut import raised_cut
from harness.verify.replay import Build, of_preset, relative_error, replayed, rounding_error, update_error
from harness.verify.step_recorder import GradientSource, LayoutGradients, StepRecorder, replica_digests
from harness.verify.twins import Twin, make_twin
from harness.verify.verdict import (
    MOST_REPLAYS,
    REPLAY_CEILING,
    replay_bound,
)


@dataclass
class Trained:
    """A finished run of a cell."""

    config: RunConfig
    state: str
    recorder: StepRecorder
    factor: Factor
    digests: dict[str, str]
    matrices: int


def certify(cell: Cell, folder: Path, reference: Path | None) -> dict[str, Any]:
    """Certify one cell on this rank (a collective).

    Args:
        cell: the cell; the defect that its `control` names is put in.
        folder: scratch folder.
        reference: file that `save_reference` wrote, for the end-to-end error.

    Returns:
        The report of this rank that `harness.verify.verdict.judge` needs.
    """
    defect = DEFECTS[cell.control] if cell.control else Defect()
    words = overrides(cell, str(folder))
    with raised_cut() if raises_cut(cell) else nullcontext():
        done = trained(words, defect)
        measured = report(done)
        if done.recorder.gradients:
            measured |= figures(done, build_of(done.config), reference, cell)
    if cell.is_base and is_rounded(cell.rule):
        rounded = trained(overrides(cell, str(folder), "bfloat16"), Defect())
        if rounded.recorder.gradients:
            measured["replay_error_bf16_orthogonalizer"] = _replay(rounded, build_of(done.config))[0]
    return measured


def save_reference(cell: Cell, folder: Path, path: Path) -> None:
    """Train a `cells.reference_of` cell in this one process and write its weights and first gradients."""
    with raised_cut() if raises_cut(cell) else nullcontext():
        done = trained(overrides(cell, str(folder)), Defect())
    torch.save(
        {
            "start": done.recorder.start,
            "end": done.recorder.weights[REFERENCE_STEPS],
            "gradients": done.recorder.gradients[0],
        },
        path,
    )


def noise_floor(cell: Cell, folder: Path, reference: Path | None, seed: int = 0) -> float:
    """Return the end-to-end error between two twins of one process that start one ulp apart.

    Args:
        cell: of one process.
        folder: scratch folder.
        reference: file of `save_reference` for this very cell; None: train it here.
        seed: of the signs with which the weights are moved.
    """
    words = overrides(cell, str(folder))

    def move(run: Run, recorder: StepRecorder) -> None:
        make_twin(run, Twin(seed=seed, moves_weights=True))

    with raised_cut() if raises_cut(cell) else nullcontext():
        if reference is None:
            done = trained(words, Defect()).recorder
            known = {"start": done.start, "end": done.weights[REFERENCE_STEPS]}
        else:
            known = torch.load(reference)
        twin = trained(words, Defect(change=move)).recorder
    return update_error(known["start"], twin.weights[REFERENCE_STEPS], known["end"])[0]


def trained(
    words: list[str], defect: Defect, gradients: Callable[[Run], GradientSource] | None = None
) -> Trained:
    """Train in this process as `harness.run` does, with a recorder as the only probe.

    Args:
        words: overrides of the run.
        defect: what is made wrong on purpose; `Defect()` for nothing.
        gradients: makes the recorder's gradient source; None: through the layout of an optbench optimizer.
    """
    prepared = prepare(words, say=lambda text: None, worker=True, writes_folder=False)
    with defect.around():
        run = assemble(prepared, engines.start(prepared.config))
        run.stop.restore()
        try:
            recorder = StepRecorder(
                run, gradients(run) if gradients else LayoutGradients(run.optimizer), REFERENCE_STEPS
            )
            defect.change(run, recorder)
            state = train(run, Callbacks([recorder]))
            digests = replica_digests(run, recorder.end)
        finally:
            run.loader.close()
            run.engine.release()
    routes = tracked(run.optimizer).routes
    matrices = sum(len(route.blocks) for route in routes if route.rule != "adamw")
    return Trained(prepared.config, state, recorder, run.lr_factor, digests, matrices)


def build_of(config: RunConfig) -> Build:
    """Return a function that builds the optimizer of a configuration for unsharded matrices on one process.

    The exact factor of CUDA is replayed by the one for fp64 moments, QR and SVD.
    """
    optimizer = config.optimizer
    options = {"lr": optimizer.lr, **optimizer.options}
    if options.get("orthogonalizer") == "dwh":
        options["orthogonalizer"] = "qr_svd"
    if options.get("split_heads"):
        # The sizes of heads are facts of the model, whose weights are not looked at.
        options["modules"] = model.build(config.model, seed=0, device="meta")
    return of_preset(optimizer.name, options)


def report(done: Trained) -> dict[str, Any]:
    """Return the part of the report that every rank makes."""
    recorder = done.recorder
    return {
        "state": done.state,
        "grad_norms": recorder.grad_norms,
        "orthogonalized": recorder.orthogonalized,
        "bytes_per_step": sum(recorder.sent) / max(1, len(recorder.sent)),
        "collectives_per_step": max(recorder.collectives, default=0),
        "digests": done.digests,
        "matrices": done.matrices,
    }


def figures(done: Trained, build: Build, reference: Path | None, cell: Cell | None = None) -> dict[str, Any]:
    """Return the part of the report that only rank 0 makes: errors against the replay and against one process.

    Args:
        done: the run.
        build: builds the optimizer that replays it.
        reference: file of `save_reference`; None: no end-to-end error.
        cell: whose bound the replay error must meet; None: what fp32 does by itself is not measured.
    """
    recorder = done.recorder
    error, worst, optimizer, replay = _replay(done, build)
    routes = tracked(optimizer).routes
    measured: dict[str, Any] = {
        "replay_error": error,
        "replay_floor": _replay_floor(cell, done, build, replay, error) if cell else None,
        "replay_worst": worst,
        "matrix_names": [block.name for route in routes if route.rule != "adamw" for block in route.blocks],
        "received_norms": [_norm(received) for received in recorder.gradients],
        "end_to_end_error": None,
        "delivery_error": None,
    }
    if reference is not None:
        known = torch.load(reference)
        end = recorder.weights.get(REFERENCE_STEPS, recorder.end)
        measured["end_to_end_error"] = update_error(known["start"], end, known["end"])[0]
        measured["delivery_error"] = _gradient_error(recorder.gradients[0], known["gradients"])
    return measured


def _replay(done: Trained, build: Build) -> tuple[float, str, Any, dict[str, Tensor]]:
    """Return the replay error, its parameter, the optimizer of the replay, and its weights."""
    recorder = done.recorder
    optimizer, weights = replayed(
        build, recorder.start, recorder.gradients, done.factor, trained=recorder.trained
    )
    return *update_error(recorder.start, recorder.end, weights), optimizer, weights


def _replay_floor(
    cell: Cell, done: Trained, build: Build, replay: dict[str, Tensor], error: float
) -> float | None:
    """Return what fp32 makes of the run's gradients by itself, measured until it explains the error.

    None where the error needs no explanation, or is above what rounding could explain.
    """
    if not replay_bound(cell) < error <= REPLAY_CEILING:
        return None
    recorder, floor = done.recorder, 0.0
    for seed in range(MOST_REPLAYS):
        one = rounding_error(
            build, recorder.start, recorder.gradients, done.factor, replay, seed, recorder.trained
        )
        floor = max(floor, one)
        if error <= replay_bound(cell, floor):
            break
    return floor


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def _gradient_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the error of all gradients as one vector: small ones alone are rounded more than they matter."""
    names = list(expected)
    return relative_error(
        torch.cat([gradients[name].double().reshape(-1) for name in names]),
        torch.cat([expected[name].double().reshape(-1) for name in names]),
    )


def start(rank: int, folder: Path) -> None:
    """Prepare a rank process: import what every cell needs, and install the example of a plug-in rule."""
    from harness.verify import example_rule

    example_rule.install(folder / f"rank{rank}", EXAMPLE_RULE)


def machine() -> dict[str, Any]:
    """Return the facts of this machine that certificates record."""
    facts = devices.environment(torch.device("cpu"), 1)
    return {key: facts[key] for key in ("python", "system", "packages", "device", "cpu_cores")}
