"""Find out from one forward pass on the meta device what a model's code does around attention and after its head."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.model.attention import AttentionWatch
from harness.model.logit_transform import neutral_logits

_LENGTH = 4
"""Tokens of the pass: more than one, because transformers treats a single token as generation."""


@dataclass(frozen=True)
class ForwardFacts:
    """What a forward pass of a model does.

    Attributes:
        attention_problem: why attention needs transformers' masks, in a few words; None: it is plainly causal.
        head_problem: why the loss needs whole logits, in a few words; None: they are the head's product, scaled and
            capped in the ways of `harness.model.logit_transform`.
    """

    attention_problem: str | None
    head_problem: str | None


def inspect(twin: Any, watch: AttentionWatch) -> ForwardFacts:
    """Run a model of the meta device once and return what it does.

    Args:
        twin: the whole depth of the model on the meta device, built with the attention function
            `harness.model.attention.WATCHED` where its class accepts that.
        watch: sees the attention of the pass.
    """
    head: Any = twin.get_output_embeddings()
    after = _AfterHead()
    if isinstance(head, nn.Linear):
        head.register_forward_hook(lambda _module, _inputs, product: after.start(product))
    ids = torch.zeros(1, _LENGTH, dtype=torch.long, device="meta")
    # Loops over experts look at values, which meta tensors do not have; a batched product does not.
    if hasattr(twin, "set_experts_implementation"):
        # Not every family can do it, and those without experts refuse.
        with suppress(Exception):
            twin.set_experts_implementation("batched_mm")
    try:
        with torch.no_grad(), neutral_logits(twin), after:
            # With a mask of the inputs, transformers does not look for several documents in a row.
            outputs = twin(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        reason = f"code that can't be traced ({type(error).__name__})"
        return ForwardFacts(reason, reason)
    if after.products != 1:
        problem = "a head that is not one linear layer"
    elif not after.is_product(outputs.logits):
        problem = "logits that are not the head's product"
    else:
        problem = None
    return ForwardFacts(watch.verdict(), problem)


class _AfterHead(TorchDispatchMode):
    """Follow the product of the head through operations that change nothing: factors and divisors of one."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self._same: list[torch.Tensor] = []

    def start(self, product: Any) -> None:
        """Take note of the product of the head."""
        self.products += 1
        self._same.append(product)

    def is_product(self, tensor: torch.Tensor) -> bool:
        """Return True for the product of the head, in the same shape and dtype, and for what equals it."""
        return any(
            tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
            and (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
            for other in self._same
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func in _FACTORS
            and not isinstance(args[1], torch.Tensor)
            and args[1] == 1
            and self.is_product(args[0])
        ):
            self._same.append(result)
        return result


_FACTORS = (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor)
