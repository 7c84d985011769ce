"""Checks of other ways to run the same step: foreach, fused, `torch.compile`, and what makes a GPU's host wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.verify.audit.document import Check
from harness.verify.audit.subject import (
    Subject,
    SubjectRun,
    describe,
    difference,
    gradients_of,
    seed,
    set_option,
)

HALF = 1e-2
"""Relative difference up to which iterations in bf16 (8 bits) explain that batched products differ."""
COMPILED = 1e-3
"""Bound on the relative difference of compiled updates: decompositions round otherwise, and iterations amplify it."""


def foreach(subject: Subject) -> Check:
    """Compare ``foreach=True`` with ``foreach=False`` where the groups have the option."""
    return _option_parity("foreach", subject)


def fused(subject: Subject) -> Check:
    """Compare ``fused=True`` with ``fused=False`` where the groups have the option."""
    return _option_parity("fused", subject)


def _option_parity(key: str, subject: Subject) -> Check:
    runs: list[SubjectRun] = []
    for value in (False, True):
        run = subject.start()
        if not set_option(run, key, value):
            return Check(key, None, f"the groups have no {key}")
        # torch refuses both at once; the default None of the other one chooses by device.
        set_option(run, "fused" if key == "foreach" else "foreach", False)
        try:
            for _ in range(subject.steps):
                run.step()
        except (RuntimeError, NotImplementedError) as error:
            return Check(key, None, f"{key}={value} is refused: {describe(error)}")
        runs.append(run)
    error, name = difference(runs[1], runs[0])
    if error > max(HALF, subject.rounding):
        return Check(key, False, f"ΔW of {name} differs by {error:.1e} between {key}=True and {key}=False")
    if error > subject.rounding:
        words = f"{key}=True and {key}=False differ by {error:.1e}, as half-precision iterations do"
        return Check(key, None, words)
    return Check(key, True, f"{key}=True and {key}=False agree (difference {error:.1e})")


def compiled(subject: Subject) -> Check:
    """Trace the step with `torch.compile` and run the trace (backend "aot_eager"): the weights must be the same.

    No kernels are generated: that takes minutes, and is not the optimizer's doing.
    """
    reference = subject.after(subject.steps)
    run = subject.start()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(lambda: run.optimizer.step(), backend="aot_eager")
    if run.uses_closure:
        return Check("torch.compile", None, "the step needs a closure")
    try:
        for _ in range(subject.steps):
            run.give(gradients_of(run.t, run.named))
            seed(run.t)
            run.t += 1
            step()
    except Exception as error:
        return Check("torch.compile", False, f"{describe(error)}; fix: torch.compiler.disable on the step")
    finally:
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        torch._dynamo.reset()
    error, name = difference(run, reference)
    if error > COMPILED:
        return Check("torch.compile", False, f"ΔW of {name} differs by {error:.1e} from the eager step")
    return Check(
        "torch.compile", True, f"equal to the eager step (difference {error:.1e}), {breaks} graph breaks"
    )


class DeviceReads(TorchDispatchMode):
    """Count the operators for which the host must wait for a device; the tensors are fake and need none.

    A value that the host reads becomes 1: fake tensors have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket.__name__)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on_device = first is not None and first.device.type != "cpu"
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            assert first is not None
            if on_device:
                self.count[_PYTHON_NAMES.get(name, name)] += 1
            return _value(first, name)
        if on_device and (name in _WAITING or self._copies_to_host(name, kwargs)):
            self.count[_PYTHON_NAMES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _copies_to_host(name: str, kwargs: Any) -> bool:
        device = (kwargs or {}).get("device")
        return name == "_to_copy" and device is not None and torch.device(device).type == "cpu"


class _WithoutDevice(TorchFunctionMode):
    """Replace Python bindings that ask for the device's runtime by the operators that they call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _BINDINGS.get(func)
        return func(*args, **(kwargs or {})) if replacement is None else replacement(args[0])


_BINDINGS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.__invert__: torch.bitwise_not,
    Tensor.__bool__: lambda tensor: bool(tensor.item()),
    Tensor.__float__: lambda tensor: float(tensor.item()),
    Tensor.__int__: lambda tensor: int(tensor.item()),
    Tensor.cpu: lambda tensor: torch.ops.aten._to_copy(tensor, device="cpu"),
}


_WAITING = frozenset(
    {"nonzero", "masked_select", "unique_consecutive", "_unique2", "_linalg_eigh", "_linalg_svd"}
)
_PYTHON_NAMES = {
    "_local_scalar_dense": "item() or truth value",
    "_to_copy": "copy to the host",
    "_linalg_eigh": "eigh",
    "_linalg_svd": "svd",
}


def _value(tensor: Tensor, name: str) -> bool | int | float | complex:
    if tensor.dtype is torch.bool or name != "_local_scalar_dense":
        return True
    return 1.0 if tensor.is_floating_point() else 1


def host_syncs(subject: Subject) -> Check:
    """Count what makes the host wait for a GPU in the third step: on fake CUDA tensors, so that none is needed.

    Scalars that an optimizer keeps on the CPU, as torch's step counters, are read without waiting.
    """
    name = "host syncs"
    reads, steps = DeviceReads(), subject.steps
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            named = [
                (key, nn.Parameter(torch.empty(shape, device="cuda")))
                for key, shape in subject.shapes.items()
            ]
            run = subject.over(named)
            for _ in range(steps):
                for _, p in named:
                    p.grad = torch.empty_like(p)
                reads.count.clear()
                with reads, _WithoutDevice():
                    run.take()
    except Exception as error:
        return Check(name, None, f"cannot be counted without a GPU: {describe(error)}")
    total = sum(reads.count.values())
    if total == 0:
        return Check(name, True, "none: the host never waits for the device")
    words = ", ".join(f"{count} × {key}" for key, count in reads.count.most_common() if count)
    return Check(
        name,
        None,
        f"{total} per step over {len(named)} parameters ({words}): keep decisions on the device (torch.where)",
    )
