"""Count the bytes that a forward pass saves for the backward pass, by running the model's code on fake tensors.

The model is run at two depths and two batch sizes; every further layer and sequence adds the same.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.config.model_facts import facts
from harness.config.schema import RunConfig
from harness.model import decoder_layers, loss_sum
from harness.model.checkpointing import ATTENTION, PRODUCTS
from harness.model.linear_loss import automatic_chunk, loss_bytes, whole_logits_suffice
from harness.plan.simulated_rank import build_model, planned_head, with_layers

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "bf16_pure": torch.bfloat16}
CASTING = ("single", "ddp")
"""Engines that keep fp32 weights and use autocast; the others compute on copies in half precision."""


@dataclass(frozen=True)
class Activations:
    """Bytes of the activations of one micro-batch on one rank.

    Attributes:
        kept: activations of all layers, without checkpointing.
        recomputed: with checkpointing: the inputs of all layers, and all activations of one layer.
        selective: with selective checkpointing: also the outputs that it keeps of the other layers.
        logits: logits of the micro-batch, or of a chunk of it, their softmax and their gradient, and what a loss in
            chunks keeps for the backward pass.
        casts: copies of fp32 weights in half precision, which autocast makes for the products.
        layer: all activations of one layer. What the forward or backward pass of a layer holds for a moment is of
            this size, too.
    """

    kept: int
    recomputed: int
    selective: int
    logits: int
    casts: int
    layer: int


def count(config: RunConfig, layers: int) -> Activations:
    """Return the activation bytes of a micro-batch.

    Args:
        config: checked.
        layers: number of decoder layers.

    Raises:
        Exception: the model's code cannot run on fake tensors.
    """
    assert config.micro_batch_size is not None
    batch = config.micro_batch_size
    one, two = (_Saved.of(config, depth, 1) for depth in (1, 2))
    more = _Saved.of(config, 1, 2)
    deeper = _Saved.of(config, 2, 2)

    def at(kind: str, depth: int) -> int:
        """Return bytes at a depth and the batch size: bilinear in the two."""
        a, b, c, d = (getattr(saved, kind) for saved in (one, two, more, deeper))
        per_layer, per_sequence = b - a, c - a
        both = d - b - c + a
        return a + per_layer * (depth - 1) + (per_sequence + both * (depth - 1)) * (batch - 1)

    whole, single, base = at("body", layers), at("body", 1), at("body", 0)
    inputs, layer = at("inputs", layers), single - base
    selected = at("selected", layers) - at("selected", 1)
    logits = _loss_bytes(config, batch * config.seq_len)
    if logits is None:
        logits = at("logits", layers)
    recomputed = base + inputs + layer
    return Activations(whole, recomputed, recomputed + selected, logits, at("casts", layers), layer)


def _loss_bytes(config: RunConfig, tokens: int) -> int | None:
    """Return the bytes of the loss where it is computed in chunks; None: from whole logits."""
    shapes = facts(config.model)
    vocabulary, width, wanted = shapes.vocab_size, shapes.hidden_size, config.model.loss_chunk
    if config.task.name == "classify":
        return None
    if vocabulary is None or width is None or whole_logits_suffice(wanted, tokens, vocabulary):
        return None
    compute = HALF.get(config.precision, torch.float32)
    chunk = automatic_chunk(vocabulary) if wanted == "auto" else int(wanted or tokens)
    # The head's copy under autocast is counted with the other copies.
    return loss_bytes(tokens, vocabulary, width, chunk, compute=compute, weights=compute)


@dataclass(frozen=True)
class _Saved:
    body: int
    inputs: int
    selected: int
    logits: int
    casts: int

    @classmethod
    def of(cls, config: RunConfig, depth: int, batch: int) -> _Saved:
        """Run one forward pass with its loss on fake CPU tensors and add up what autograd keeps."""
        half = HALF.get(config.precision)
        casts = config.precision in ("bf16", "fp16") and config.engine.name in CASTING
        small = with_layers(config.model, depth).model_copy(update={"activation_checkpointing": "none"})
        head = planned_head(config)
        module = build_model(small, "fp32", head=head)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module = module.to_empty(device="cpu")
            if half is not None and not casts:
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(half)
            ids = torch.zeros(batch, config.seq_len, dtype=torch.int64)
            # Of a classifier they are a few numbers, and count with the rest.
            logits_of_row = 0 if head is not None else config.seq_len * int(_config(module).vocab_size)
            storages: dict[int, tuple[torch.UntypedStorage, bool]] = {}
            own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                is_logits = tensor.numel() == batch * logits_of_row
                if storage._cdata not in own:
                    # The storage is held, so that its address is not given to another one.
                    storages.setdefault(storage._cdata, (storage, is_logits))
                return tensor

            inputs: list[int] = []
            seen = _Operators(own)

            def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs.append(_bytes(args, kwargs))
                seen.products = 0

            def leave(*_: Any) -> None:
                seen.products = None

            for layer in decoder_layers(module):
                layer.register_forward_pre_hook(enter, with_kwargs=True)
                layer.register_forward_hook(leave)
            autocast = torch.autocast("cpu", dtype=half) if casts and half else nullcontext()
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                with seen, autocast:
                    logits: Any = module(input_ids=ids).logits
                loss = loss_sum(logits, ids) if head is None else logits.float().logsumexp(-1).sum()
            del loss
            logits_bytes = sum(s.nbytes() for s, is_logits in storages.values() if is_logits)
            # The model's output is alive, and the gradient of the fp32 copy comes on top.
            logits_bytes += logits.untyped_storage().nbytes() + logits.numel() * 4
            if logits.element_size() < 4:
                # The gradient is rounded to the dtype of the logits.
                logits_bytes += logits.untyped_storage().nbytes()
        body = sum(
            s.nbytes() for key, (s, is_logits) in storages.items() if not is_logits and key not in seen.casts
        )
        casts_bytes = sum(storage.nbytes() for storage in seen.casts.values())
        return cls(body, sum(inputs), seen.selected, logits_bytes, casts_bytes)


class _Operators(TorchDispatchMode):
    """Note the copies in another dtype that are made of parameters, and what selective checkpointing keeps.

    Args:
        own: addresses of the parameters' storages.

    Attributes:
        casts: address → storage of each copy.
        products: matrix products so far in the layer that runs; None: outside of layers.
        selected: bytes of the outputs that selective checkpointing keeps in all layers.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own = own
        # Held, so that the address of one is not given to another storage.
        self.casts: dict[int, torch.UntypedStorage] = {}
        self.products: int | None = None
        self.selected = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note its output if it casts a parameter or is kept."""
        result = func(*args, **(kwargs or {}))
        if self.products is not None and func in PRODUCTS:
            self.products += 1
        if self.products is not None and (func in ATTENTION or (func in PRODUCTS and self.products % 2 == 1)):
            self.selected += sum(
                t.numel() * t.element_size() for t in tree_leaves(result) if torch.is_tensor(t)
            )
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._own:
            storage = result.untyped_storage()
            self.casts[storage._cdata] = storage
        return result


def _bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes of a layer's input, which is its first tensor argument."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return tensors[0].numel() * tensors[0].element_size() if tensors else 0


def _config(module: nn.Module) -> Any:
    config: Any = module.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
