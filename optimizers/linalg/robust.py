"""What every factorization here rests on: full precision, cuts and methods by dtype, routines that never raise.

What a LAPACK or cuSOLVER routine gives up on goes down a chain. For one matrix: the same routine alone (a batch fails
as a whole) → QR-SVD in fp64 on the device → the same on the CPU → LAPACK's `gesvd` (QR iteration, which converges where
divide and conquer does not) → zeros. `gesvd` needs scipy, which is imported there and may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]

# An fp64 Gram carries noise of about r * eps64 * σ1² on its eigenvalues: below 1e-6 σ1 (r up to 4096) a
# singular value read off it means nothing, so no cut made on a Gram is lower than this.
GRAM_RTOL = 1e-6

_MKLDNN: Any = torch.backends.mkldnn
_BACKENDS = (torch.backends.cuda.matmul, _MKLDNN.matmul)


_CPU_UNITS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
"""dtype → CPU features that multiply it, as `torch.cpu.get_capabilities` names them."""


def multiplies(dtype: torch.dtype, device_type: str) -> bool:
    """Return True if a device multiplies a dtype in hardware.

    CPUs without bf16 units take forty times longer than for fp32 (measured).
    """
    if device_type != "cpu" or dtype not in _CPU_UNITS:
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in _CPU_UNITS[dtype])


def iteration_dtype(device: torch.device) -> str:
    """Return what orthogonalizer_dtype "auto" means: bf16 where the hardware multiplies it."""
    return "bfloat16" if multiplies(torch.bfloat16, device.type) else "float32"


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast for a block; meta tensors have no autocast."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Disable TF32, bf16-internal fp32 products and autocast for a block, and restore them afterwards.

    A TF32 or bf16 product inside a factorization injects an error of size eps * kappa that does not commute
    with the Gram matrix: no later iteration removes it and no orthogonality test sees it.

    The flags are process-wide, so the block is not meant to overlap with matrix products of other threads.

    Args:
        device_type: `tensor.device.type` of the operands, whose autocast is disabled.
    """
    # Torch keeps the setting twice: per operator, and as one process-wide level, which `allow_tf32` shows too. Where
    # the two disagree, each read of the level raises, also inside cuBLAS calls. Setting the level sets both.
    before, level = [backend.fp32_precision for backend in _BACKENDS], _matmul_level()
    with ExitStack() as stack:
        stack.enter_context(without_autocast(device_type))
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            if level is not None:
                torch.set_float32_matmul_precision(level)
            # The level does not say what was set per operator.
            for backend, value in zip(_BACKENDS, before):
                backend.fp32_precision = value


