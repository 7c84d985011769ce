"""Count on a CPU what would stop the host on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Count the operators whose result, or its size, the host must wait for on a GPU."""

    names = (
        "_local_scalar_dense",
        "nonzero",
        "_linalg_eigh",
        "_linalg_svd",
        "linalg_eig",
        "is_nonzero",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))
