"""Local image files: every format, and files that are not what they say."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.reconstruction import samples
from analysis.reconstruction.image_files import read
from harness.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8)
LABELS = (np.arange(40) % 10).astype(np.uint8)


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, packed: bool) -> None:
    for name, array in (("train-images-idx3-ubyte", IMAGES), ("train-labels-idx1-ubyte", LABELS)):
        content = gzip.compress(_idx(array)) if packed else _idx(array)
        (tmp_path / f"{name}{'.gz' if packed else ''}").write_bytes(content)
    images, labels, shape = read("mnist", tmp_path)
    np.testing.assert_allclose(images, IMAGES.reshape(40, -1) / 255)
    assert labels.tolist() == LABELS.tolist()
    assert shape == (28, 28)


def test_pickled_mnist_alone_and_in_a_wheel(tmp_path: Path) -> None:
    pairs = [(IMAGES.reshape(40, -1).astype(np.float32) / 255, LABELS.astype(np.int64))] * 3
    content = gzip.compress(pickle.dumps(tuple(pairs), protocol=2))
    (tmp_path / "mnist.pkl.gz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", content)
    for name in ("mnist.pkl.gz", "some.whl"):
        images, labels, _ = read("mnist", tmp_path / name)
        np.testing.assert_allclose(images, IMAGES.reshape(40, -1) / 255, atol=1e-7)
        assert labels.tolist() == LABELS.tolist()


def _batch() -> bytes:
    data = RNG.integers(0, 256, (20, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": data, b"labels": [i % 10 for i in range(20)]}, protocol=2)


def test_cifar(tmp_path: Path) -> None:
    for i in (1, 2):
        (tmp_path / f"data_batch_{i}").write_bytes(_batch())
    images, _, shape = read("cifar10", tmp_path)
    assert images.shape == (40, 3072)
    assert 0 <= images.min() < images.max() <= 1
    assert shape == (3, 32, 32)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        for i in (1, 2):
            content = (tmp_path / f"data_batch_{i}").read_bytes()
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed, _, _ = read("cifar10", tmp_path / "cifar.tar.gz")
    np.testing.assert_array_equal(packed, images)
    chosen = samples.load("cifar10", str(tmp_path), "vehicles_animals", 5, 0)
    assert set(chosen.names.values()) == {"vehicles", "animals"}


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle ran code",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(_Runs())))
    with pytest.raises(InputError, match="only numpy arrays are read"):
        read("mnist", path)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
@pytest.mark.parametrize("content", [b"", b"hello", gzip.compress(b"hello", mtime=0), pickle.dumps([1, 2])])
def test_what_is_no_data_set_is_one_clear_line(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match="data_path: ") as caught:
        read(kind, path)
    assert "\n" not in str(caught.value)


def test_missing_and_unfit_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read("mnist", tmp_path / "none")
    with pytest.raises(InputError, match="names no file of mnist"):
        samples.load("mnist", None, "odd_even", 5, 0)
    np.savez(tmp_path / "a.npz", images=np.full((4, 2, 2), np.nan), labels=np.arange(4))
    with pytest.raises(InputError, match="not finite"):
        read("mnist", tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 2, 2)), labels=np.arange(3))
    with pytest.raises(InputError, match="4 images and 3 labels"):
        read("mnist", tmp_path / "b.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no train-images"):
        read("mnist", tmp_path / "empty")


def test_choosing_samples() -> None:
    chosen = samples.load("digits", None, "odd_even", 20, 0)
    np.testing.assert_allclose(chosen.images.mean(0), 0, atol=1e-15)
    assert (chosen.labels[:20] == 1).all()
    assert (chosen.labels[20:] == -1).all()
    # Nothing is in both sets: no row of the pool is a training image.
    both = np.vstack([chosen.images, chosen.heldout])
    assert len(np.unique(both.round(9), axis=0)) == len(both)
    moved = samples.load("digits", None, "odd_even", 20, 0, offset=0.5)
    np.testing.assert_allclose(moved.images, chosen.images + 0.5)
    with pytest.raises(InputError, match=r"per_class: 900 .* allowed: 1 to 890"):
        samples.load("digits", None, "odd_even", 900, 0)
    for classes in ("vehicles", [3], [3, 3], [3, 11]):
        with pytest.raises(InputError, match="classes: "):
            samples.load("digits", None, classes, 5, 0)
