"""`optbench export CHECKPOINT FOLDER`: trained weights as a Hugging Face model folder, for whoever has no optbench."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from harness import command_line
from harness.config import compose
from harness.errors import InputError
from harness.files import atomic
from harness.output import json_document
from harness.record import readers

if TYPE_CHECKING:
    from torch import nn

    from harness.config.schema import RunConfig
    from harness.model import ClassificationHead


class Source(NamedTuple):
    """A checkpoint that is exported, and how far its run came.

    Attributes:
        folder: of the checkpoint.
        step: steps done when it was written.
        last_step: steps that the run has done, as far as its folder tells.
        steps_planned: steps that the run was asked for.
        skipped: what is wrong with newer checkpoints, a line each.
    """

    folder: Path
    step: int
    last_step: int
    steps_planned: int
    skipped: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """Return what a user of the weights must know who takes them for those of the finished run."""
        lines = [f"skipped: {line}" for line in self.skipped]
        if self.step < self.last_step:
            lines.append(f"step {self.step} is not the last step of the run: it has done {self.last_step}")
        elif self.step < self.steps_planned:
            lines.append(f"the run has not finished: this is step {self.step} of {self.steps_planned}")
        return lines


def main(argv: Sequence[str]) -> int:
    """Write config.json, model.safetensors (fp32) and the tokenizer.

    The first word is a run folder (its newest valid checkpoint is taken) or a checkpoint; the second must not exist.

    Raises:
        InputError: there is no valid checkpoint, or the folder exists or cannot be written.
    """
    arguments = command_line.parse("export", argv)
    if len(arguments.rest) != 2:
        raise InputError(
            "export",
            " ".join(arguments.rest) or "nothing",
            "is not CHECKPOINT FOLDER",
            fix="optbench export runs/default/mine model",
        )
    target = Path(arguments.rest[1])
    if target.exists() or target.is_symlink():
        raise InputError("export", target, "exists already", fix="another folder")
    source = find(Path(arguments.rest[0]))
    weights = choice(source.folder, arguments.options.weights)
    has_tokenizer = write(source.folder, target, weights)
    warnings = source.warnings
    if not has_tokenizer:
        warnings.append("without the tokenizer: its corpus is not in the cache (data.cache_dir)")
    if arguments.options.json:
        facts = {
            "step": source.step,
            "last_step": source.last_step,
            "steps_planned": source.steps_planned,
            "is_last": source.step >= source.last_step,
            "weights": weights,
            "merged_adapter": adapter_of(source.folder),
        }
        where = {"checkpoint": str(source.folder), "folder": str(target), "has_tokenizer": has_tokenizer}
        print(json_document(**where, **facts, warnings=warnings))
    else:
        kind = "the average of the weights at " if weights == "average" else ""
        print(f"{kind}step {source.step} of {source.steps_planned}, from {source.folder}")
        if (adapter := adapter_of(source.folder)) is not None:
            print(f"the {adapter} adapter is merged into its weights")
        print(target)
    sys.stdout.flush()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def choice(source: Path, wanted: str | None) -> str:
    """Return which weights of a checkpoint are exported: "average" or "raw".

    Args:
        source: a checkpoint.
        wanted: as given; None: what val/loss is of, the average where the run keeps one.

    Raises:
        InputError: the average is wanted of a run that keeps none.
    """
    from harness.checkpoint.store import CONFIG

    options = compose.load_file(source / CONFIG).optimizer.options
    has_average = options.get("average_decay") is not None
    if wanted == "average" and not has_average:
        reason = "is not in this checkpoint: the run was trained without optimizer.average_decay"
        raise InputError("--weights", "average", reason, allowed="raw", fix="--weights raw")
    return wanted or ("average" if has_average else "raw")


def adapter_of(source: Path) -> str | None:
    """Return the kind of adapter of a checkpoint's run, or None."""
    from harness.checkpoint.store import CONFIG

    return compose.load_file(source / CONFIG).model.adapter


