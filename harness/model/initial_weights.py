"""Initial weights one tensor at a time: the bits of a model built whole on the CPU, without a whole model anywhere.

A model of `transformers` is constructed on the meta device while `_Recorder` notes, in their order, every random number
that the constructors draw and every call of the family's own ``_init_weights``. `InitialWeights.deliver` repeats these
calls on CPU tensors: what no later call touches is handed over and dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel, initialization

from harness.devices import uses_cuda
from harness.protocols import Put

_SILENT_ON_META = ("trunc_normal_", "orthogonal_", "sparse_", "dirac_")
"""Initializers that return at once for a tensor on the meta device (torch 2.13, torch/nn/init.py)."""


class NotRecorded(Exception):
    """A model whose initialization cannot be repeated tensor by tensor; the message says why."""


class _Slot(NamedTuple):
    """A parameter or buffer that a call of ``_init_weights`` reads or writes."""

    module: nn.Module
    table: str
    """``_parameters`` or ``_buffers`` of the module."""
    key: str
    tensor: Tensor
    """On the meta device."""

    @property
    def storage(self) -> int:
        return self.tensor.untyped_storage()._cdata


@dataclass
class _Draw:
    """A random operator of a constructor, whose numbers are overwritten later."""

    operator: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def repeat(self) -> None:
        """Advance the generator as the constructor did."""
        args, kwargs = tree_map(_on_cpu, (self.args, self.kwargs))
        self.operator(*args, **kwargs)


@dataclass
class _Init:
    """A call of ``owner._init_weights(module)``."""

    owner: PreTrainedModel
    module: nn.Module
    slots: list[_Slot]


class _Recorder(TorchDispatchMode):
    """Notes the draws of constructors and the calls of ``_init_weights``, while a model is built on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[_Draw | _Init] = []
        self._touched: dict[int, Tensor] | None = None
        """Storages that the running call uses, by identity; None outside of one."""
        self._temporary: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = _meta_tensors((args, kwargs))
        if self._touched is not None:
            given = {tensor.untyped_storage()._cdata: tensor for tensor in inputs}
            self._touched |= given
            # Kept, so that no other storage gets their identity during the call.
            for tensor in _meta_tensors(result):
                if tensor.untyped_storage()._cdata not in given:
                    self._temporary[tensor.untyped_storage()._cdata] = tensor
        elif torch.Tag.nondeterministic_seeded in func.tags:
            if not inputs and not _meta_tensors(result):
                # They would come from the state in which the generator happens to be.
                raise NotRecorded("a constructor draws numbers on a device of its own choice")
            self.script.append(_Draw(func, args, kwargs))
        return result

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """Let transformers initialize on the meta device as it does on the CPU, and record its calls."""

        def init_weights(model: PreTrainedModel) -> None:
            model.initialize_weights()
            model.tie_weights(recompute_mapping=False)

        def initialize(owner: PreTrainedModel, module: Any, is_custom_code: bool = False) -> None:
            if not getattr(module, "_is_hf_initialized", False):
                self._record(owner, module)
                module._is_hf_initialized = True

        by_name = {name: self._watched(getattr(nn.init, name)) for name in _SILENT_ON_META}
        # Their own methods, read in transformers 5.24: `init_weights` does nothing on the meta device.
        with (
            patch.object(PreTrainedModel, "init_weights", init_weights),
            patch.object(PreTrainedModel, "_initialize_weights", initialize),
            patch.dict(vars(nn.init), by_name),
            patch.dict(initialization.TORCH_INIT_FUNCTIONS, by_name),
        ):
            yield

    def _watched(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return an initializer that notes its tensor, for those that run no operator on the meta device."""

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if tensor.is_meta:
                if self._touched is None:
                    raise NotRecorded(
                        f"a constructor calls {function.__name__}, whose draws depend on its numbers"
                    )
                self._touched[tensor.untyped_storage()._cdata] = tensor
            return function(tensor, *args, **kwargs)

        return call

    def _record(self, owner: PreTrainedModel, module: nn.Module) -> None:
        known = {slot.storage: slot for slot in _slots(module)}
        self._touched, self._temporary = {}, {}
        try:
            owner._init_weights(module)
            others = self._touched.keys() - known.keys() - self._temporary.keys()
            if others:
                raise NotRecorded(f"{type(module).__name__} is initialized from tensors outside of it")
            slots = [known[storage] for storage in known if storage in self._touched]
        finally:
            self._touched, self._temporary = None, {}
        if slots:
            self.script.append(_Init(owner, module, slots))


class InitialWeights:
    """The values that a model on the meta device starts with.

    Args:
        model: constructed on the meta device, not changed afterwards.
        script: how its constructors and ``_init_weights`` filled it.
        seed: of torch's CPU generator.
        files: safetensors files; their tensors with names of ``model`` take the place of random numbers.
        build_whole: returns the same model, built whole on the CPU.

    Raises:
        NotRecorded: nothing in ``script`` fills a parameter or buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        script: Sequence[_Draw | _Init],
        seed: int,
        files: Sequence[Path],
        build_whole: Callable[[], nn.Module],
    ) -> None:
        self._seed, self._files, self._build_whole = seed, files, build_whole
        self._constants: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        for name, tensor in _named_tensors(model):
            if tensor.is_meta:
                self._names[tensor.untyped_storage()._cdata] = name
            else:
                # A buffer that its constructor computes on the CPU, whatever the device.
                self._constants[name] = tensor
        own = {*self._names.values(), *self._constants}
        stored = {name for file in files for name in _keys(file)} & own
        if stored:
            # Random numbers only matter to what no file holds: buffers.
            script = [
                call
                for call in script
                if isinstance(call, _Init)
                and any(self._names.get(s.storage, "") not in stored for s in call.slots)
            ]
        self._script, self._stored = script, stored
        self._last = {
            slot.storage: index
            for index, call in enumerate(script)
            if isinstance(call, _Init)
            for slot in call.slots
        }
        unfilled = [
            name for storage, name in self._names.items() if storage not in self._last and name not in stored
        ]
        if unfilled:
            raise NotRecorded(f"{unfilled[0]} gets its numbers in a constructor")

    def deliver(self, put: Put) -> None:
        """Hand over every parameter and buffer, tied ones under their first name.

        torch's generators are left as they were.
        """
        for name, tensor in self._constants.items():
            put(name, tensor)
        # Not by `torch.manual_seed`, which would also seed the GPUs.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(self._seed)
        try:
            complete = self._repeat(put)
        finally:
            generator.set_state(before)
        if not complete:
            with torch.random.fork_rng([torch.cuda.current_device()] if uses_cuda() else []):
                whole = self._build_whole()
            for name, tensor in _named_tensors(whole):
                put(name, tensor)
        for file in self._files:
            # Mapped: a process reads the pages of its own shards.
            with safe_open(file, "pt") as tensors:
                for name in _keys(file):
                    # The head of another task has no place here.
                    if name in self._stored:
                        put(name, tensors.get_tensor(name))

    @torch.no_grad()
    def _repeat(self, put: Put) -> bool:
        """Run the script; returns False if it left numbers of a tensor unset."""
        live: dict[int, Tensor] = {}
        for index, call in enumerate(self._script):
            if isinstance(call, _Draw):
                call.repeat()
                continue
            for slot in call.slots:
                if slot.storage not in live:
                    live[slot.storage] = _unset(slot.tensor)
            _initialize(call, live)
            for storage in {slot.storage for slot in call.slots if self._last[slot.storage] == index}:
                # Weights that were tied afterwards have no name: theirs are dropped.
                value, name = live.pop(storage), self._names.get(storage)
                if name is None or name in self._stored:
                    continue
                if value.is_floating_point() and bool(value.isnan().any()):
                    return False
                put(name, value)
        return True


