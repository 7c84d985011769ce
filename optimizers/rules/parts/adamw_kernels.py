"""Steps of AdamW (`optimizers.rules.adamw`): torch's fused kernel, or fp32 moments for half-precision weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.interfaces import compute_dtype
from optimizers.rounding import Rounding, compensated, stochastic_bf16
from optimizers.stored_moments import TensorPart, random_bits, rounding_key, stored_dtype

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")

# Elements of half-precision weights that are stepped at once. A step holds about ten fp32 temporaries of this many: on
# a CPU they should stay in its caches (2¹⁷ took 0.69 of the time of whole tensors); on a
# GPU 2²⁵ are 1.3 GB, and few kernels.
CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}

_MOMENTS = ("moment", "second_moment")


def state_kinds(
    rounding: str, parameter: Tensor, options: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, torch.dtype]:
    """Return kind → dtype of the state tensors, which have the parameter's shape."""
    wide = compute_dtype(parameter)
    kinds = {kind: stored_dtype(kind, options, wide) for kind in _MOMENTS}
    if rounding == "kahan" and parameter.dtype != wide:
        kinds["compensation"] = parameter.dtype
    return kinds


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters of one AdamW step."""

    lr: float | Tensor
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    eps_form: str
    rounding: Rounding
    cautious: bool = False

    def eps_at(self, step: int) -> float:
        """Return ε for torch's form √v̂ + ε at the step-th step (from 1); raw: √v + ε is √v̂ + ε/√(1 - β₂ᵗ)."""
        return self.eps / math.sqrt(1.0 - self.betas[1] ** step) if self.eps_form == "raw" else self.eps


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    settings: AdamWSettings,
    names: Sequence[str],
    found_inf: Tensor | None,
    parts: Sequence[TensorPart] | None = None,
) -> None:
    """Step parameters that have gradients, in groups of equal device, dtype and step number.

    Args:
        parameters: to be changed, any shape.
        gradients: of each, of its shape.
        states: each with "moment", "second_moment" (and "compensation"), and "step" as it was before.
        names: of the parameters; the seed of stochastic rounding.
        found_inf: 1-element float tensor; above 0: nothing changes. None: not masked.
        parts: which elements of the whole parameters these are; needed for moments in bf16 only.
    """
    groups: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for i, (parameter, state) in enumerate(zip(parameters, states)):
        groups.setdefault((parameter.device, parameter.dtype, state["step"]), []).append(i)
    for (device, dtype, before), positions in groups.items():
        weights = [parameters[i] for i in positions]
        grads = [gradients[i] for i in positions]
        group_states = [states[i] for i in positions]
        mask = None if found_inf is None else (found_inf > 0).to(device=device, dtype=torch.float32)
        is_plain = group_states[0]["moment"].dtype == dtype and not (
            settings.cautious and settings.weight_decay
        )
        if is_plain and dtype in (torch.float32, torch.float64) and device.type in FUSED_DEVICES:
            _fused(weights, grads, group_states, settings, before + 1, mask)
        else:
            chosen = [names[i] for i in positions]
            places = None if parts is None else [parts[i] for i in positions]
            _in_chunks(weights, grads, group_states, settings, before + 1, mask, chosen, places)


def _fused(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[Mapping[str, Any]],
    s: AdamWSettings,
    now: int,
    mask: Tensor | None,
) -> None:
    # The kernel reads the step number only, so one tensor serves all, and the count itself stays on the host.
    count = torch.full((), float(now), dtype=torch.float32, device=weights[0].device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        weights,
        gradients,
        [state["moment"] for state in states],
        [state["second_moment"] for state in states],
        [],
        [count] * len(weights),
        lr=s.lr,  # type: ignore[arg-type]
        beta1=s.betas[0],
        beta2=s.betas[1],
        weight_decay=s.weight_decay,
        eps=s.eps_at(now),
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=mask,
    )


