"""Checkpoints of language models for mode `head`: ours, or local Hugging Face folders; safetensors alone, fp64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analysis.margin.config import MarginConfig
from harness.errors import InputError
from harness.files.paths import expand
from harness.record import readers

TOKENS = 2048
"""Held-out tokens to measure on, at most."""
SEQ_LEN = 64


class LoadedCheckpoint(NamedTuple):
    """A model and what it is measured on.

    Attributes:
        step: optimizer steps it was trained for.
        optimizer: that trained it.
        model: fp64, evaluation mode.
        ids, labels: (rows, seq_len) input tokens, and the token that follows each (-100: none).
    """

    step: int
    optimizer: str
    model: nn.Module
    ids: Tensor
    labels: Tensor


class UnreadableCheckpoint(InputError):
    """One checkpoint that cannot be read; the others are measured without it."""


def find_checkpoints(config: MarginConfig, say: Callable[[str], None]) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints, ascending in step; name and leave out those that cannot be read.

    Raises:
        InputError: no pattern, no folder that matches, a folder that is not a checkpoint or has no step; other
            architectures among them; no checkpoint that can be read.
    """
    if config.checkpoints is None:
        fix = "\"checkpoints='runs/GROUP/NAME/checkpoints/step_*'\""
        raise InputError("checkpoints", "null", "is needed: mode=head measures checkpoints", fix=fix)
    paths = [path for path in expand(config.checkpoints) if path.is_dir()]
    if not paths:
        raise InputError(
            "checkpoints",
            config.checkpoints,
            "matches no folder",
            allowed="a pattern of checkpoint folders",
        )
    readable: list[tuple[int, Path]] = []
    shapes: dict[Path, dict[str, Any]] = {}
    problems: list[UnreadableCheckpoint] = []
    for path in paths:
        try:
            step, shapes[path] = _step(path), _architecture(path)
        except UnreadableCheckpoint as error:
            problems.append(error)
            continue
        readable.append((step, path))
    if not readable:
        raise problems[0]
    for problem in problems:
        say(f"left out: {problem}")
    readable.sort()
    first = readable[0][1]
    for _, path in readable:
        if shapes[path] != shapes[first]:
            differing = [k for k in shapes[first] if shapes[path].get(k) != shapes[first][k]] or ["keys"]
            reason = f"mixes architectures: {first.name} and {path.name} differ in {', '.join(differing[:4])}"
            raise InputError("checkpoints", config.checkpoints, reason, fix="a pattern that matches one run")
    _refuse_twins(readable, config)
    return readable


def _refuse_twins(checkpoints: Sequence[tuple[int, Path]], config: MarginConfig) -> None:
    """Refuse two checkpoints of one step and optimizer: they are two runs, which no curve can show as one."""
    seen: dict[tuple[int, str], Path] = {}
    for step, path in checkpoints:
        label = _label(path, config)
        other = seen.setdefault((step, label), path)
        if other != path:
            reason = f"matches two runs of {label}: {other} and {path}"
            raise InputError(
                "checkpoints", config.checkpoints, reason, fix="a pattern that matches one of them"
            )


def _label(path: Path, config: MarginConfig) -> str:
    if config.optimizer_label:
        return config.optimizer_label
    return _run_config(path).optimizer.name if _is_ours(path) else path.parent.name


def load_checkpoint(
    path: Path, step: int, config: MarginConfig, say: Callable[[str], None]
) -> LoadedCheckpoint:
    """Return one checkpoint with its tokens.

    Raises:
        InputError: damaged files, no tokens to measure on.
    """
    if _is_ours(path):
        return _ours(path, step, config, say)
    return _hugging_face(path, step, config)


def _is_ours(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def _step(path: Path) -> int:
    if _is_ours(path):
        from harness.checkpoint import store

        try:
            return int(store.read_manifest(path)["step"])
        except (store.DamagedCheckpoint, ValueError, KeyError, TypeError) as error:
            raise UnreadableCheckpoint("checkpoints", path, f"is damaged: {_line(error)}") from None
    if not (path / "config.json").is_file():
        reason = "is not a checkpoint: it has neither manifest.json (optbench) nor config.json (Hugging Face)"
        raise InputError("checkpoints", path, reason)
    numbers = re.findall(r"\d+", path.name)
    if not numbers:
        reason = "has no step: its name holds no number"
        raise InputError("checkpoints", path, reason, fix=f"rename it to {path.name}_step1000 or similar")
    return int(numbers[-1])


def _architecture(path: Path) -> dict[str, Any]:
    """Return what has to be equal for margins to be comparable."""
    if _is_ours(path):
        model = _run_config(path).model
        return {"model_type": model.model_type, **model.config}
    values, problems = readers.json_object(path / "config.json")
    if values is None:
        raise UnreadableCheckpoint("checkpoints", path, f"cannot be read: {'; '.join(problems)}")
    ignored = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    return {key: value for key, value in values.items() if key not in ignored}


def _run_config(path: Path) -> Any:
    from harness.config.compose import load_file

    try:
        return load_file(path / "config.yaml")
    except InputError as error:
        raise UnreadableCheckpoint("checkpoints", path, f"cannot be read: {error}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _ours(path: Path, step: int, config: MarginConfig, say: Callable[[str], None]) -> LoadedCheckpoint:
    from harness import data
    from harness import model as models
    from harness.checkpoint import store
    from harness.checkpoint.contents import WEIGHT
    from harness.checkpoint.files import Saved

    run_config = _run_config(path)
    try:
        store.verify(path)
        saved = Saved(path)
        trusted = run_config.trust_remote_code
        model: Any = models.build(run_config.model, seed=0, trust_remote_code=trusted, weights=False).double()
        names = saved.names(WEIGHT)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in names:
                    parameter.copy_(saved.whole(name, WEIGHT))
                elif parameter.requires_grad:
                    raise store.DamagedCheckpoint(f"{path.name}: {WEIGHT} of {name} is missing")
        saved.close()
    except store.DamagedCheckpoint as error:
        raise UnreadableCheckpoint("checkpoints", path, f"is damaged: {error}") from None
    corpus = data.check(run_config.data, run_config.seq_len, 1, 1, None, say=say, trust_remote_code=trusted)
    validation = data.Validation(corpus, run_config.seq_len, run_config.data.mode)
    ids, labels = validation.batch(0, min(math.ceil(TOKENS / run_config.seq_len), validation.length))
    label = _label(path, config)
    return LoadedCheckpoint(step, label, model.eval(), torch.from_numpy(ids), torch.from_numpy(labels))


def _hugging_face(path: Path, step: int, config: MarginConfig) -> LoadedCheckpoint:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not isinstance(config.data, str):
        raise InputError(
            "data", config.data, "is not text to measure a Hugging Face folder on", fix="data=text.txt"
        )
    text_file = Path(config.data)
    if not text_file.is_file():
        raise InputError("data", text_file, "does not exist", allowed="a text file")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float64,
            attn_implementation="eager",
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnreadableCheckpoint("checkpoints", path, f"cannot be loaded: {_line(error)}") from None
    tokens = tokenizer(text_file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    rows = min(TOKENS // SEQ_LEN, (len(tokens) - 1) // SEQ_LEN)
    if rows < 1:
        raise InputError("data", text_file, f"holds fewer than {SEQ_LEN + 1} tokens", allowed="a longer text")
    ids = tokens[: rows * SEQ_LEN].view(rows, SEQ_LEN)
    labels = tokens[1 : rows * SEQ_LEN + 1].view(rows, SEQ_LEN)
    return LoadedCheckpoint(step, _label(path, config), model.eval(), ids, labels)
