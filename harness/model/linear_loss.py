"""Cross-entropy of a linear head without whole logits: chunks of tokens, with the gradients in the same pass.

The logits of a micro-batch are its largest tensor by far: tokens × vocabulary, in up to four copies. Here a chunk of
tokens goes through the head, the softmax and the gradients of both before the next one does, so that one chunk exists
at a time. The gradients are made in the forward pass, when the logits of the chunk are there: the backward pass only
multiplies them with the gradient of the loss. No product is computed twice, and the backward pass does not read the
weights, which fully_shard and ZeRO-3 may have given up by then.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from harness.model.logit_transform import LogitTransform, neutral_logits

IGNORED = -100
"""Label of a position that carries no loss (padding)."""
CHUNK_BYTES = 2**28
"""fp32 logits of an automatic chunk. Larger chunks add to the gradient of the head less often."""
LEAST_CHUNK = 1024
"""Tokens of an automatic chunk at least, so that products of large vocabularies stay bound by arithmetic."""
SMALL_BYTES = 2**26
"""fp32 logits that are not worth a chunk: automatically, they stay whole."""


class LossHead(nn.Linear):
    """A linear head that returns the loss in place of logits while it has labels.

    Attributes:
        labels: ``(batch, seq_len)`` int64 of the forward pass under way, `IGNORED` where no loss is wanted; None:
            return logits.
        chunk: tokens whose logits exist at a time.
        transform: from the product of the head to the logits.
    """

    labels: torch.Tensor | None = None
    chunk: int
    transform: LogitTransform

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits, or the loss in a shape that code that cuts logits passes on.

        With gradients it is the sum, ``(1, 1, 1)`` fp32; without, that of each token, ``(batch, seq_len, 1)`` fp32.
        """
        if self.labels is None:
            return super().forward(input)
        loss = linear_cross_entropy(
            input, self.weight, self.bias, self.labels, chunk=self.chunk, transform=self.transform
        )
        return loss.view(1, 1, 1) if loss.dim() == 0 else loss.unsqueeze(-1)


def install(model: Any) -> LossHead:
    """Let the forward pass of a model take ``labels`` and ``loss_chunk``, and then give the loss as ``outputs.logits``.

    The loss is computed inside of the head's forward pass, where every engine has its weights gathered. Without labels
    nothing changes, nor do the names of modules and parameters.

    Args:
        model: a `transformers` causal language model whose logits are a linear head's product
            (`harness.model.inspection`).

    Returns:
        The head, which is one of the model's modules as before.
    """
    linear = model.get_output_embeddings()
    assert type(linear) is nn.Linear
    head: Any = linear
    head.__class__ = LossHead
    head.transform = LogitTransform.of(model)
    neutral: list[Any] = []

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        labels = kwargs.pop("labels", None)
        if labels is not None:
            head.labels, head.chunk = labels, kwargs.pop("loss_chunk")
            neutral.append(neutral_logits(model))
            neutral[-1].__enter__()
        return args, kwargs

    def end(*_: Any) -> None:
        head.labels = None
        if neutral:
            neutral.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    # Also after an exception: the next pass may want logits.
    model.register_forward_hook(end, always_call=True)
    return head


def whole_logits_suffice(chunk: int | Literal["auto"] | None, tokens: int, vocabulary: int) -> bool:
    """Return True if a micro-batch of so many tokens does not need chunks.

    Args:
        chunk: the key ``model.loss_chunk``: tokens, automatic, or None for whole logits.
        tokens: of the micro-batch on one process.
        vocabulary: number of logits of a token.
    """
    return chunk is None or (chunk == "auto" and 4 * tokens * vocabulary <= SMALL_BYTES)


