"""Count what operators allocate, move and compute, on meta or fake tensors."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class OpCounter(TorchDispatchMode):
    """Watch the operators that run inside of the ``with`` block.

    Memory is counted by storages: one counts from the operator that makes it until its last tensor is gone, as torch's
    allocators do. Storages of tensors that existed before do not count. Workspaces of kernels are not seen.

    Attributes:
        live: bytes of the storages that are alive now.
        peak: largest `live` so far.
        moved: bytes that the operators read and wrote, each operand once.
        flops: dtype → FLOPs of products and decompositions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.moved = 0, 0, 0
        self.flops: dict[torch.dtype, float] = defaultdict(float)
        self._alive: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        known = {t.untyped_storage()._cdata for t in inputs}
        result = func(*args, **kwargs)
        outputs = list(_tensors(result))
        is_view = bool(outputs) and all(t.untyped_storage()._cdata in known for t in outputs)
        for tensor in outputs:
            self._watch(tensor.untyped_storage(), known)
        self.peak = max(self.peak, self.live)
        # A view moves nothing; an operator in place, which also returns its input, does.
        if not is_view or func._schema.is_mutable:
            self.moved += sum(_bytes(t) for t in (*inputs, *outputs))
        packet = getattr(func, "_overloadpacket", None)
        if str(packet) == "optbench.odd_polynomials":
            self._newton_schulz(*args[:3])
        if str(packet) == "optbench.svd_basis":
            self._svd_basis(*args[:3])
        # torch counts products into new tensors only.
        counted = _IN_PLACE.get(str(packet), packet)
        if counted in flop_registry:
            self.flops[outputs[0].dtype] += flop_registry[counted](*args, **kwargs, out_val=result)
        elif str(packet) in _DECOMPOSITIONS and inputs:
            self.flops[inputs[0].dtype] += _DECOMPOSITIONS[str(packet)] * _cubes(inputs[0])
        return result

    def _newton_schulz(self, matrix: torch.Tensor, coefficients: list[float], dtype: torch.dtype) -> None:
        """Count the products inside of our operator, which torch sees as one."""
        short, long = sorted(matrix.shape[-2:])
        batch = matrix.numel() // max(1, short * long)
        iterations = len(coefficients) // 3
        self.flops[dtype] += batch * iterations * (4.0 * short * short * long + 2.0 * short**3)
        operands = 2 * (short * long + short * short) * batch * dtype.itemsize
        self.peak = max(self.peak, self.live + operands)
        self.moved += 2 * iterations * operands

    def _svd_basis(self, matrix: torch.Tensor, rank: int, left: bool) -> None:
        """Count the Gram, the eigenvectors and the product to the long side inside of our operator, all fp64."""
        m, n = matrix.shape[-2:]
        short, long = sorted((m, n))
        batch = matrix.numel() // max(1, m * n)
        product = 2.0 * m * n * rank if left == (m >= n) else 0.0
        work = 2.0 * short * short * long + _DECOMPOSITIONS["aten._linalg_eigh"] * short**3 + product
        self.flops[torch.float64] += batch * work

    def _watch(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or (key in self._alive and self._alive[key].alive):
            return
        size = storage.nbytes()
        self.live += size
        self._alive[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._alive.pop(key, None)


_IN_PLACE = {"aten.baddbmm_": torch.ops.aten.baddbmm, "aten.addmm_": torch.ops.aten.addmm}
_DECOMPOSITIONS = {
    "aten._linalg_eigh": 9.0,
    "aten.linalg_cholesky_ex": 1 / 3,
    "aten.linalg_qr": 4 / 3,
    "aten._linalg_svd": 22.0,
    "aten.linalg_solve_triangular": 1.0,
    "aten.cholesky_solve": 2.0,
    "aten.linalg_inv_ex": 2.0,
}
"""Operator → FLOPs over n³ of its first, square operand (Golub and Van Loan 2013, table of costs; leading terms)."""


def _cubes(tensor: torch.Tensor) -> float:
    rows, columns = tensor.shape[-2:]
    batch = tensor.numel() / max(1, rows * columns)
    return batch * max(rows, columns) * min(rows, columns) ** 2


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
