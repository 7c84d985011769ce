"""The recorded updates of a parameter in working precision, ready to be compared with directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.verify.watch.fit import Fit, fit, rounding_of
from harness.verify.watch.recording import ParameterRecord

_MOMENTS = ("momentum_buffer", "momentum", "moment", "exp_avg", "buf")


class Evidence:
    """The recorded updates of a parameter, ready to be compared with directions.

    Attributes:
        usable: updates with a learning rate, a gradient and a movement.
        changes, weights, rates: ΔW, W before, and learning rate of the usable ones.
        gradients, all_weights, all_rates: of every update; the negative gradient under maximize=True.
        dtype: of the weights.
        had_gradient: any gradient was not zero: one that is None or exactly 0 (an unused branch, an expert without
            tokens) moves nothing.
    """

    def __init__(self, record: ParameterRecord, device: torch.device) -> None:
        precision = torch.float64 if record.weights[0].numel() <= 2**18 else torch.float32

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=precision)

        self.record = record
        self.dtype = record.weights[0].dtype
        count = len(record.weights) - 1
        zero = torch.zeros(record.weights[0].shape)
        # torch's maximize=True is the same rule on the negative gradient, L2 decay included.
        signs = [-1.0 if s.values.get("maximize") is True else 1.0 for s in record.settings]
        received = [cast(g if g is not None else zero) for g in record.gradients[:count]]
        self.gradients = [sign * g for sign, g in zip(signs, received)]
        self.all_weights = [cast(w) for w in record.weights[:count]]
        moved = [cast(b) - cast(a) for a, b in zip(record.weights, record.weights[1:])]
        rates = [s.number("lr", default=0.0) or 0.0 for s in record.settings[:count]]
        self.all_rates = rates
        self.usable = [t for t in range(count) if rates[t] and bool(moved[t].any())]
        self.changes = [moved[t] for t in self.usable]
        self.weights = [self.all_weights[t] for t in self.usable]
        self.rates = [rates[t] for t in self.usable]
        self.has_rate = any(rates)
        self.state = {key: value.to(device) for key, value in record.state.items()}
        self.micro = [[sign * cast(g) for g in partial] for sign, partial in zip(signs, record.micro[:count])]
        self.rounding = rounding_of([record.weights[t] for t in self.usable], self.changes)
        self.had_gradient = any(bool(g.any()) for g in self.gradients)

    @property
    def start(self) -> Tensor | None:
        """Return the momentum before the first update, None for none or zeros."""
        for key in _MOMENTS:
            value = self.state.get(key)
            if value is not None and value.shape == self.gradients[0].shape and bool(value.any()):
                return value.to(self.gradients[0].dtype)
        return None

    def pick(self, per_update: Sequence[Tensor]) -> list[Tensor]:
        """Return those of the usable updates."""
        return [per_update[t] for t in self.usable]

    def judge(self, candidate: Sequence[Tensor]) -> Fit:
        """Fit the usable updates by directions of every update."""
        return fit(self.changes, self.pick(candidate), self.weights, self.rates)