def write(source: Path, target: Path, weights: str = "raw") -> bool:
    """Write a checkpoint as a model folder, whole or not at all; returns whether the tokenizer is in it.

    Args:
        source: a checkpoint that `store.verify` accepted.
        target: does not exist.
        weights: "raw" or "average".

    Raises:
        InputError: the checkpoint lacks a weight, or the disk refuses.
    """
    from harness.checkpoint.store import CONFIG, DamagedCheckpoint

    config = compose.load_file(source / CONFIG)
    try:
        # Before anything is written: a damaged checkpoint leaves no folder.
        model: Any = load(source, config, weights)
    except DamagedCheckpoint as error:
        raise InputError("export", source, f"is damaged: {error}") from error
    try:
        with atomic.new_folder(target) as folder:
            with contextlib.redirect_stdout(
                sys.stderr
            ):  # it imports DeepSpeed, which greets on standard output
                model.save_pretrained(folder)
            return _copy_tokenizer(source, config, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        fix = "a folder on a disk with room that you may write to"
        raise InputError(
            "export", target, f"cannot be written ({reason}); nothing is left of it", fix=fix
        ) from error


def find(place: Path) -> Source:
    """Return the checkpoint that a path means: itself, or the newest valid one of a run folder.

    Raises:
        InputError: there is none; says what is wrong with those that there are.
    """
    from harness.checkpoint import store
    from harness.checkpoint.store import DamagedCheckpoint, Store

    is_checkpoint = (place / store.MANIFEST).exists()
    run = place.absolute().parent.parent if is_checkpoint else place
    # Newest first: the first valid one is taken, and what is wrong with newer ones is reported.
    candidates = [place] if is_checkpoint else [Store(run).folder(step) for step in Store(run).steps()]
    problems: list[str] = []
    for folder in candidates:
        try:
            step = int(store.verify(folder)["step"])
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        last, planned = _progress(run)
        return Source(folder, step, max(step, last), max(step, planned), tuple(problems))
    reason = "; ".join(problems) or "holds no checkpoint"
    raise InputError(
        "export",
        place,
        reason,
        allowed="a run folder, or a folder below its checkpoints/",
        fix="train with checkpoint.every=auto, which keeps the last step",
    )


def _progress(run: Path) -> tuple[int, int]:
    """Return how many steps a run has done and was asked for, as far as its folder tells (0: unknown)."""
    from harness.checkpoint.store import Store

    status, _ = readers.status(run)
    done, planned = (status.step or 0, status.steps or 0) if status is not None else (0, 0)
    return max([done, *Store(run).steps()]), planned


def load(folder: Path, config: RunConfig, weights: str = "raw") -> nn.Module:
    """Return the model of a checkpoint, fp32 on the CPU, in evaluation mode; an adapter is merged into its weights.

    Args:
        folder: of the checkpoint.
        config: of its run.
        weights: "raw" or "average".

    Raises:
        DamagedCheckpoint: a weight is missing, or has another shape.
    """
    import torch

    from harness.checkpoint.contents import WEIGHT
    from harness.checkpoint.files import Saved
    from harness.model import adapters
    from harness.model.build import build
    from optimizers.named_state import StatePiece
    from optimizers.weight_average import KIND as AVERAGE

    kind = AVERAGE if weights == "average" else WEIGHT
    _check_starting_point(folder, config)
    model = build(
        config.model,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        weights=False,
        head=_head(folder, config),
    )
    saved = Saved(folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Frozen weights come from the starting point; checkpoints hold trained ones.
            if p.requires_grad:
                p.copy_(saved.read(StatePiece(name, kind, tuple(p.shape), None, 0, p, True)))
    saved.close()
    adapters.merge(model)
    model.eval()
    return model


def _check_starting_point(source: Path, config: RunConfig) -> None:
    """Refuse to merge an adapter into other weights than those that it was trained with.

    Raises:
        InputError: ``model.path`` holds others now, or is gone.
    """
    from harness.checkpoint.store import read_manifest
    from harness.config.identity import weights_sha256

    recorded = read_manifest(source).get("weights_sha256")
    if recorded is not None and recorded != weights_sha256(config):
        reason = "does not hold the weights that this adapter was trained with"
        raise InputError("model.path", config.model.path, reason, fix="put the folder back as it was")


def _head(source: Path, config: RunConfig) -> ClassificationHead | None:
    """Return the head of a classifier, from the configuration and the manifest of its checkpoint; else None."""
    if config.task.name != "classify":
        return None
    from harness.checkpoint.store import read_manifest
    from harness.model import ClassificationHead

    # A run has written them into its configuration: the data may be gone.
    classes = None if config.task.target == "number" else tuple(config.task.labels or ())
    pad_id = read_manifest(source).get("pad_id")
    return ClassificationHead(classes, pad_id if isinstance(pad_id, int) else 0)


def _copy_tokenizer(source: Path, config: RunConfig, target: Path) -> bool:
    """Copy the tokenizer of the corpus, if the corpus is still in the cache; return whether it was there."""
    from harness.checkpoint.store import read_manifest
    from harness.data.cache import tokenizer_folder

    folder = tokenizer_folder(config.data, str(read_manifest(source).get("corpus_sha256")))
    if folder is None:
        return False
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return True
