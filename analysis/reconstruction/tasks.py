"""What is learned: how labels and outputs give margins and the coefficients c of θ = Σ λᵢ∇_θ⟨cᵢ, Φ(xᵢ)⟩."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

TASKS = ("binary", "multiclass", "regression")


def coefficients(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """cᵢ (…, n, k) of the stationarity condition.

    Binary (Haim et al. 2022): yᵢ. Multiclass (Buzaglo et al. 2023): the label's unit vector less that of the
    strongest other class. Regression (same): 1, and λ may have any sign.

    Args:
        task: one of `TASKS`.
        outputs: Φ (…, n, k); no derivative passes through the choice of the strongest class.
        labels: (n,): ±1, class numbers, or targets.
    """
    if task == "binary":
        return labels.to(outputs.dtype).unsqueeze(-1).expand_as(outputs)
    if task == "regression":
        return torch.ones_like(outputs)
    own = one_hot(labels.long(), outputs.shape[-1]).to(outputs.dtype).expand_as(outputs)
    rival = outputs.detach().masked_fill(own.bool(), -torch.inf).argmax(-1)
    return own - one_hot(rival, outputs.shape[-1]).to(outputs.dtype)


def margins(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """(…, n): yΦ, or the label's output less the strongest other one.

    Regression has no margin: there it is −|Φ − y|, at most 0.
    """
    if task == "regression":
        return -(outputs.squeeze(-1) - labels).abs()
    return (coefficients(task, outputs, labels) * outputs).sum(-1)


def descent(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """−∂loss/∂Φ (n, k) of the training loss.

    Binary: log Σᵢ exp(−yᵢΦᵢ); multiclass: log Σᵢ Σ_{j≠yᵢ} exp(Φⱼ − Φ_{yᵢ}): the logarithm of the sum never
    underflows, where plain logits do past a margin of 100. Regression: ½ Σ (Φ − y)².
    """
    if task == "binary":
        return (labels * torch.softmax(-labels * outputs.squeeze(-1), 0)).unsqueeze(-1)
    if task == "regression":
        return labels.unsqueeze(-1) - outputs
    own = one_hot(labels.long(), outputs.shape[-1]).bool()
    gaps = (outputs - outputs[own].unsqueeze(-1)).masked_fill(own, -torch.inf)
    share = torch.softmax(gaps.flatten(), 0).view_as(outputs)
    return own * share.sum(-1, keepdim=True) - share
