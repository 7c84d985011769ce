"""GGUF files as starting points: dequantized once into an ordinary model folder in the cache. No torch here.

`transformers` reads a GGUF file only whole, through torch. A process of its own does that once (`harness.model.gguf`);
checks, plans, sharded starts, checkpoints and export then work with the folder as with any other.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from harness.errors import InputError
from harness.files import atomic, locks
from harness.files.cache import Fingerprints, cache_root

KEY = "model.path"


def find(path: str | Path) -> Path | None:
    """Return the GGUF file that a path means, or None: itself, or the only one of a folder without safetensors.

    Raises:
        InputError: the folder holds several.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place if place.suffix == ".gguf" else None
    if not place.is_dir() or any(place.glob("*.safetensors*")):
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(KEY, path, f"holds several GGUF files ({names})", fix=f"{KEY}={files[0]}")
    return files[0] if files else None


def converted(file: Path, cache_dir: str | None) -> Path:
    """Return the model folder of a GGUF file, which is made if the cache does not hold it.

    Args:
        file: the GGUF file.
        cache_dir: as ``data.cache_dir``.

    Raises:
        InputError: the package `gguf` is missing, or `transformers` cannot read the file.
    """
    if importlib.util.find_spec("gguf") is None:
        reason = "is a GGUF file, which needs the package gguf"
        raise InputError(KEY, file, reason, fix="pip install 'optbench[gguf]'")
    root = cache_root(cache_dir)
    folder = root / "models" / f"{name_of(file)}-{Fingerprints(root).sha256(file)[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = locks.acquire(folder.with_name(f".{folder.name}.lock"), key="data.cache_dir")
    try:
        if not folder.is_dir():
            print(f"{file.name}: dequantizing into {folder} (once)", file=sys.stderr, flush=True)
            with atomic.new_folder(folder) as temporary:
                _convert(file, temporary)
    finally:
        lock.release()
    return folder


def _convert(file: Path, target: Path) -> None:
    command = [sys.executable, "-m", "harness.model.gguf", str(file.absolute()), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = f"cannot be read by transformers: {lines[-1][:300] if lines else 'its process was killed'}"
        fix = "a GGUF file of a type that transformers reads, or a safetensors folder"
        raise InputError(KEY, file, reason, fix=fix)


def name_of(file: Path) -> str:
    """Return a name for runs."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in file.stem)[:60] or "model"
