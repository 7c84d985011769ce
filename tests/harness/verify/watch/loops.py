"""Small models and plain training loops for the tests of `watch`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from harness.audit import Report, watch

WIDTH, BATCH, UPDATES = 24, 32, 4


class Net(nn.Module):
    """An embedding, a fused QKV, two ordinary matrices, a norm and a head; no two shapes are alike."""

    def __init__(self, width: int = WIDTH, hidden: int = 52) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.num_heads, self.embed_dim = 2, width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.lm_head(self.norm(x + self.down(self.up(x).tanh())))


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """Return the model, with weights so far from tied that every gradient has full rank."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def batches(count: int = UPDATES, seed: int = 1) -> list[Tensor]:
    """Return token ids (32, 12) in sequences that have something to learn."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 16, (count, BATCH, 1), generator=generator)
    starts = torch.randint(0, 16, (count, BATCH, 1), generator=generator)
    return list((starts + steps * torch.arange(12)) % 16)


def loss_of(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Return the loss of the next token."""
    logits = model(ids[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return hidden matrices, and the rest."""
    hidden = [
        p for name, p in model.named_parameters() if any(part in name for part in ("qkv", "up", "down"))
    ]
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in model.parameters() if id(p) not in chosen]


def train(
    model: nn.Module,
    optimizers: Any,
    data: Iterable[Tensor],
    max_norm: float | None = None,
    accumulation: int = 1,
    scheduler: Any = None,
    call: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Train as a plain loop does: micro-batches, clipping, the steps of all optimizers, the schedule."""
    several: Sequence[Any] = optimizers if isinstance(optimizers, list) else [optimizers]
    for ids in data:
        for part in ids.chunk(accumulation):
            (loss_of(call or model, part) / accumulation).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for optimizer in several:
            optimizer.step()
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def watched(
    model: nn.Module,
    optimizers: Any,
    *,
    data: Iterable[Tensor] | None = None,
    loop: Any = None,
    **options: Any,
) -> Report:
    """Train under `watch` and return its report."""
    arguments = dict(loop or {})
    with watch(model, optimizers, quiet=True, **options) as report:
        train(model, optimizers, batches() if data is None else data, **arguments)
    return report


def names(report: Report) -> list[str]:
    """Return the names of the defects."""
    return [finding.name for finding in report.defects]


def weights(model: nn.Module, optimizers: Any, watching: bool, **loop: Any) -> list[Tensor]:
    """Return the weights after training, with or without `watch`."""
    with watch(model, optimizers, quiet=True) if watching else nullcontext():
        train(model, optimizers, batches(6), **loop)
    return [p.detach().clone() for p in model.parameters()]