def automatic_chunk(vocabulary: int) -> int:
    """Return the tokens of a chunk: a power of two whose fp32 logits take up to `CHUNK_BYTES`."""
    return max(LEAST_CHUNK, 1 << max(0, (CHUNK_BYTES // (4 * vocabulary)).bit_length() - 1))


def loss_bytes(
    tokens: int, vocabulary: int, width: int, chunk: int, *, compute: torch.dtype, weights: torch.dtype
) -> int:
    """Return the bytes that the loss of a micro-batch takes at its peak, which is at the end of the forward pass.

    Args:
        tokens: of the micro-batch on one process.
        vocabulary: logits of a token.
        width: of the hidden states.
        chunk: tokens whose logits exist at a time.
        compute: dtype of products.
        weights: dtype of the head as the engine holds it in the forward pass.
    """
    size = compute.itemsize
    # fp32: product and log-probabilities; else log-probabilities, and the product or the rounded gradient.
    logits = min(chunk, tokens) * vocabulary * (4 + size)
    # The masked rows and their gradient; the gradient of the weight; its copy under autocast.
    rows = 2 * tokens * width * size
    head = vocabulary * width * (4 + (size if weights != compute else 0))
    return logits + rows + head


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    chunk: int,
    transform: LogitTransform | None = None,
) -> torch.Tensor:
    """Return the cross-entropy in nats of a linear head: its sum, or without gradients that of each label.

    Products are computed in the dtype of ``hidden``, or in autocast's; the softmax, the loss and the sums over chunks
    in fp32. The gradient can be taken once.

    Args:
        hidden: ``(batch, seq_len, width)``.
        weight: ``(vocabulary, width)``.
        bias: ``(vocabulary,)`` or None.
        labels: ``(batch, seq_len)`` int64, already shifted.
        chunk: tokens whose logits exist at a time.
        transform: from the product to the logits; None: they are the same.

    Returns:
        fp32: 0-dim where gradients are enabled, else ``(batch, seq_len)``. Labels that are `IGNORED` count as 0.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        # Inside of the function gradients are off, whatever the caller wants.
        return _LinearCrossEntropy.apply(
            hidden, weight, bias, labels, chunk, transform or LogitTransform(), dtype, torch.is_grad_enabled()
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk: int,
        transform: LogitTransform,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> torch.Tensor:
        labels = labels.flatten()
        is_counted = labels != IGNORED
        target = torch.where(is_counted, labels, 0).unsqueeze(1)
        # Zero rows add nothing to the gradient of the weight, and cost one pass over tokens × width instead of
        # tokens × vocabulary.
        rows = torch.where(is_counted.unsqueeze(1), hidden.flatten(0, -2), 0).to(dtype)
        matrix = weight.to(dtype)
        addend = None if bias is None else bias.to(dtype)
        losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        d_hidden, d_weight, d_bias = (
            _gradient(wanted and with_gradients, like, kind)
            for wanted, like, kind in zip(
                ctx.needs_input_grad, (rows, weight, bias), (dtype, torch.float32, torch.float32)
            )
        )
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            product = rows[part] @ matrix.T if addend is None else torch.addmm(addend, rows[part], matrix.T)
            if transform.is_identity:
                logits, log_p = None, torch.log_softmax(product, -1, dtype=torch.float32)
            else:
                logits = transform(product)
                log_p = torch.log_softmax(logits, -1)
            del product
            log_p_target = log_p.gather(1, target[part])
            losses[part] = -log_p_target.squeeze(1)
            if not with_gradients:
                continue
            # Softmax minus one at the target, in the memory of the log-probabilities.
            gradient = log_p.exp_().scatter_(1, target[part], log_p_target.expm1())
            if logits is not None:
                transform.backward_(gradient, logits)
            if d_bias is not None:
                d_bias += is_counted[part].float() @ gradient
            gradient = gradient.to(dtype)
            if d_hidden is not None:
                torch.mm(gradient, matrix, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, gradient.T, rows[part])
            # Before the next chunk's logits.
            del log_p, logits, gradient
        if d_hidden is not None:
            d_hidden.masked_fill_(~is_counted.unsqueeze(1), 0)
            d_hidden = d_hidden.view(hidden.shape)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        losses = torch.where(is_counted, losses, 0)
        return losses.sum() if with_gradients else losses.view(hidden.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("the gradient of linear_cross_entropy can be taken once")
        # In place, and given away: the gradient of a large head must not exist twice.
        gradients = tuple(None if g is None else g.mul_(outputs[0]) for g in ctx.gradients)
        ctx.gradients = None
        return (*gradients, *(None for _ in range(5)))


def _gradient(is_wanted: bool, like: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return torch.zeros_like(like, dtype=dtype) if is_wanted and like is not None else None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to a fp32 total."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        # The sum over the tokens leaves the product in fp32: no rounding, and no overflow under fp16.
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(left @ right)
