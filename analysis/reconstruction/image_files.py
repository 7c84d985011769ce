"""Local image files: MNIST as IDX or as pickled arrays, CIFAR-10 as pickled batches, anything as .npz.

Pickles are read by an unpickler that builds numpy arrays and plain containers and refuses everything else:
a pickle may otherwise run any code. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import InputError

_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801
_CIFAR_SHAPE = (3, 32, 32)
_NUMPY_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}
_MAX_BYTES = 2**31


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_NAMES:
            raise pickle.UnpicklingError(f"asks for {module}.{name}; only numpy arrays are read")
        if module.startswith("numpy.core"):
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def read(kind: str, path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Return images in [0, 1] as float64 rows (n, d), class numbers (n,), and the shape of an image.

    Args:
        kind: "mnist" or "cifar10".
        path: MNIST: a folder with IDX files (`train-images-idx3-ubyte`, `.gz` or not), a `mnist.pkl.gz`, or a
            wheel or zip that holds one. CIFAR-10: a folder with `data_batch_*`, or the `.tar.gz`. Both: an
            .npz with `images` (n, …) and `labels` (n,).

    Raises:
        InputError: no such file, another format, or a pickle that holds more than arrays.
    """
    if not path.exists():
        raise InputError("data_path", path, "does not exist", fix="data=digits, which needs no file")
    reader: Callable[[Path], tuple[np.ndarray, np.ndarray, tuple[int, ...]]]
    reader = _npz if path.suffix == ".npz" else {"mnist": _mnist, "cifar10": _cifar}[kind]
    try:
        images, labels, shape = reader(path)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise InputError("data_path", path, f"is not {kind} ({_line(error)})") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, tarfile.TarError, AttributeError) as error:
        raise InputError("data_path", path, f"cannot be read ({_line(error)})") from None
    if images.shape[0] != labels.shape[0] or not images.size:
        raise InputError("data_path", path, f"has {images.shape[0]} images and {labels.shape[0]} labels")
    rows = images.reshape(images.shape[0], -1).astype(np.float64)
    if not np.isfinite(rows).all():
        raise InputError("data_path", path, "holds numbers that are not finite")
    return (rows / 255.0 if rows.max() > 1.5 else rows), labels.astype(np.int64), shape


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return images, labels, tuple(images.shape[1:])


def _mnist(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    if path.is_dir():
        images = _idx(_first(path, "train-images"), _IDX_IMAGES)
        return images, _idx(_first(path, "train-labels"), _IDX_LABELS), tuple(images.shape[1:])
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("mnist.pkl.gz"))
            content = archive.read(name)
    else:
        content = path.read_bytes()
    images, labels = _unpickled(content)[0]
    return np.asarray(images), np.asarray(labels), (28, 28)


def _cifar(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    if path.is_dir():
        contents = [p.read_bytes() for p in sorted(path.glob("data_batch_*"))]
    else:
        with tarfile.open(path) as archive:
            members = sorted(
                (m for m in archive.getmembers() if "/data_batch_" in m.name and m.isfile()),
                key=lambda m: m.name,
            )
            contents = [
                member_file.read() for m in members if (member_file := archive.extractfile(m)) is not None
            ]
    batches = [_unpickled(content) for content in contents]
    images = np.concatenate([np.asarray(batch[b"data"]) for batch in batches])
    return images, np.concatenate([np.asarray(batch[b"labels"]) for batch in batches]), _CIFAR_SHAPE


def _first(folder: Path, start: str) -> Path:
    paths = sorted(folder.glob(f"{start}*"))
    if not paths:
        raise InputError("data_path", folder, f"holds no {start}-idx file")
    return paths[0]


def _idx(path: Path, magic: int) -> np.ndarray:
    content = _plain(path.read_bytes())
    kind, *_ = struct.unpack(">I", content[:4])
    if kind != magic:
        raise InputError("data_path", path, f"is not an IDX file of this kind (it starts with {kind:#x})")
    dimensions = kind & 0xFF
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _unpickled(content: bytes) -> Any:
    return _ArraysOnly(io.BytesIO(_plain(content)), encoding="bytes").load()


def _plain(content: bytes) -> bytes:
    if content[:2] != b"\x1f\x8b":
        return content
    with gzip.open(io.BytesIO(content)) as file:
        plain = file.read(_MAX_BYTES + 1)
    if len(plain) > _MAX_BYTES:
        raise ValueError("it unpacks to more than 2 GB")
    return plain


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
