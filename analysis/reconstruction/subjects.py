"""The networks under examination and the folder of a job, from which finished parts are taken up again.

A subject is the network in closed form, a checkpoint of a trained victim, or a checkpoint of the user's own.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from analysis.reconstruction import closed_form, external, samples, victim
from analysis.reconstruction.attack import Candidates, GridPoint
from analysis.reconstruction.config import PLACES, ReconstructionConfig
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import Network
from analysis.reconstruction.samples import SampleSet
from analysis.reconstruction.victim import Architecture, VictimCheckpoint
from harness.errors import InputError
from harness.files import atomic, bounded
from harness.files.bounded import UnreadableFile
from harness.record import readers
from harness.visible import csv_cell
from optimizers import OptionError

CONFIG = "config.yaml"
SUBFOLDERS = ("victims", "candidates", "alternatives", "parts", "images")
_ARRAYS = ("x", "labels", "lambdas", "at_level", "history", "history_steps")
_NUMBERS = ("level_step", "residual", "hard_residual", "alignment")
"""Fields of `Candidates` that are stored as arrays, and as numbers."""
TableRow = dict[str, Any]
TABLES = ("certificate", "alternatives", "attack", "susceptibility", "paired", "duplicates")


def check_folder(config: ReconstructionConfig) -> None:
    """Refuse a folder that this job must not write to, before anything is spent.

    Raises:
        InputError: it holds results of another configuration, or files of something else.
    """
    out = config.folder
    if out.is_file():
        raise InputError("out", out, "is a file", fix="out=runs/reconstruction")
    if not out.is_dir() or not any(out.iterdir()) or config.overwrite:
        return
    path = out / CONFIG
    if not path.is_file():
        raise InputError("out", out, "holds files that are no reconstruction job", fix="another out=")
    content = readers.config(path)[0] or {}
    if content.get("identity") != config.identity:
        now = config.model_dump(mode="json")
        before = keys if isinstance(keys := content.get("keys"), dict) else {}
        keys = ", ".join(k for k in now if k not in PLACES and now[k] != before.get(k))
        reason = f"holds results of another configuration (it differs in {keys})"
        raise InputError("out", out, reason, fix="another out=, or overwrite=true")


class JobFolder:
    """Files of one job, each written whole."""

    def __init__(self, config: ReconstructionConfig) -> None:
        """Create the folder; `overwrite` removes the files of an earlier job from it."""
        self.path = config.folder
        if config.overwrite and self.path.is_dir() and (self.path / CONFIG).is_file():
            for name in (*SUBFOLDERS, CONFIG):
                place = self.path / name
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        try:
            for name in SUBFOLDERS:
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                "out", self.path, f"cannot be written ({error.strerror})", fix="another out="
            ) from None
        content = {"identity": config.identity, "keys": config.model_dump(mode="json")}
        atomic.write_text(self.path / CONFIG, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def rows(self, key: str, compute: Callable[[], Sequence[TableRow]]) -> list[TableRow]:
        """Return the rows that were computed before under this key, else compute and store them."""
        path = self.path / "parts" / f"{key}.json"
        with suppress(FileNotFoundError, UnreadableFile):  # a damaged one is computed again
            stored = bounded.read_json(path, [])
            if isinstance(stored, list) and all(isinstance(row, dict) for row in stored):
                return stored
        rows = list(compute())
        atomic.write_text(path, json.dumps(rows) + "\n")
        return rows

    def checkpoints(self, name: str) -> list[VictimCheckpoint] | None:
        """Return the stored checkpoints of a victim (step 0 first), or None."""
        path = self.path / "victims" / f"{name}.safetensors"
        if not path.is_file():
            return None
        tensors = load_file(path)
        steps: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            step, _, part = key.partition("/")
            steps.setdefault(int(step), {})[part] = value
        return [VictimCheckpoint(step, _network(parts)) for step, parts in sorted(steps.items())]

    def keep_checkpoints(self, name: str, checkpoints: Sequence[VictimCheckpoint]) -> None:
        """Write a victim's checkpoints."""
        tensors = {
            f"{c.step}/{part}": value for c in checkpoints for part, value in _parts(c.network).items()
        }
        atomic.write_bytes(self.path / "victims" / f"{name}.safetensors", save(tensors))

    def candidates(self, name: str) -> list[Candidates] | None:
        """Return the stored candidates of an attack, or None."""
        path = self.path / "candidates" / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            entries = json.loads(str(arrays["points"]))
            return [
                _candidates(entry, {key: arrays[f"{i}/{key}"] for key in _ARRAYS})
                for i, entry in enumerate(entries)
            ]

    def keep_candidates(self, name: str, candidates: Sequence[Candidates]) -> None:
        """Write what an attack found: x, λ, labels, K and the grid point of each."""
        self._npz(
            self.path / "candidates" / f"{name}.npz",
            points=np.array(json.dumps([_entry(c) for c in candidates])),
            **{f"{i}/{key}": value for i, c in enumerate(candidates) for key, value in _arrays(c).items()},
        )

    def keep_arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Write arrays (alternatives) as alternatives/NAME.npz."""
        self._npz(self.path / "alternatives" / f"{name}.npz", **arrays)

    @staticmethod
    def _npz(path: Path, **arrays: Any) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        atomic.write_bytes(path, buffer.getvalue())


def _arrays(c: Candidates) -> dict[str, np.ndarray]:
    tensors = {"x": c.x, "labels": c.labels, "lambdas": c.lambdas}
    at_level = c.at_level.numpy() if c.at_level is not None else np.zeros((0, 0))
    history = {"history": np.array(c.history), "history_steps": np.array(c.history_steps)}
    return {**{name: tensor.numpy() for name, tensor in tensors.items()}, "at_level": at_level, **history}


def _entry(c: Candidates) -> dict[str, Any]:
    return {"point": c.point.__dict__, **{name: getattr(c, name) for name in _NUMBERS}}


def _candidates(entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> Candidates:
    return Candidates(
        point=GridPoint(**entry["point"]),
        x=torch.from_numpy(arrays["x"]),
        labels=torch.from_numpy(arrays["labels"]),
        lambdas=torch.from_numpy(arrays["lambdas"]),
        at_level=torch.from_numpy(arrays["at_level"]) if arrays["at_level"].size else None,
        history=tuple(arrays["history"].tolist()),
        history_steps=tuple(int(step) for step in arrays["history_steps"]),
        **{name: entry[name] for name in _NUMBERS},
    )


def _parts(network: Network) -> dict[str, Tensor]:
    parts = {f"weight{i}": w.contiguous() for i, w in enumerate(network.weights)}
    return parts if network.bias is None else {**parts, "bias": network.bias.contiguous()}


def _network(parts: dict[str, Tensor]) -> Network:
    count = sum(name.startswith("weight") for name in parts)
    return Network(tuple(parts[f"weight{i}"] for i in range(count)), parts.get("bias"))


def write_tables(folder: Path, tables: Mapping[str, Sequence[TableRow]]) -> list[Path]:
    """Write each table as NAME.parquet and NAME.csv into an existing folder; an empty one has no columns."""
    written = []
    for name, rows in tables.items():
        frame = pd.DataFrame(list(rows))
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        for path, data in (
            (folder / f"{name}.parquet", buffer.getvalue()),
            (folder / f"{name}.csv", _safe(frame).to_csv(index=False).encode()),
        ):
            atomic.write_bytes(path, data)
            written.append(path)
    return written


def _safe(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with its texts as cells that no spreadsheet evaluates."""
    return frame.map(lambda value: csv_cell(value) if isinstance(value, str) else value)


