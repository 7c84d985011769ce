"""The arguments of `optbench matrix`: which models are fine-tuned, and the runs that do it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from analysis.compare import arguments
from analysis.compare.arguments import ArmSpec, ComparisonPlan
from analysis.matrix.results import run_name
from analysis.runs import loading
from analysis.runs.run import LoadedRun
from harness import command_line
from harness.config.typed_keys import format_value
from harness.errors import InputError
from optimizers import presets

COMMAND = "matrix"
KEY = "pretrained"
_REFUSED = ("model", "model.path", "model.name")


class Start(NamedTuple):
    """A pretrained model.

    Attributes:
        label: of the optimizer that pretrained it.
        seed: of its run.
        run: folder of its run.
        folder: where its weights are exported to.
    """

    label: str
    seed: int
    run: Path
    folder: Path


@dataclass(frozen=True)
class MatrixPlan:
    """The models, and the fine-tuning runs by optimizer."""

    comparison: ComparisonPlan
    starts: list[Start]
    dry_run: bool

    def runs(self) -> list[list[str]]:
        """Return the overrides of all runs: for each seed each model with each optimizer."""
        plan = self.comparison
        return [
            self._overrides(start, arm)
            for seed in plan.seeds
            for start in self.starts
            if start.seed == seed
            for arm in plan.arms
        ]

    def _overrides(self, start: Start, arm: ArmSpec) -> list[str]:
        own = {
            "model.path": str(start.folder),
            "model.name": start.label,
            "group": self.comparison.group,
            "name": run_name(start.label, arm.label, start.seed),
        }
        written = [f"{key}={format_value(value)}" for key, value in own.items()]
        return [*self.comparison.shared, *arm.overrides, f"seed={start.seed}", *written]


def read(argv: Sequence[str]) -> MatrixPlan | Path:
    """Parse the arguments of ``optbench matrix``.

    Returns:
        The plan of runs, or the folder whose finished runs are to be reported.

    Raises:
        InputError: no folder of pretrained runs, no finished runs in it, or anything that `compare` refuses.
    """
    given = command_line.parse(COMMAND, argv)
    folders = [name for name in given.names if name not in presets.names() and Path(name).is_dir()]
    if given.names and given.names == folders and not given.overrides:
        if len(folders) > 1:
            raise InputError(
                COMMAND, " ".join(folders), "is not one folder", fix=f"optbench {COMMAND} {folders[0]}"
            )
        return Path(folders[0])
    values = dict(override.split("=", 1) for override in given.overrides)
    for key in _REFUSED:
        if key in values:
            reason = "is that of the pretrained runs"
            raise InputError(key, values[key], reason, fix=f"leave out {key}, and give {KEY}=DIR")
    if not values.get(KEY):
        fix = f"{KEY}=runs/GROUP, the folder of an optbench compare"
        raise InputError(KEY, "nothing", "is required: the models to fine-tune", fix=fix)
    rest = [argument for argument in argv if not argument.startswith(f"{KEY}=")]
    plan = arguments.plan([word for word in rest if word != "--dry-run"], COMMAND)
    models = Path(values.get("runs_dir", "runs")) / f"{plan.group}-models"
    starts = find_starts(Path(values[KEY]), models)
    seeds = _seeds(starts, plan.seeds if {"seed", "seeds"} & set(values) else None)
    chosen = [start for start in starts if start.seed in seeds]
    command = plan.command.replace(f"optbench {COMMAND}", f"optbench {COMMAND} {KEY}={values[KEY]}", 1)
    return MatrixPlan(replace(plan, seeds=seeds, command=command), chosen, given.options.dry_run)


def find_starts(folder: Path, models: Path) -> list[Start]:
    """Return the finished runs below a folder as models to start from, by label and seed.

    Raises:
        InputError: no such folder, fewer than two optimizers in it, or two runs of one optimizer and seed.
    """
    if not folder.is_dir():
        raise InputError(KEY, folder, "is not a folder", allowed="the folder of an optbench compare")
    starts: dict[tuple[str, int], Start] = {}
    for run in loading.load(folder):
        if run.is_external or not run.finished:
            continue
        label = _label(run)
        if (label, run.seed) in starts:
            reason = f"has two finished runs of {label} with seed {run.seed}"
            raise InputError(KEY, folder, reason, fix="a folder with one run of each optimizer and seed")
        identity = str(run.status.get("identity") or "unknown")[:6]
        target = models / f"{label}-seed{run.seed}-{identity}"
        starts[label, run.seed] = Start(label, run.seed, run.folder, target)
    if len({label for label, _ in starts}) < 2:
        reason = (
            f"has finished runs of {len({label for label, _ in starts})} optimizers; a matrix has two or more"
        )
        raise InputError(KEY, folder, reason, fix="optbench compare adamw muon sumo group=pretrained …")
    return list(starts.values())


def _label(run: LoadedRun) -> str:
    name = str(run.config.get("name") or "")
    return name.removesuffix(f"-seed{run.seed}") if name.endswith(f"-seed{run.seed}") else run.optimizer


def _seeds(starts: Sequence[Start], wanted: Sequence[int] | None) -> list[int]:
    """Return the seeds to run: those wanted, else those that every optimizer has."""
    by_label: dict[str, set[int]] = {}
    for start in starts:
        by_label.setdefault(start.label, set()).add(start.seed)
    common = sorted(set.intersection(*by_label.values()))
    if wanted is None and common:
        return common
    lacking: Mapping[str, list[int]] = {
        label: sorted(set(wanted or ()) - seeds)
        for label, seeds in by_label.items()
        if set(wanted or ()) - seeds
    }
    if wanted is None or lacking:
        label = next(iter(lacking), next(iter(by_label)))
        reason = f"are not all among the finished pretraining runs: {label} has {sorted(by_label[label])}"
        fix = f"seed={common[0]} seeds={len(common)}" if common else "the same seeds for every optimizer"
        raise InputError("seeds", ",".join(map(str, wanted or ())) or "null", reason, fix=fix)
    return list(wanted)
