"""What families of `transformers` compute between the product of the head and the logits: a factor or a soft cap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_NAMES = ("logit_scale", "lm_head_multiplier", "logits_scaling", "final_logit_softcapping")
"""Factors (Cohere, Falcon-H1), divisor (Granite) and soft cap (Gemma): attributes of the model, of the model without
its head, or of the configuration, wherever the code reads them."""
_NEUTRAL = {"final_logit_softcapping": None}


@dataclass(frozen=True)
class LogitTransform:
    """Logits as a function of the product of the head: ``cap · tanh(scale · product / cap)``.

    Attributes:
        scale: factor of the product.
        cap: bound of the absolute value; None: no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> LogitTransform:
        """Return the transform that the code of a model applies, as far as its attributes tell."""
        values = {name: getattr(owner, name) for owner, name in _settings(model)}
        scale = values.get("logit_scale", 1.0) * values.get("lm_head_multiplier", 1.0)
        return cls(scale / values.get("logits_scaling", 1.0), values.get("final_logit_softcapping"))

    @property
    def is_identity(self) -> bool:
        """True if the logits are the product."""
        return self == LogitTransform()

    def __call__(self, product: torch.Tensor) -> torch.Tensor:
        """Return the logits, fp32 and of the same shape."""
        logits = product.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn the gradient of the logits into that of the product, in place.

        Args:
            gradient: fp32.
            logits: what the call returned.
        """
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@contextmanager
def neutral_logits(model: Any) -> Iterator[None]:
    """Let the enclosed forward passes of a model give the product of its head in place of logits."""
    settings = [(owner, name, getattr(owner, name)) for owner, name in _settings(model)]
    for owner, name, _ in settings:
        setattr(owner, name, _NEUTRAL.get(name, 1.0))
    try:
        yield
    finally:
        for owner, name, value in settings:
            setattr(owner, name, value)


def _settings(model: Any) -> list[tuple[Any, str]]:
    """Return owner and name of the attributes that are numbers, each name once."""
    owners = (model, model.base_model, model.config, model.config.get_text_config())
    found: dict[str, Any] = {}
    for name in _NAMES:
        for owner in owners:
            if isinstance(getattr(owner, name, None), int | float):
                found.setdefault(name, owner)
    return [(owner, name) for name, owner in found.items()]
