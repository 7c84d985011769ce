"""Encoded examples on disk: one Arrow file a split, read through a memory map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass
class EncodedSplit:
    """Examples of a split, encoded, in memory.

    Attributes:
        ids: token ids of each example, 1-D int32.
        type_ids: likewise, int8; None: zeros.
        prompt_lengths: tokens of the prompt (answer); zeros for other tasks.
        labels: int64 classes, float64 numbers; zeros for other tasks.
        references: what a prediction is compared with; empty texts where it is the label.
        rows: numbers of the rows in the source.
    """

    ids: Sequence[NDArray[np.int32]]
    type_ids: Sequence[NDArray[np.int8]] | None
    prompt_lengths: Sequence[int]
    labels: NDArray[Any]
    references: Sequence[str]
    rows: Sequence[int]

    @cached_property
    def offsets(self) -> Ids:
        """Return where each example starts in all token ids, and the end: (examples + 1,) int64."""
        return np.cumsum([0, *map(len, self.ids)], dtype=np.int64)

    @cached_property
    def all_ids(self) -> NDArray[np.int32]:
        """Return the token ids of all examples, joined."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *self.ids])

    @cached_property
    def all_type_ids(self) -> NDArray[np.int8]:
        """Return the token types of all examples, joined."""
        if self.type_ids is None:
            return np.zeros(len(self.all_ids), dtype=np.int8)
        return np.concatenate([np.zeros(0, dtype=np.int8), *self.type_ids])

    def sha256(self) -> str:
        """Return the SHA-256 of the contents, whatever the file format and its version."""
        digest = hashlib.sha256()
        references = [text.encode("utf-8", "surrogatepass") for text in self.references]
        for array in (
            self.offsets,
            self.all_ids,
            self.all_type_ids,
            np.asarray(self.prompt_lengths, dtype=np.int64),
            self.labels,
            np.array([len(text) for text in references], dtype=np.int64),
            np.asarray(self.rows, dtype=np.int64),
        ):
            ordered = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            digest.update(f"{ordered.dtype.kind}{ordered.itemsize}|{len(ordered)}|".encode())
            digest.update(ordered.data)
        digest.update(b"".join(references))
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Write the Arrow file, flushed to the disk."""
        import pyarrow as pa

        offsets = pa.array(self.offsets)
        columns = {
            "ids": pa.LargeListArray.from_arrays(offsets, pa.array(self.all_ids)),
            "type_ids": pa.LargeListArray.from_arrays(offsets, pa.array(self.all_type_ids)),
            "prompt_length": pa.array(np.asarray(self.prompt_lengths, dtype=np.int64)),
            "label": pa.array(self.labels),
            "reference": pa.array(list(self.references), pa.large_string()),
            "row": pa.array(np.asarray(self.rows, dtype=np.int64)),
        }
        # One batch: each column is then one stretch of the memory map.
        batch = pa.record_batch(columns)
        with path.open("wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())


class ExampleSplit:
    """Encoded examples of a split, memory-mapped.

    Attributes:
        lengths: tokens of each example, (examples,) int64.
        prompt_lengths: tokens of each prompt (answer), (examples,) int64.
        labels: (examples,) int64 classes or float64 numbers (classify).
        rows: numbers of the rows in the source, from 0, (examples,) int64.
    """

    def __init__(self, path: Path, classes: Sequence[str] | None, is_labelled: bool) -> None:
        import pyarrow as pa

        self._path, self._classes, self._is_labelled = path, classes, is_labelled
        self._file = path.open("rb")
        self._bytes = os.fstat(self._file.fileno()).st_size
        batch: Any = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        ids, types = batch.column("ids"), batch.column("type_ids")
        self._offsets: Ids = ids.offsets.to_numpy()
        self._ids, self._type_ids = ids.values.to_numpy(), types.values.to_numpy()
        self._references = batch.column("reference")
        self.lengths: Ids = np.diff(self._offsets)
        self.prompt_lengths: Ids = batch.column("prompt_length").to_numpy()
        self.labels: NDArray[Any] = batch.column("label").to_numpy()
        self.rows: Ids = batch.column("row").to_numpy()

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> Ids:
        """Return the token ids of an example: 1-D int64. Text or pair with the tokenizer's special tokens
        (classify), or prompt, answer and eos (answer).

        Raises:
            OSError: the file was cut short meanwhile; reading its lost pages would kill the process.
        """
        return self._tokens(self._ids, index)

    def type_ids(self, index: int) -> Ids:
        """Return the token types of an example: 1-D int64, as long as `ids`; 1 for the second text of a pair."""
        return self._tokens(self._type_ids, index)

    def prompt_length(self, index: int) -> int:
        """Return the number of ids, from the first, that are the prompt (answer)."""
        return int(self.prompt_lengths[index])

    def label(self, index: int) -> int | float:
        """Return the class or the number of an example (classify)."""
        return self.labels[index].item()

    def reference(self, index: int) -> str:
        """Return what a prediction is compared with: name of the class, the number, or the text of the answer."""
        if not self._is_labelled:
            return self._references[index].as_py()
        label = self.label(index)
        return repr(label) if self._classes is None else self._classes[int(label)]

    def row(self, index: int) -> int:
        """Return the number of an example's row in the source, from 0."""
        return int(self.rows[index])

    def _tokens(self, values: NDArray[Any], index: int) -> Ids:
        size = os.fstat(self._file.fileno()).st_size
        if size < self._bytes:
            raise OSError(f"{self._path.name} had {self._bytes} bytes when the run began and has {size} now")
        start, stop = self._offsets[index : index + 2].tolist()
        return values[start:stop].astype(np.int64)