def _in_chunks(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[Mapping[str, Any]],
    s: AdamWSettings,
    now: int,
    mask: Tensor | None,
    names: list[str],
    parts: list[TensorPart] | None,
) -> None:
    """Step with an update in fp32 (fp64 for fp64 weights) that is formed, and rounded once to the weight's dtype.

    For what the fused kernel cannot do: half-precision weights, decay that depends on the update, bf16 moments.

    Chunks of flattened parameters take the step as one tensor each, so that the number of operators does not grow with
    the number of parameters, nor the temporary memory with their size.
    """
    device, dtype = weights[0].device, weights[0].dtype
    moments = [state["moment"] for state in states]
    seconds = [state["second_moment"] for state in states]
    has_lost = s.rounding.mode == "kahan" and "compensation" in states[0]
    lost = [state["compensation"] for state in states] if has_lost else None
    stored = [weights, moments, seconds, *([] if lost is None else [lost])]
    bias1, bias2 = 1.0 - s.betas[0] ** now, math.sqrt(1.0 - s.betas[1] ** now)
    masked = None if mask is None else mask.reshape(()) > 0
    random_bits = s.rounding.streams(device, names, now) if s.rounding.needs_bits(dtype) else None
    compute = compute_dtype(weights[0])
    limit = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    for chunk in _chunks(stored, limit):
        weight = _joined(weights, chunk)
        moment, second = _joined(moments, chunk).to(compute), _joined(seconds, chunk).to(compute)
        gradient = _joined(gradients, chunk).to(compute)
        first = torch.lerp(moment, gradient, 1.0 - s.betas[0])
        squares = torch.addcmul(s.betas[1] * second, gradient, gradient, value=1.0 - s.betas[1])
        direction = first / bias1 / (squares.sqrt() / bias2 + s.eps_at(now))
        wide = weight.to(compute)
        decay = s.weight_decay * wide
        if s.cautious and s.weight_decay:
            decay = torch.where(torch.sign(wide) * torch.sign(direction) >= 0, decay, 0.0)
        change = -s.lr * (direction + decay)
        if lost is not None:
            before = _joined(lost, chunk)
            result, after = compensated(weight, change, before)
            _commit(lost, chunk, before, after, masked)
        elif random_bits is not None:
            bits = [random_bits[piece.tensor].draw(piece.end - piece.start) for piece in chunk]
            result = stochastic_bf16(wide + change, torch.cat(bits))
        else:
            result = (wide + change).to(dtype)
        _commit(weights, chunk, weight, result, masked)
        if parts is not None and moments[0].dtype != compute:
            places = [(names[piece.tensor], parts[piece.tensor], piece) for piece in chunk]
            first = _rounded(first, places, "moment", now, s.rounding.seed)
            squares = _rounded(squares, places, "second_moment", now, s.rounding.seed)
            moment, second = moment.to(first.dtype), second.to(first.dtype)
        _commit(moments, chunk, moment, first, masked)
        _commit(seconds, chunk, second, squares, masked)


def _rounded(
    value: Tensor, places: Sequence[tuple[str, TensorPart, _Piece]], kind: str, now: int, seed: int
) -> Tensor:
    """Return the new numbers of a chunk of moments in bf16, rounded as `optimizers.stored_moments` says."""
    bits = []
    for name, part, piece in places:
        key = rounding_key(seed, name, now - 1, kind)
        numbers = part.numbers(piece.start, piece.end, value.device)
        bits.append(random_bits([key], numbers, piece.end - piece.start, value.device)[0])
    return stochastic_bf16(value.float(), torch.cat(bits).view(value.shape))


class _Piece(NamedTuple):
    """Elements [start, end) of the flattened parameter at position `tensor`."""

    tensor: int
    start: int
    end: int


def _chunks(stored: Sequence[list[Tensor]], limit: int) -> Iterator[list[_Piece]]:
    """Yield lists of pieces that cover all parameters in order, with at most `limit` elements in each list.

    A tensor whose memory is not in the order of its elements has no flat views to write to: it stays whole.
    """
    chunk: list[_Piece] = []
    room = limit
    for i, weight in enumerate(stored[0]):
        is_flat = all(tensors[i].is_contiguous() for tensors in stored)
        start, size = 0, weight.numel()
        while start < size:
            if not is_flat and chunk and size > room:
                yield chunk
                chunk, room = [], limit
            end = min(size, start + room) if is_flat else size
            chunk.append(_Piece(i, start, end))
            room -= end - start
            start = end
            if room <= 0:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def _joined(tensors: Sequence[Tensor], chunk: Sequence[_Piece]) -> Tensor:
    """Return the elements of a chunk, 1-D; a single piece is a view of its tensor where it can be."""
    parts = [tensors[piece.tensor].reshape(-1)[piece.start : piece.end] for piece in chunk]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _commit(
    targets: Sequence[Tensor], chunk: Sequence[_Piece], old: Tensor, new: Tensor, masked: Tensor | None
) -> None:
    """Write the new elements of a chunk into the tensors; the old ones where the step is masked."""
    new = new if masked is None else torch.where(masked, old, new)
    parts = new.split([piece.end - piece.start for piece in chunk])
    places = []
    for piece, part in zip(chunk, parts):
        target = targets[piece.tensor]
        places.append(
            (target.view(-1)[piece.start : piece.end], part)
            if target.is_contiguous()
            else (target, part.view(target.shape))
        )
    torch._foreach_copy_([place for place, _ in places], [part for _, part in places])  # pyright: ignore[reportPrivateImportUsage]
