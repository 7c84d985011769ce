"""Measure Muon implementations of other packages: torch's on FSDP2's DTensors, DeepSpeed's under ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import _muon as torch_muon

from harness import run as harness_run
from harness.config import deepspeed_config
from harness.config.schema import RunConfig
from harness.engines import deepspeed as deepspeed_engine
from harness.loop import Run
from harness.record.certificates import Cell
from harness.verify import cells
from harness.verify.certify_rank import build_of, figures, report, trained
from harness.verify.controls import Defect
from harness.verify.replay import replayed, update_error
from harness.verify.step_recorder import ParameterGradients, StepRecorder
from optimizers.routing import route

MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.95), 1e-10
"""Values of the preset muon, which the peers implement."""


def certify(cell: Cell, folder: Path, reference: Path) -> dict[str, Any]:
    """Measure one peer on this rank (a collective) and return the report that `harness.verify.verdict.judge` needs.

    Args:
        cell: its `rule` is the peer's name.
        folder: scratch.
        reference: of one fp32 process with our muon.
    """
    measured = _PEERS[cell.rule](cell, folder, reference) | {"bytes_per_step": None}
    measured["matrix_names"] = measured.get("matrix_names", [])
    return measured


def _torch_muon(cell: Cell, folder: Path, reference: Path) -> dict[str, Any]:
    """Run `torch.optim.Muon` on the DTensors of `fully_shard`, with AdamW for the other parameters.

    It computes in bf16, so its replay by the exact rule shows that; "replay_error_own_code" is against its own code
    on whole matrices.
    """
    words = _words(cell, folder)
    calls: list[int] = []
    orthogonalized: list[dict[str, int]] = []
    iterate = torch_muon._zeropower_via_newtonschulz

    def counted_iterate(*args: Any, **kwargs: Any) -> Tensor:
        orthogonalized[-1][f"call {len(orthogonalized[-1])}"] = 1
        return iterate(*args, **kwargs)

    @contextmanager
    def around() -> Iterator[None]:
        def build(config: RunConfig, model: nn.Module, engine: Any) -> _Pair:
            return _Pair(list(model.named_parameters()), config)

        with (
            patch.object(harness_run, "build_optimizer", build),
            patch.object(torch_muon, "_zeropower_via_newtonschulz", counted_iterate),
        ):
            yield

    def count(run: Run, recorder: StepRecorder) -> None:
        step = run.optimizer.step

        def counted(*args: Any) -> Any:
            orthogonalized.append({})
            with CommDebugMode() as traffic:
                result = step(*args)
            calls.append(traffic.get_total_counts())
            return result

        run.optimizer.step = counted  # pyright: ignore[reportAttributeAccessIssue]

    def gradients(run: Run) -> ParameterGradients:
        return ParameterGradients(dict(run.model.named_parameters()))

    done = trained(words, Defect(around, count), gradients)
    measured = report(done)
    if done.recorder.gradients:
        measured |= figures(done, build_of(done.config), reference)
        measured["matrices"] = len(measured["matrix_names"])
        _, weights = replayed(
            lambda named: _Pair(named, done.config),
            done.recorder.start,
            done.recorder.gradients,
            done.factor,
            torch.float32,
        )
        measured["replay_error_own_code"] = update_error(done.recorder.start, done.recorder.end, weights)[0]
    measured |= {"collectives_per_step": max(calls), "orthogonalized": orthogonalized}
    return measured


class _Pair:
    """Muon for hidden matrices and AdamW for the rest, behind one optimizer's face."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], config: RunConfig) -> None:
        matrices = {r.name for r in route(named, "muon") if r.rule == "muon"}
        lr, options = config.optimizer.lr, config.optimizer.options
        assert lr is not None
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [p for name, p in named if name in matrices], lr=lr, weight_decay=0.0, momentum=MOMENTUM
            ),
            torch.optim.AdamW(
                [p for name, p in named if name not in matrices],
                lr=options["aux_lr"],
                betas=BETAS,
                eps=EPS,
                weight_decay=0.0,
            ),
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups of both optimizers."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of both optimizers."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Take the step of both optimizers."""
        for part in self.parts:
            part.step()


def _deepspeed_muon(cell: Cell, folder: Path, reference: Path) -> dict[str, Any]:
    """Run DeepSpeed's `"optimizer": {"type": "Muon"}`.

    It orthogonalizes while gradients are reduced, so that nobody sees what its optimizer receives: what is left is
    the end-to-end figure and the number of orthogonalizations.
    """
    words = _words(cell, folder)
    settings = _deepspeed_settings(cell, _config(words))
    calls: list[int] = []

    @contextmanager
    def around() -> Iterator[None]:
        deepspeed = deepspeed_engine._library()
        from deepspeed.runtime.zero.muon import original_muon

        update = original_muon.muon_update

        def counted(gradient: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls[-1] += 1
            return update(gradient, *args, **kwargs)

        def initialize(model: nn.Module, optimizer: Any, config: RunConfig) -> Any:
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
            engine, *_ = deepspeed.initialize(
                model=model, config=settings, model_parameters=model.parameters()
            )
            return engine

        with (
            # Compiling it takes ten seconds and computes the same.
            torch.compiler.set_stance("force_eager"),
            patch.object(original_muon, "muon_update", counted),
            patch.object(deepspeed_engine, "_initialize", initialize),
            # DeepSpeed's optimizer has other groups than the placeholder, and no checkpoint asks for its layout.
            patch.object(deepspeed_engine, "bind", lambda optimizer, engine, groups: None),
            patch.object(harness_run, "build_optimizer", lambda config, model, engine: _Idle()),
        ):
            yield

    def count(run: Run, recorder: StepRecorder) -> None:
        calls.append(0)
        measure = recorder.measure

        def next_step(step: int, row: dict[str, Any]) -> None:
            measure(step, row)
            calls.append(0)

        recorder.measure = next_step

    done = trained(words, Defect(around, count), lambda run: ParameterGradients({}))
    measured = report(done) | {"matrices": None, "collectives_per_step": None}
    measured["orthogonalized"] = [
        {f"rank {dist.get_rank()}, call {i}": 1 for i in range(n)}
        for n in calls[: len(done.recorder.grad_norms)]
    ]
    if done.recorder.gradients:
        known = torch.load(reference)
        end = done.recorder.weights[cells.REFERENCE_STEPS]
        measured["end_to_end_error"] = update_error(known["start"], end, known["end"])[0]
        measured["replay_error"] = None
        measured["delivery_error"] = None
        measured["received_norms"] = []
    return measured


class _Idle:
    """A placeholder, because DeepSpeed's own optimizer does the work."""

    param_groups: list[dict[str, Any]] = []  # noqa: RUF012

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: DeepSpeed clears its gradients."""

    def step(self) -> None:
        """Do nothing: it is never called."""


def _deepspeed_settings(cell: Cell, config: RunConfig) -> dict[str, Any]:
    settings = deepspeed_config.effective(config)
    if cell.variant == "default clipping":
        del settings["gradient_clipping"]
    parameters = {
        "muon_lr": config.optimizer.lr,
        "adam_lr": config.optimizer.options["aux_lr"],
        "momentum": MOMENTUM,
        "betas": list(BETAS),
        "eps": EPS,
        "weight_decay": 0.0,
    }
    settings["optimizer"] = {"type": "Muon", "params": parameters}
    if settings["zero_optimization"]["stage"] == 3:
        # "Muon and reduce scatter cannot be used together".
        settings["zero_optimization"]["reduce_scatter"] = False
    return settings


def _words(cell: Cell, folder: Path) -> list[str]:
    return cells.overrides(cell, str(folder))


def _config(words: list[str]) -> RunConfig:
    from harness.preparation import prepare

    return prepare(words, say=lambda text: None, worker=True, writes_folder=False).config


_PEERS: dict[str, Callable[[Cell, Path, Path], dict[str, Any]]] = {
    "torch.optim.Muon": _torch_muon,
    "DeepSpeed Muon": _deepspeed_muon,
}
