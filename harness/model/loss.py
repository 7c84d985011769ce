"""The training and validation loss: a sum, so that whoever knows the global token count can weight it right.

Models with routed experts add a load-balancing loss to the training objective (never to the evaluation). It is not
linear in the tokens, so its value depends on how the batch is cut into forward passes. Here the loss of one forward
pass is weighted with the pass's share of the global batch's loss tokens. The weights of a step sum to 1 for any number
of processes, any cut and any padding, and a step of one forward pass has the objective of `transformers`. The number
of processes changes nothing at a fixed ``micro_batch_size``, which is part of the identity of such a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from harness.config.model_keys import ROUTER_COEFFICIENTS
from harness.model.linear_loss import IGNORED, LossHead, automatic_chunk, whole_logits_suffice
from harness.protocols import Losses

if TYPE_CHECKING:
    from harness.protocols import MicroBatch


class CausalLMObjective:
    """Next-token prediction: cross-entropy summed over loss tokens, plus the routers' loss where the model has one.

    Args:
        model: a `transformers` causal language model. If its head is a `LossHead`, logits are not made whole.
        is_padded: rows end in padding, which routers must not balance. Where not all other positions have labels,
            micro-batches hold the attention mask as their third tensor.
        loss_chunk: tokens whose logits exist at a time: a number, automatic, or None for whole logits.
    """

    def __init__(
        self, model: nn.Module, *, is_padded: bool, loss_chunk: int | Literal["auto"] | None = None
    ) -> None:
        self._coefficient = router_coefficient(model)
        # Causal attention never looks at padding on the right; the routers' loss would count it.
        self._needs_mask = bool(self._coefficient) and is_padded
        whole: Any = model
        head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._head = head if isinstance(head, LossHead) else None
        self._chunk: int | Literal["auto"] | None = loss_chunk

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward pass."""
        ids, labels, *mask = batch
        inputs: dict[str, Any] = {"input_ids": ids}
        if self._needs_mask:
            inputs["attention_mask"] = mask[0] if mask else attention_mask(labels)
        if self._loss_in_head(labels):
            assert self._head is not None
            chunk = automatic_chunk(self._head.out_features) if self._chunk == "auto" else self._chunk
            inputs |= {"labels": labels, "loss_chunk": chunk}
        return inputs

    def losses(self, outputs: Any, batch: MicroBatch) -> Losses:
        """Return the losses of a forward pass, as 0-dim fp32 sums over its loss tokens."""
        labels = batch[1]
        loss = self._cross_entropy(outputs, labels)
        if not self._coefficient:
            return Losses(loss, loss, None)
        aux_loss = aux_loss_sum(outputs, labels)
        return Losses(loss + self._coefficient * aux_loss, loss, aux_loss)

    def validation_sums(self, outputs: Any, batch: MicroBatch) -> torch.Tensor:
        """Return summed cross-entropy and number of loss tokens, ``(2,)`` fp64; the routers' loss is left out."""
        labels = batch[1]
        return torch.stack(
            [self._cross_entropy(outputs, labels).double(), (labels != IGNORED).sum().double()]
        )

    def row_losses(self, outputs: Any, batch: MicroBatch) -> torch.Tensor:
        """Return the cross-entropy of each row, summed over its labels: ``(rows,)`` fp64, without gradients."""
        labels = batch[1]
        if self._loss_in_head(labels):
            losses = outputs.logits.squeeze(-1)
        else:
            losses = loss_sum(outputs.logits, labels, reduction="none").view(labels.shape)
        return losses.double().sum(1)

    def _loss_in_head(self, labels: torch.Tensor) -> bool:
        """Return True if the head computes the loss of a batch: a matter of its shape alone."""
        return self._head is not None and not whole_logits_suffice(
            self._chunk, labels.numel(), self._head.out_features
        )

    def _cross_entropy(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        return outputs.logits.sum() if self._loss_in_head(labels) else loss_sum(outputs.logits, labels)


def loss_sum(
    logits: torch.Tensor, labels: torch.Tensor, reduction: Literal["sum", "none"] = "sum"
) -> torch.Tensor:
    """Return the cross-entropy in nats, summed over the labels that are not `IGNORED`.

    A sum instead of a mean: means of micro-batches or processes with different numbers of tokens do not
    average to the mean over the global batch. The softmax is taken in fp32 whatever the logits' dtype.

    Args:
        logits: ``(batch, seq_len, vocab)``.
        labels: ``(batch, seq_len)`` int64, already shifted.
        reduction: ``none`` keeps the loss of each label, 0 where it is `IGNORED`.

    Returns:
        fp32: 0-dim, or ``(batch · seq_len,)``.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def router_coefficient(model: nn.Module) -> float:
    """Return the coefficient of the model's load-balancing loss; 0.0 where the model computes none.

    `transformers` models compute it (``outputs.aux_loss``) if their configuration says ``output_router_logits``.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not (getattr(config, "output_router_logits", False) or getattr(text, "output_router_logits", False)):
        return 0.0
    owners_and_names = ((owner, name) for owner in (model, text) for name in ROUTER_COEFFICIENTS)
    coefficients = (getattr(owner, name, None) for owner, name in owners_and_names)
    return float(next((value for value in coefficients if value is not None), 0.0))


def aux_loss_sum(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss of a forward pass times its number of loss tokens, as a 0-dim fp32 tensor.

    Args:
        outputs: of a `transformers` model with ``output_router_logits``.
        labels: ``(batch, seq_len)`` int64 of that pass.
    """
    auxiliary = outputs.aux_loss
    if not torch.is_tensor(auxiliary):
        # A model whose layers are all dense gives the number 0 or None.
        auxiliary = torch.zeros((), device=labels.device)
    return auxiliary.float() * (labels != IGNORED).sum()


def attention_mask(labels: torch.Tensor) -> torch.Tensor:
    """Return the mask of the inputs that are not padding, ``(batch, seq_len)`` int64, from right-padded labels.

    The last token of a row is an input without a label, so one more position than there are labels is real.
    """
    real = (labels != IGNORED).sum(1, keepdim=True) + 1
    return (torch.arange(labels.shape[1], device=labels.device) < real).long()
