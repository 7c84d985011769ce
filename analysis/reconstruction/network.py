"""Homogeneous ReLU networks and Σ cᵢ∇_θΦ(xᵢ), with gates that are recomputed, inherited or smoothed.

A task (`TASKS`) defines how labels and outputs give margins and the coefficients c of θ = Σ λᵢ∇_θ⟨cᵢ, Φ(xᵢ)⟩.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Gates = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(pre-activations (…, n, h), layer from 0) → (activations, gates), both of the pre-activations' shape."""
TASKS = ("binary", "multiclass")


@dataclass(frozen=True)
class Network:
    """Φ(x) = W_L·relu(… relu(W₁x + b)): of degree L in its parameters, which needs biases past layer 1 absent.

    Attributes:
        weights: (h₁, d), (h₂, h₁), …, (k, h): float64. Several networks of one shape have a leading dimension.
        bias: (h₁,) of the first layer, or None.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None = None

    @property
    def depth(self) -> int:
        """L, the degree of homogeneity: the number of layers."""
        return len(self.weights)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Weights in order, then the bias if there is one: the order of every gradient here."""
        return self.weights if self.bias is None else (*self.weights, self.bias)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """`parameters`, the bias as a column."""
        return self.weights if self.bias is None else (*self.weights, self.bias.unsqueeze(-1))

    @property
    def squared_norm(self) -> float:
        """‖θ‖² over all parameters."""
        return float(sum(p.square().sum() for p in self.parameters))

    def scaled(self, factor: float) -> Network:
        """Return the network with all parameters times a factor, which multiplies Φ by its L-th power."""
        bias = None if self.bias is None else self.bias * factor
        return Network(tuple(w * factor for w in self.weights), bias)

    def copied(self) -> Network:
        """Return a copy whose parameters need no gradient."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Network(tuple(w.detach().clone() for w in self.weights), bias)

    def with_first(self, weight: Tensor) -> Network:
        """Return the network with another first-layer weight."""
        return replace(self, weights=(weight, *self.weights[1:]))


def stacked(networks: Sequence[Network]) -> Network:
    """Return networks of one shape as one with a leading dimension, which broadcasts over x (…, n, d)."""
    weights = tuple(torch.stack(layer) for layer in zip(*(n.weights for n in networks), strict=True))
    biases = [n.bias for n in networks if n.bias is not None]
    return Network(weights, torch.stack(biases) if biases else None)


def recomputed(h: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return activations and the network's own gates, 1 where h > 0."""
    gate = (h > 0).to(h.dtype)
    return h * gate, gate


def inherited(gates: Sequence[Tensor]) -> Gates:
    """Return gates that stay as they are, (n, h) per layer, whatever the pre-activations."""
    return lambda h, layer: (h * gates[layer], gates[layer])


class _SmoothedReLU(torch.autograd.Function):
    """relu forward, multiplication by σ(αh) backward (Haim et al. 2022, public code)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, h: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return h.relu()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (gate,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * gate, None


def smoothed(alpha: Tensor | float) -> Gates:
    """Return gates σ(αh), through which derivatives pass; the forward activation stays relu(h).

    Args:
        alpha: sharpness; a tensor broadcasts over (…, n, h).
    """

    def gates(h: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(alpha * h)
        activation = _SmoothedReLU.apply(h, gate.detach())
        assert isinstance(activation, Tensor)
        return activation, gate

    return gates


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass: what enters each layer, its gates, pre-activations, and Φ.

    Attributes:
        inputs: (…, n, h_{l-1}) for each layer.
        gates, hidden: (…, n, h_l) for each hidden layer.
        outputs: (…, n, k).
    """

    inputs: list[Tensor]
    gates: list[Tensor]
    hidden: list[Tensor]
    outputs: Tensor


def forward(network: Network, x: Tensor, gates: Gates = recomputed) -> ForwardPass:
    """Run x (…, n, d) through the network."""
    inputs, gate_values, hidden = [x], [], []
    for layer, weight in enumerate(network.weights[:-1]):
        h = inputs[-1] @ weight.mT
        if layer == 0 and network.bias is not None:
            h = h + network.bias.unsqueeze(-2)
        activation, gate = gates(h, layer)
        inputs.append(activation)
        gate_values.append(gate)
        hidden.append(h)
    return ForwardPass(inputs, gate_values, hidden, inputs[-1] @ network.weights[-1].mT)


class GradientFactor(NamedTuple):
    """A gradient of one parameter as δᵀa, summed over n.

    Attributes:
        delta: δ (…, n, h).
        inputs: a (…, n, d); 1 (…, n, 1) for a bias.
    """

    delta: Tensor
    inputs: Tensor

    def product(self) -> Tensor:
        """Return δᵀa, (…, h, d)."""
        return self.delta.mT @ self.inputs

    def inner(self, matrix: Tensor) -> Tensor:
        """Return ⟨matrix, δᵀa⟩ (…) without forming the product, for a matrix (…, h, d)."""
        return ((self.delta @ matrix) * self.inputs).sum((-2, -1))

    def squared_norm(self) -> Tensor:
        """Return ‖δᵀa‖² (…), by the two n × n Gram matrices."""
        return ((self.delta @ self.delta.mT) * (self.inputs @ self.inputs.mT)).sum((-2, -1))


