"""One process' file of a checkpoint, and reading any interval of any tensor out of all of them.

safetensors: nothing in it is ever executed, and a mapped file is read only where it is asked for. The header's
metadata says which part of its whole tensor each one is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.checkpoint import store
from harness.checkpoint.store import DamagedCheckpoint
from harness.files import atomic
from harness.files.bounded import JsonDecoder
from optimizers.named_state import FLAT, StatePiece

_OWN = "rank/"
"""Prefix of the tensors that belong to a process and not to a name: its random states."""


def write(
    folder: Path, rank: int, parts: Sequence[StatePiece], own: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write this process' file and flush it to the disk; then, next to it, its size and hash.

    Args:
        folder: exists.
        rank: of this process.
        parts: on the CPU, contiguous, in memory of their own; nobody changes them meanwhile.
        own: tensors of this process alone.
        facts: JSON that belongs to them.
    """
    tensors, index = {}, {}
    for i, part in enumerate(parts):
        # Numbers as keys: names and kinds may hold any character, and one name has several parts.
        key = f"{i:06d}"
        tensors[key] = part.tensor
        index[key] = {
            "name": part.name,
            "kind": part.kind,
            "shape": part.shape,
            "dim": part.dim,
            "start": part.start,
        }
    # Random states go with the process, so they are found by rank and not by name.
    tensors |= {_OWN + name: tensor for name, tensor in own.items()}
    path = folder / store.rank_name(rank)
    save_file(tensors, path, metadata={"index": json.dumps(index), "facts": json.dumps(facts)})
    path.chmod(atomic.default_mode(folder))  # safetensors gives 0600, which hides it from a group
    atomic.sync_file(path)
    atomic.write_json(folder / store.digest_name(rank), store.digest(path), sync_name=False)


Size = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    """What a header says about one tensor."""

    model_config = ConfigDict(strict=True)

    name: str
    kind: str
    shape: list[Size]
    dim: int | None = Field(ge=FLAT)
    start: Size


_INDEX = TypeAdapter(dict[str, _Entry])


class _Place(NamedTuple):
    file: int
    key: str
    size: tuple[int, ...]
    part: StatePiece
    """Its tensor is a placeholder: the numbers are in the file."""