def record(
    construct: Callable[[], nn.Module],
    *,
    seed: int,
    files: Sequence[Path] = (),
    build_whole: Callable[[], nn.Module],
) -> tuple[nn.Module, InitialWeights]:
    """Return a model on the meta device and the values to fill it with.

    Args:
        construct: constructs the model from its configuration.
        seed: of torch's CPU generator when the model is built whole.
        files: safetensors files of all of its parameters, by its own names.
        build_whole: returns the same model, built whole on the CPU.

    Raises:
        NotRecorded: the values cannot be made one tensor at a time.
    """
    recorder = _Recorder()
    with torch.device("meta"), recorder, recorder.initializing():
        model = construct()
    for module in model.modules():
        if any(isinstance(value, Tensor) and value.is_meta for value in vars(module).values()):
            raise NotRecorded(f"{type(module).__name__} holds a tensor that is neither parameter nor buffer")
    weights = InitialWeights(model, recorder.script, seed, files, build_whole)
    # The original's modules are repeated on: engines replace parameters and classes of theirs.
    return copy.deepcopy(model), weights


def compare_files(model: nn.Module, files: Sequence[Path]) -> tuple[list[str], list[str]] | None:
    """Return the names that files lack of a model's parameters and persistent buffers, and those that it does not use.

    Tied weights may be missing under their second name. None: a tensor has another shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in _keys(file)}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    first_names = {name for name, _ in _named_tensors(model)} & own.keys()
    if any(own[name] != shapes[name] for name in first_names & shapes.keys()):
        return None
    return sorted(first_names - shapes.keys()), sorted(shapes.keys() - first_names)


def _initialize(call: _Init, live: dict[int, Tensor]) -> None:
    """Run a call on CPU tensors, which take the places of those on the meta device meanwhile."""
    for slot in call.slots:
        tensor = live[slot.storage]
        if slot.table == "_parameters":
            tensor = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
        getattr(slot.module, slot.table)[slot.key] = tensor
    try:
        with initialization.guard_torch_init_functions():
            call.owner._init_weights(call.module)
        for slot in call.slots:
            # Read back: code that assigns a new tensor is as good as code that fills the old one.
            live[slot.storage] = getattr(slot.module, slot.table)[slot.key].detach()
    finally:
        for slot in call.slots:
            getattr(slot.module, slot.table)[slot.key] = slot.tensor


def _slots(module: nn.Module) -> Iterator[_Slot]:
    for part in module.modules():
        for table in ("_parameters", "_buffers"):
            for key, tensor in getattr(part, table).items():
                if tensor is not None and tensor.is_meta:
                    yield _Slot(part, table, key, tensor)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _meta_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.is_meta]


def _unset(tensor: Tensor) -> Tensor:
    """Return a CPU tensor like one on the meta device, of NaNs where it is floating-point."""
    value = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return value.fill_(float("nan")) if value.is_floating_point() else value


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_meta:
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
    return torch.device("cpu") if leaf == torch.device("meta") else leaf
