"""Causal attention without a mask, for models whose masks would say no more than "causal".

transformers builds a mask in every forward pass. To see whether rows hold several documents it reads a value from the
device, and under torch.compile it gives `scaled_dot_product_attention` an explicit mask, which excludes the flash and
cuDNN kernels. An attention function without an entry in its table of mask builders gets no mask at all
(`transformers.masking_utils._preprocess_mask_arguments`, 5.24), and then attention is called with ``is_causal=True``.

Rows here are packed blocks or padded on the right, so a causal query never sees padding and needs no padding mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

CAUSAL = "optbench_causal"
"""Name in transformers' table of attention functions; it must not be in the table of mask builders."""
WATCHED = "optbench_watched"
"""Name of the attention function, and of the mask builder, through which `AttentionWatch` sees a forward pass."""

AttentionInterface.register(CAUSAL, sdpa_attention_forward)


class AttentionWatch:
    """Record whether the masks and the attention calls of one forward pass of a model are plainly causal.

    Args:
        seq_len: tokens of the rows of a run: a window of at least as many hides nothing.
    """

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._calls = 0
        self._problem: str | None = None
        # Held, so that the address of a mask is not given to another one.
        self._causal_masks: list[torch.UntypedStorage] = []
        AttentionInterface.register(WATCHED, self._attend)
        AttentionMaskInterface.register(WATCHED, self._mask)

    def verdict(self) -> str | None:
        """Return why the model needs transformers' masks, in a few words, or None if it does not."""
        return self._problem or (None if self._calls else "attention code of its own")

    def _mask(self, *, q_length: int, kv_length: int, device: torch.device, **request: Any) -> torch.Tensor:
        mask = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
        window = request.get("local_size")
        is_causal = request["mask_function"] is causal_mask_function or window is not None
        if not is_causal or not request.get("allow_is_causal_skip") or q_length != kv_length:
            self._object("masks of its own")
        else:
            self._check_window(window)
            self._causal_masks.append(mask.untyped_storage())
        return mask

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        self._calls += 1
        is_causal = options.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not is_causal or query.shape[2] != key.shape[2]:
            self._object("attention that is not causal")
        if not self._is_causal_mask(attention_mask):
            self._object("masks of its own")
        self._check_window(options.get("sliding_window"))
        batch, heads, length, _ = query.shape
        return query.new_empty(batch, length, heads, value.shape[-1]), None

    def _is_causal_mask(self, mask: torch.Tensor | None) -> bool:
        # By address: models cut masks to the length of the keys.
        masks = {storage._cdata for storage in self._causal_masks}
        return mask is not None and mask.untyped_storage()._cdata in masks

    def _check_window(self, window: int | None) -> None:
        if window is not None and window < self._seq_len:
            self._object(f"windows of {window} tokens")

    def _object(self, reason: str) -> None:
        self._problem = self._problem or reason
