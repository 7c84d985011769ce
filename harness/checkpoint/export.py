"""`optbench export CHECKPOINT FOLDER`: trained weights as a Hugging Face model folder, for whoever has no optbench."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli import document
from harness.config import compose
from harness.config.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from harness.config.schema import RunConfig


def main(argv: Sequence[str]) -> int:
    """Write config.json, model.safetensors (fp32) and the tokenizer.

    The first word is a run folder (its newest valid checkpoint is taken) or a checkpoint; the second must not exist.

    Raises:
        InputError: there is no valid checkpoint, or the folder exists.
    """
    words = [word for word in argv if word != "--json"]
    if len(words) != 2:
        raise InputError(
            "export",
            " ".join(words) or "nothing",
            "is not CHECKPOINT FOLDER",
            fix="optbench export runs/default/mine model",
        )
    source, target = find(Path(words[0])), Path(words[1])
    if target.exists():
        raise InputError("export", target, "exists already", fix="another folder")
    config = compose.load_file(source / "config.yaml")
    model = load(source, config)
    target.mkdir(parents=True)
    exported: Any = model
    with contextlib.redirect_stdout(sys.stderr):  # it imports DeepSpeed, which greets on standard output
        exported.save_pretrained(target)
    has_tokenizer = _copy_tokenizer(source, config, target)
    if "--json" in argv:
        print(document(checkpoint=str(source), folder=str(target), has_tokenizer=has_tokenizer))
    else:
        print(
            f"from {source}"
            + ("" if has_tokenizer else ", without the tokenizer: its corpus is not in the cache")
        )
        print(target)
    return 0


def find(place: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest valid one of a run folder.

    Raises:
        InputError: there is none; says what is wrong with those that there are.
    """
    from harness.checkpoint import store
    from harness.checkpoint.store import DamagedCheckpoint, Store

    checkpoints = Store(place)
    own = (place / store.MANIFEST).exists()
    candidates = [place] if own else [checkpoints.folder(step) for step in checkpoints.steps()]
    problems = []
    for folder in candidates:
        try:
            store.verify(folder)
            return folder
        except DamagedCheckpoint as error:
            problems.append(str(error))
    reason = "; ".join(problems) or "holds no checkpoint"
    raise InputError(
        "export",
        place,
        reason,
        allowed="a run folder, or a folder below its checkpoints/",
        fix="checkpoint.every=N",
    )


def load(folder: Path, config: RunConfig) -> nn.Module:
    """The model of a checkpoint, fp32 on the CPU, in evaluation mode.

    Raises:
        DamagedCheckpoint: a weight is missing, or has another shape.
    """
    import torch

    from harness.checkpoint.files import Saved
    from harness.checkpoint.parts import WEIGHT
    from harness.model.build import build
    from optimizers.named_state import StatePiece

    model = build(config.model, seed=config.seed)
    saved = Saved(folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(saved.read(StatePiece(name, WEIGHT, tuple(p.shape), None, 0, p, True)))
    saved.close()
    model.eval()
    return model


def _copy_tokenizer(source: Path, config: RunConfig, target: Path) -> bool:
    """The tokenizer that the corpus was made with, if the corpus is still in the cache."""
    from harness.checkpoint.store import read_manifest
    from harness.data.cache import tokenizer_folder

    folder = tokenizer_folder(config.data, str(read_manifest(source).get("corpus_sha256")))
    if folder is None:
        return False
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return True