FIXTURE, EXTERNAL = "closed_form", "checkpoint"
"""Names of the subjects that no optimizer of this job trained."""


@dataclass(frozen=True)
class Subject:
    """One checkpoint to examine.

    Attributes:
        optimizer, data_set, seed, step: of the training. The closed form and external checkpoints have step 0.
        network: weights at this step.
        initial: weights before training, or None.
        hybrid: the norm in which a step of its optimizer is a ball.
        lambdas: (n, 1) known multipliers (closed form), or None.
        is_exact: the network is an exact KKT point.
    """

    optimizer: str
    data_set: int
    seed: int
    step: int
    network: Network
    initial: Network | None
    hybrid: Geometry
    lambdas: Tensor | None = None
    is_exact: bool = False

    @property
    def key(self) -> str:
        """Name of the subject in files."""
        return f"{self.optimizer}-set{self.data_set}-seed{self.seed}-step{self.step}"


@dataclass(frozen=True)
class ImageSet:
    """Training images, their labels and the public pool as float64 tensors, the task, and the number of the set."""

    samples: SampleSet
    task: str
    x: Tensor
    labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor
    data_set: int = 0


def derived_seed(seed: int, data_set: int, use: Literal["victim", "attack", "baseline"]) -> int:
    """Return the seed of one use on one set of images, so that sets are independent replicates.

    Without `use`, initial candidates would be parallel to the victim's initial weights.
    """
    entropy = (seed, data_set, ("victim", "attack", "baseline").index(use))
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def load(config: ReconstructionConfig) -> tuple[list[ImageSet], Network | None]:
    """Return the sets of images, and the external network if the configuration names one.

    Raises:
        InputError: see `samples.of_config` and `external`.
    """
    if config.checkpoint is not None and config.batch is not None:
        network = external.network(config.checkpoint)
        d, k = network.weights[0].shape[1], network.weights[-1].shape[0]
        return [_images(external.samples(config.batch, d, k), 0)], network
    sets = [_images(samples.of_config(config, number), number) for number in range(config.data_sets)]
    return sets, None


