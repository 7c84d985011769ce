"""A guard under which fp32 products are fp32 products, whatever the process has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

_MKLDNN: Any = torch.backends.mkldnn
_BACKENDS = (torch.backends.cuda.matmul, _MKLDNN.matmul)


_CPU_UNITS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
"""dtype → CPU features that multiply it, as `torch.cpu.get_capabilities` names them."""


def multiplies(dtype: torch.dtype, device_type: str) -> bool:
    """Whether a device multiplies a dtype in hardware. CPUs without units for it take forty times longer than for
    fp32 (bf16, measured)."""
    if device_type != "cpu" or dtype not in _CPU_UNITS:
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in _CPU_UNITS[dtype])


def iteration_dtype(device: torch.device) -> str:
    """Return what orthogonalizer_dtype "auto" means: bf16 where the hardware multiplies it."""
    return "bfloat16" if multiplies(torch.bfloat16, device.type) else "float32"


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off for a block; meta tensors have none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Switch TF32, bf16-internal fp32 products and autocast off for a block; restore them afterwards.

    A TF32 or bf16 product inside a factorization injects an error of size eps * kappa that does not commute
    with the Gram matrix: no later iteration removes it and no orthogonality test sees it.

    The flags are process-wide, so the block is not meant to overlap with matrix products of other threads.

    Args:
        device_type: `tensor.device.type` of the operands, whose autocast is disabled.
    """
    # The per-operator setting, not `set_float32_matmul_precision`: a process that uses one of torch's two
    # interfaces may be refused the other, and writing back what was read leaves both usable.
    before = [backend.fp32_precision for backend in _BACKENDS]
    with ExitStack() as stack:
        stack.enter_context(without_autocast(device_type))
        try:
            for backend in _BACKENDS:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(_BACKENDS, before):
                backend.fp32_precision = value