def _matmul_level() -> str | None:
    """Return the process-wide level; None where the process set operators apart from it, which makes reads raise."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a matrix of `dtype` is factorized: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_rtol(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> float:
    """Return the cut max(m, n)·eps relative to σ1, with eps of the working dtype (fp32 for half precision)."""
    return max(shape[-2], shape[-1], 1) * torch.finfo(work_dtype(dtype)).eps


def choose_method(
    shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str | None = None
) -> str:
    """Return the exact method that "auto" selects, which depends on the arguments alone, not on data or timing.

    fp64 input: "qr_svd" (a Gram would lose half the digits). CPU: "gram", the fastest exact method measured
    there. CUDA: "dwh", the same cut and accuracy without a host read; "gram" for matrices of at most 8×8, whose
    default cut lies below what a Gram resolves. Devices without fp64: "svd".

    Args:
        shape: (…, m, n).
        dtype: of the matrix.
        device: where it lives; None: CPU.
    """
    kind = torch.device(device).type if device is not None else "cpu"
    if kind not in ("cpu", "cuda", "meta"):
        return "svd"
    if dtype == torch.float64:
        return "qr_svd"
    return "dwh" if kind == "cuda" and default_rtol(shape, dtype) >= GRAM_RTOL else "gram"


def flattened(stack: Tensor) -> Tensor:
    """Reshape (…, m, n) to (b, m, n), unlike `reshape(-1, m, n)` also for batches without elements."""
    return stack.reshape(math.prod(stack.shape[:-2]), *stack.shape[-2:])


def host_may_look(stack: Tensor) -> bool:
    """Return True if the host may read numbers of a tensor at no cost."""
    # On a CPU looking costs nothing; elsewhere it waits for the device, and in a traced graph it breaks the
    # graph.
    return stack.device.type == "cpu" and not torch.compiler.is_compiling()


def finite_matrices(stack: Tensor) -> Tensor:
    """Return which matrices of (b, m, n) are finite: (b,) bool."""
    # A sum is 50 times faster than an elementwise test on a CPU, and a finite sum has finite terms only.
    if host_may_look(stack):
        total = torch.isfinite(stack.sum((-2, -1)))
        if bool(total.all()):
            return total
    return torch.isfinite(stack).flatten(1).all(-1)


def cleaned(stack: Tensor, finite: Tensor) -> Tensor:
    """Return `stack` (b, m, n) with zeros for non-finite matrices; the tensor itself where the host may know."""
    if host_may_look(stack) and bool(finite.all()):
        return stack
    return torch.where(finite[:, None, None], stack, 0.0)


def attempt(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...] | None:
    """Return the result of `call`, or None if its factorization failed or returned a non-finite value.

    Out-of-memory errors are not failures of a factorization and are raised.
    """
    try:
        result = call()
    except torch.OutOfMemoryError:
        raise
    # LAPACK's own LinAlgError is a ValueError; without scipy the last link of the chain is missing.
    except (RuntimeError, ValueError, ImportError):
        return None
    # One number to read: on a GPU each read waits.
    total = torch.stack([part.sum(dtype=torch.float64) for part in result])
    return result if bool(torch.isfinite(total).all()) else None


def thin_svd_of_tall(tall: Tensor) -> Triple:
    """Compute the thin SVD through QR and the SVD of the triangle, in the given dtype.

    Args:
        tall: (…, L, r) with L ≥ r.

    Returns:
        U (…, L, r), singular values (…, r) descending, Vh (…, r, r).
    """
    q, triangle = torch.linalg.qr(tall)
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    return q @ left, values, right


def _gesvd(tall: Tensor) -> Triple:
    import scipy.linalg

    left, values, right = scipy.linalg.svd(
        tall.cpu().numpy(), full_matrices=False, lapack_driver="gesvd", check_finite=False
    )
    device = tall.device
    return (
        torch.from_numpy(left).to(device),
        torch.from_numpy(values).to(device),
        torch.from_numpy(right).to(device),
    )


def rescue_svd(tall: Tensor) -> Triple:
    """Compute the thin SVD of one finite matrix (L, r) in fp64 by the first method that works; zeros if none does."""
    matrix = tall.double()
    for call in (
        lambda: thin_svd_of_tall(matrix),
        lambda: tuple(part.to(matrix.device) for part in thin_svd_of_tall(matrix.cpu())),
        lambda: _gesvd(matrix),
    ):
        result = attempt(call)
        if result is not None:
            return result[0], result[1], result[2]
    short = matrix.shape[-1]
    return torch.zeros_like(matrix), matrix.new_zeros(short), matrix.new_zeros(short, short)


def robust_svd(tall: Tensor, method: Callable[[Tensor], Triple]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `method` on a batch of finite tall matrices; a matrix on which it fails is rescued, the others keep
    theirs.

    Args:
        tall: (b, L, r), finite.
        method: batched thin SVD.

    Returns:
        U (b, L, r), singular values (b, r), Vh (b, r, r) in the dtype of `tall`, and `rescued` (b,) bool.
    """
    rescued = torch.zeros(tall.shape[0], dtype=torch.bool, device=tall.device)
    whole = attempt(lambda: method(tall))
    if whole is not None:
        return whole[0], whole[1], whole[2], rescued
    parts: list[tuple[Tensor, ...]] = []
    for index, matrix in enumerate(tall):
        single = attempt(lambda matrix=matrix: method(matrix))
        if single is None:
            rescued[index] = True
            single = rescue_svd(matrix)
        parts.append(tuple(part.to(tall.dtype) for part in single))
    left, values, right = (torch.stack(group) for group in zip(*parts))
    return left, values, right, rescued


def robust_eigh(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues (ascending) and vectors of a batch of finite symmetric matrices; never raise.

    Args:
        gram: (b, r, r) positive semi-definite, finite, fp64.

    Returns:
        values (b, r), vectors (b, r, r) in columns, `rescued` (b,) bool: matrices on which the batched
        routine failed (their values come from an SVD, which for a positive semi-definite matrix is the same
        thing).
    """
    rescued = torch.zeros(gram.shape[0], dtype=torch.bool, device=gram.device)
    whole = attempt(lambda: tuple(torch.linalg.eigh(gram)))
    if whole is not None:
        return whole[0], whole[1], rescued
    values, vectors = torch.zeros_like(gram[..., 0]), torch.zeros_like(gram)
    for index, matrix in enumerate(gram):
        single = attempt(lambda matrix=matrix: tuple(torch.linalg.eigh(matrix)))
        if single is None:
            rescued[index] = True
            left, singular, _ = rescue_svd(matrix)
            single = singular.flip(-1), left.flip(-1)
        values[index], vectors[index] = single[0], single[1]
    return values, vectors, rescued