def subjects(
    config: ReconstructionConfig,
    images: ImageSet,
    network: Network | None,
    folder: JobFolder,
    say: Callable[[str], None],
) -> Iterator[Subject]:
    """Yield every checkpoint on one set of images; victims are trained, or taken from the folder, on the way.

    Raises:
        InputError: options that an optimizer does not have, weights that diverged.
    """
    if config.mode == "fixture":
        closed = closed_form.build(images.samples.images, images.samples.labels, config.neurons)
        hybrid = Geometry("l2")
        yield Subject(FIXTURE, 0, 0, 0, closed.network, None, hybrid, closed.lambdas, is_exact=True)
        return
    if network is not None:
        yield Subject(EXTERNAL, 0, 0, 0, network, None, Geometry("l2"))
        return
    settings = {name: _options(config, name) for name in config.optimizer}
    for seed in range(config.seed, config.seed + config.seeds):
        for name in config.optimizer:
            yield from _victim(config, images, name, settings[name], seed, folder, say)


def _victim(
    config: ReconstructionConfig,
    images: ImageSet,
    name: str,
    settings: dict[str, object],
    seed: int,
    folder: JobFolder,
    say: Callable[[str], None],
) -> Iterator[Subject]:
    shape = Architecture(
        images.x.shape[1], tuple(config.width), images.samples.outputs, config.bias, config.init_scale
    )
    start = victim.initial(shape, derived_seed(seed, images.data_set, "victim"))
    key = f"{name}-set{images.data_set}-seed{seed}"
    checkpoints = folder.checkpoints(key)
    if checkpoints is None:
        if "victim" not in config.stages:
            raise InputError(
                "stages",
                ",".join(config.stages),
                f"needs the victim {key}, which is not there",
                fix="stages=victim first",
            )
        say(f"training {key}: {config.steps_to_keep[-1]} steps")
        trained = victim.train(
            name, settings, start, images.x, images.labels, images.task, config.steps_to_keep
        )
        checkpoints = [VictimCheckpoint(0, start), *trained]
        folder.keep_checkpoints(key, checkpoints)
    hybrid = victim.step_geometry(name, settings, start)
    for checkpoint in checkpoints[1:]:
        yield Subject(
            name, images.data_set, seed, checkpoint.step, checkpoint.network, checkpoints[0].network, hybrid
        )


def _options(config: ReconstructionConfig, name: str) -> dict[str, object]:
    try:
        return victim.resolve_options(name, config.options.get(name, {}))
    except OptionError as error:
        key = f"{name}.{error.key}"
        raise InputError(
            key, error.value, error.reason, allowed=error.allowed, suggestion=error.suggestion
        ) from None


def _images(dataset: SampleSet, number: int) -> ImageSet:
    task = "binary" if dataset.outputs == 1 else "multiclass"
    arrays = (dataset.images, dataset.labels, dataset.heldout, dataset.heldout_labels)
    x, labels, heldout, heldout_labels = (torch.from_numpy(a) for a in arrays)
    return ImageSet(dataset, task, x, labels, heldout, heldout_labels, number)