class Saved:
    """A checkpoint that is read from. All of its files stay mapped until `close`.

    Args:
        folder: of a checkpoint that `store.verify` accepted.

    Raises:
        DamagedCheckpoint: a header cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = store.read_manifest(folder)
        self.facts: list[dict[str, Any]] = []
        """Counters of each process, by rank."""
        self._files: list[Any] = []
        self._places: dict[tuple[str, str], list[_Place]] = {}
        try:
            for rank in range(self.manifest["world_size"]):
                self._open(rank)
        except BaseException:
            self.close()
            raise

    def _open(self, rank: int) -> None:
        """Map the file of a process and take over what its header says."""
        name = store.rank_name(rank)
        try:
            # Mapped, not read: a process needs a fraction of each file.
            file = safe_open(self.folder / name, "pt").__enter__()
            self._files.append(file)
            metadata = file.metadata() or {}
            decoder = JsonDecoder()
            facts, index = (
                decoder.decode(metadata["facts"]),
                _INDEX.validate_python(decoder.decode(metadata["index"])),
            )
            if not isinstance(facts, dict):
                raise ValueError("its header is wrong (facts: no object)")
            # Files of two saves in one folder would pass each by itself.
            step = facts.get("step", self.manifest["step"])
            if step != self.manifest["step"]:
                raise ValueError(f"it was written after step {step}")
            sizes = {key: tuple(file.get_slice(key).get_shape()) for key in index}
        except KeyError as error:
            raise DamagedCheckpoint(f"{self.folder.name}: {name} has no {error} in its header") from error
        except (OSError, SafetensorError, ValueError) as error:
            raise DamagedCheckpoint(f"{self.folder.name}: {name}: {_one_line(error)}") from error
        self.facts.append(facts)
        for key, entry in index.items():
            part = StatePiece(
                entry.name, entry.kind, tuple(entry.shape), entry.dim, entry.start, torch.empty(0), True
            )
            self._places.setdefault((part.name, part.kind), []).append(_Place(rank, key, sizes[key], part))

    def __contains__(self, name_and_kind: object) -> bool:
        return name_and_kind in self._places

    def names(self, kind: str) -> list[str]:
        """Return the names that have a tensor of this kind."""
        return [name for name, known in self._places if known == kind]

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self._places[name, kind][0].part.shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Return the dtype of a whole tensor."""
        place = self._places[name, kind][0]
        return self._files[place.file].get_tensor(place.key).dtype

    def own(self, rank: int) -> dict[str, Tensor]:
        """Return the tensors that belong to one process and to no name, such as random states."""
        file = self._files[rank]
        keys = [key for key in list(file.keys()) if key.startswith(_OWN)]
        return {key.removeprefix(_OWN): file.get_tensor(key) for key in keys}

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a whole tensor, assembled from the files of all processes."""
        return self.read(StatePiece(name, kind, self.shape(name, kind), None, 0, torch.empty(0), True))

    def read(self, part: StatePiece) -> Tensor:
        """Return the saved numbers of a part, in its shape, whichever processes wrote them.

        Raises:
            DamagedCheckpoint: they are not there, or their tensor has another shape.
        """
        places = self._places.get((part.name, part.kind))
        what = f"{self.folder.name}: {part.kind} of {part.name}"
        if places is None:
            raise DamagedCheckpoint(f"{what} is missing")
        if self.shape(part.name, part.kind) != part.shape:
            raise DamagedCheckpoint(
                f"{what} has shape {self.shape(part.name, part.kind)}, expected {part.shape}"
            )
        interval = _elements(part, tuple(part.tensor.shape) if part.dim is not None else part.shape)
        if interval is None or any(_elements(place.part, place.size) is None for place in places):
            return part.of(self._assembled(places, what))
        numbers = self._interval(places, interval, what)
        return numbers.view(part.tensor.shape if part.dim is not None else part.shape)

    def close(self) -> None:
        """Unmap the files of the checkpoint."""
        for file in self._files:
            file.__exit__(None, None, None)
        self._files = []

    def _interval(self, places: list[_Place], interval: tuple[int, int], what: str) -> Tensor:
        lo, hi = interval
        overlaps = []
        for place in places:
            elements = _elements(place.part, place.size)
            assert elements is not None
            # The overlap of this file's interval with what is asked for.
            first, last = max(lo, elements[0]), min(hi, elements[1])
            if first < last:
                flat = self._files[place.file].get_tensor(place.key).reshape(-1)
                overlaps.append((first, last, flat[first - elements[0] : last - elements[0]]))
        # The same cut as when it was saved: a view of the mapped file, without a copy.
        if len(overlaps) == 1 and overlaps[0][:2] == (lo, hi):
            return overlaps[0][2]
        if sum(last - first for first, last, _ in overlaps) != hi - lo:
            raise DamagedCheckpoint(f"{what} is incomplete")
        if not overlaps:
            # An empty shard: the dtype alone matters.
            return torch.empty(0, dtype=self._files[places[0].file].get_tensor(places[0].key).dtype)
        result = torch.empty(hi - lo, dtype=overlaps[0][2].dtype)
        for first, last, numbers in overlaps:
            result[first - lo : last - lo] = numbers
        return result

    def _assembled(self, places: list[_Place], what: str) -> Tensor:
        tensors = [self._files[place.file].get_tensor(place.key) for place in places]
        # Columns of a matrix are no interval of its elements: assemble it, then cut.
        whole = torch.empty(places[0].part.shape, dtype=tensors[0].dtype)
        for place, tensor in zip(places, tensors):
            place.part._replace(tensor=tensor).of(whole).copy_(tensor)
        if sum(tensor.numel() for tensor in tensors) != whole.numel():
            raise DamagedCheckpoint(f"{what} is incomplete")
        return whole


def _elements(part: StatePiece, size: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the interval of a part in its whole tensor's elements; None where it is none (columns)."""
    if part.dim is None:
        return 0, _count(part.shape)
    if part.dim == FLAT:
        return part.start, part.start + _count(size)
    if part.dim == 0:
        row = _count(part.shape[1:])
        return part.start * row, (part.start + size[0]) * row
    return None


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        return f"its header is wrong ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    return " ".join(str(error).split())


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
