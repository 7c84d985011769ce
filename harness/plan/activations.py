"""Bytes that a forward pass keeps for the backward pass, counted on fake tensors: the model's own code, no memory.

Two depths and two batch sizes are run; what a layer and a sequence add is the same for every further one.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from harness.config.schema import RunConfig
from harness.model import decoder_layers, loss_sum
from harness.plan import network

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "bf16_pure": torch.bfloat16}
CASTING = ("single", "ddp")
"""Engines with fp32 weights under autocast; all others compute on copies in half precision."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch of one rank.

    Attributes:
        kept: of all layers, without checkpointing.
        recomputed: with checkpointing: the layers' inputs, and all of one layer.
        logits: logits, their softmax and their gradient.
    """

    kept: int
    recomputed: int
    logits: int


def count(config: RunConfig, layers: int) -> Activations:
    """Return what a micro-batch keeps.

    Args:
        config: checked.
        layers: decoder layers of the model.

    Raises:
        Exception: the model's code cannot run on fake tensors.
    """
    assert config.micro_batch_size is not None
    batch = config.micro_batch_size
    one, two = (_Saved.of(config, depth, 1) for depth in (1, 2))
    more = _Saved.of(config, 1, 2)
    deeper = _Saved.of(config, 2, 2)

    def at(kind: str, depth: int) -> int:
        """Affine in depth and batch, with their product."""
        a, b, c, d = (getattr(saved, kind) for saved in (one, two, more, deeper))
        per_layer, per_sequence = b - a, c - a
        both = d - b - c + a
        return a + per_layer * (depth - 1) + (per_sequence + both * (depth - 1)) * (batch - 1)

    whole, single, base = at("body", layers), at("body", 1), at("body", 0)
    inputs = at("inputs", layers)
    return Activations(whole, base + inputs + (single - base), at("logits", layers))


@dataclass(frozen=True)
class _Saved:
    body: int
    inputs: int
    logits: int

    @classmethod
    def of(cls, config: RunConfig, depth: int, batch: int) -> _Saved:
        """Run one forward pass with its loss on fake CPU tensors and add up what autograd keeps."""
        half = HALF.get(config.precision)
        casts = config.precision in ("bf16", "fp16") and config.engine.name in CASTING
        small = network.at_depth(config.model, depth).model_copy(update={"activation_checkpointing": False})
        module = network.build(small, "fp32")
        with FakeTensorMode(allow_non_fake_inputs=True):
            module = module.to_empty(device="cpu")
            if half is not None and not casts:
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(half)
            ids = torch.zeros(batch, config.seq_len, dtype=torch.int64)
            vocabulary = int(_config(module).vocab_size)
            storages: dict[int, tuple[torch.UntypedStorage, bool]] = {}
            own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                is_logits = tensor.numel() == ids.numel() * vocabulary
                if storage._cdata not in own:
                    # The storage is held, so that its address is not given to another one.
                    storages.setdefault(storage._cdata, (storage, is_logits))
                return tensor

            inputs: list[int] = []
            for layer in decoder_layers(module):
                layer.register_forward_pre_hook(
                    lambda _, given, named: inputs.append(_bytes(given, named)), with_kwargs=True
                )
            autocast = torch.autocast("cpu", dtype=half) if casts and half else nullcontext()
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                with autocast:
                    logits: Any = module(input_ids=ids).logits
                loss = loss_sum(logits, ids)
            del loss
            logits_bytes = sum(s.nbytes() for s, is_logits in storages.values() if is_logits)
            # The model's output is alive, and the gradient of the fp32 copy comes on top.
            logits_bytes += logits.untyped_storage().nbytes() + logits.numel() * 4
        body = sum(s.nbytes() for s, is_logits in storages.values() if not is_logits)
        return cls(body, sum(inputs), logits_bytes)


def _bytes(given: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Of the hidden states that a layer gets: its first tensor."""
    tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
    return tensors[0].numel() * tensors[0].element_size() if tensors else 0


def _config(module: nn.Module) -> Any:
    config: Any = module.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