def factors(network: Network, passed: ForwardPass, coefficients: Tensor) -> list[GradientFactor]:
    """Return u = Σᵢ ∇_θ⟨cᵢ, Φ(xᵢ)⟩ with the gates of a pass, a factored gradient per parameter.

    Args:
        network: the network of the pass.
        done: a forward pass of x (…, n, d).
        coefficients: cᵢ (…, n, k).
    """
    delta = coefficients
    parts: list[GradientFactor] = []
    for layer in range(network.depth - 1, -1, -1):
        parts.append(GradientFactor(delta, passed.inputs[layer]))
        if layer:
            delta = (delta @ network.weights[layer]) * passed.gates[layer - 1]
    parts.reverse()
    if network.bias is not None:
        parts.append(GradientFactor(delta, torch.ones_like(delta[..., :1])))
    return parts


def combination(network: Network, passed: ForwardPass, coefficients: Tensor) -> tuple[Tensor, ...]:
    """Return `factors` multiplied out: a tensor (…, *shape) for each of `network.parameters`."""
    parts = [factor.product() for factor in factors(network, passed, coefficients)]
    if network.bias is not None:
        parts[-1] = parts[-1].squeeze(-1)
    return tuple(parts)


def outputs(network: Network, x: Tensor) -> Tensor:
    """Return Φ(x), (…, n, k)."""
    return forward(network, x).outputs


def patterns(network: Network, x: Tensor) -> list[Tensor]:
    """Return the network's gates at x, (n, h) per hidden layer."""
    return forward(network, x).gates


def input_gradients(network: Network, x: Tensor, coefficients: Tensor) -> Tensor:
    """Return ∇ₓ⟨cᵢ, Φ(xᵢ)⟩ at each xᵢ, (n, d), for x (n, d) and coefficients (n, k)."""
    gates = patterns(network, x)
    delta = coefficients
    for layer in range(network.depth - 1, 0, -1):
        delta = (delta @ network.weights[layer]) * gates[layer - 1]
    return delta @ network.weights[0]


def flat(parts: Sequence[Tensor], lead: int = 0) -> Tensor:
    """Return parameters or gradients as one vector; the first `lead` dimensions stay."""
    return torch.cat([part.flatten(lead) for part in parts], dim=-1)


def per_sample(network: Network, x: Tensor, coefficients: Tensor, gates: Gates = recomputed) -> Tensor:
    """Return the rows ∇_θ⟨cᵢ, Φ(xᵢ)⟩, (n, p), for x (n, d) and coefficients (n, k)."""
    passed = forward(network, x, gates)
    single = ForwardPass(
        [a.unsqueeze(-2) for a in passed.inputs],
        [g.unsqueeze(-2) for g in passed.gates],
        [h.unsqueeze(-2) for h in passed.hidden],
        passed.outputs.unsqueeze(-2),
    )
    return flat(combination(network, single, coefficients.unsqueeze(-2)), lead=1)


def kkt_coefficients(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return cᵢ (…, n, k) of the stationarity condition.

    Binary (Haim et al. 2022): yᵢ. Multiclass (Buzaglo et al. 2023): the label's unit vector less that of the
    strongest other class.

    Args:
        task: one of `TASKS`.
        outputs: Φ (…, n, k); no derivative passes through the choice of the strongest class.
        labels: (n,): ±1, or class numbers.
    """
    if task == "binary":
        return labels.to(outputs.dtype).unsqueeze(-1).expand_as(outputs)
    own = one_hot(labels.long(), outputs.shape[-1]).to(outputs.dtype).expand_as(outputs)
    rival = outputs.detach().masked_fill(own.bool(), -torch.inf).argmax(-1)
    return own - one_hot(rival, outputs.shape[-1]).to(outputs.dtype)


def constraints(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the c (n, r, k) of all r margins ⟨c, Φ(xᵢ)⟩ that each image must keep at 1 or above.

    Binary: yᵢ alone, r = 1. Multiclass: the label's unit vector less that of each other class, r = k − 1, in the
    order of the classes. At a KKT point several classes may be equally strong, and each then has a multiplier; the
    published attack (`kkt_coefficients`) knows the strongest alone.
    """
    if task == "binary":
        return kkt_coefficients(task, outputs, labels).unsqueeze(1)
    k = outputs.shape[-1]
    unit = torch.eye(k, dtype=outputs.dtype)
    own = one_hot(labels.long(), k).bool()
    rivals = unit.expand(len(outputs), k, k)[~own].view(len(outputs), k - 1, k)
    return unit[labels.long()].unsqueeze(1) - rivals


def all_margins(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the margin of each of `constraints`, (n, r)."""
    return (constraints(task, outputs, labels) * outputs.unsqueeze(1)).sum(-1)


def label_margins(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the margins (…, n): yΦ, or the label's output less the strongest other one."""
    return (kkt_coefficients(task, outputs, labels) * outputs).sum(-1)


def output_descent(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return −∂loss/∂Φ (n, k) of the training loss.

    Binary: log Σᵢ exp(−yᵢΦᵢ); multiclass: log Σᵢ Σ_{j≠yᵢ} exp(Φⱼ − Φ_{yᵢ}): the logarithm of the sum never
    underflows, where plain logits do past a margin of 100.
    """
    if task == "binary":
        return (labels * torch.softmax(-labels * outputs.squeeze(-1), 0)).unsqueeze(-1)
    own = one_hot(labels.long(), outputs.shape[-1]).bool()
    gaps = (outputs - outputs[own].unsqueeze(-1)).masked_fill(own, -torch.inf)
    share = torch.softmax(gaps.flatten(), 0).view_as(outputs)
    return own * share.sum(-1, keepdim=True) - share
