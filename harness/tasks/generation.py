"""Batched greedy decoding on every engine, by `transformers`' own ``generate``.

What a prompt gives depends on the prompts and the batch size alone: prompts are sorted by length and cut into batches
before the batches are dealt out, so that one process and several compute the same padded batches. Where weights are
gathered in forward passes, each of those is a collective. There all processes decode in rounds, one batch each, until
the last of them is done (``synced_gpus``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from harness.model.attention import CAUSAL
from harness.model.attention_logits import CLIPPED
from harness.protocols import Engine

Ids = NDArray[np.int64]
Decode = Callable[[Sequence[Sequence[int]]], list[str]]
"""From the tokens of several answers to their texts, without special tokens."""


@torch.no_grad()
def generate(
    engine: Engine,
    model: nn.Module,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    eos_id: int,
    batch_size: int,
    stop: Sequence[str] = (),
    decode: Decode | None = None,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, on every process (a collective).

    Args:
        engine: that holds the model.
        model: a `transformers` causal language model.
        prompts: at least one token each, the same on every process.
        max_new_tokens: of an answer at most; longer ones are cut.
        eos_id: token that ends an answer.
        batch_size: prompts of a forward pass on one process.
        stop: texts that end an answer, too.
        decode: for ``stop``.

    Returns:
        New tokens by prompt, without eos. With ``stop`` they may end in the middle of such a text or after it
        (`cut_at`).
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    # Zero is nothing, so that a sum over the processes brings the rows together.
    found = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)
    # Rows that ended, also by a text, are filled with eos.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    try:
        with engine.inference(), _decoding(model):
            for first in range(0, len(batches), engine.world_size):
                mine = first + engine.rank
                if mine >= len(batches) and engine.forward_is_local:
                    break
                # A process without a batch joins the others' forward passes with a row of theirs.
                rows = batches[mine] if mine < len(batches) else batches[first][:1]
                ids, mask = _left_padded([prompts[row] for row in rows], eos_id, engine.device)
                criteria = StoppingCriteriaList()
                if stop and decode is not None:
                    criteria.append(_StopTexts(stop, decode, ids.shape[1], eos_id))
                with engine.autocast():
                    network: Any = model
                    sequences = network.generate(
                        ids,
                        attention_mask=mask,
                        generation_config=settings,
                        stopping_criteria=criteria,
                        synced_gpus=engine.world_size > 1 and not engine.forward_is_local,
                    )
                if mine < len(batches):
                    answers = sequences[:, ids.shape[1] :].cpu()
                    ended = (answers == eos_id).long().cumsum(1) > 0
                    found[rows, : answers.shape[1]] = torch.where(ended, 0, answers + 1)
    finally:
        model.train(was_training)
    total = engine.sum(found.to(engine.device)).cpu() - 1
    return [[token for token in row if token >= 0] for row in total.tolist()]


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end an answer."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]


class _StopTexts(StoppingCriteria):
    """End rows whose new tokens hold one of some texts.

    Not `StopStringCriteria` of `transformers`: it also looks at the prompt, whose end may be half of such a text.

    Args:
        stop: the texts.
        decode: from tokens to texts.
        start: width of the prompts.
        eos_id: token that ends a row.
    """

    def __init__(self, stop: Sequence[str], decode: Decode, start: int, eos_id: int) -> None:
        self._stop, self._decode, self._start, self._eos = stop, decode, start, eos_id
        # A token is a byte at least; one more, because decoders may drop white space in front.
        self._tokens = max(len(word.encode()) for word in stop) + 1

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        new = input_ids[:, max(self._start, input_ids.shape[1] - self._tokens) :].tolist()
        texts = self._decode([[token for token in row if token != self._eos] for row in new])
        ended = [any(word in text for word in self._stop) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _left_padded(rows: Sequence[Ids], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and attention mask, ``(rows, longest)`` int64: the last token of each row is real."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, values in enumerate(rows):
        ids[row, width - len(values) :] = values
        mask[row, width - len(values) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


@contextmanager
def _decoding(model: Any) -> Iterator[None]:
    """Let a model decode inside the context: with masks, without compiling, by no settings but those it is given."""
    config, attention = model.generation_config, model.config._attn_implementation
    is_causal = attention in (CAUSAL, CLIPPED)
    # What a model's author thought best for chats (sampling, penalties) would fill what greedy decoding leaves open.
    model.generation_config = GenerationConfig()
    if is_causal:
        # These know no padding on the left.
        model.set_attn_implementation("sdpa")
    try:
        # Each new token is another shape, which compiled layers would compile anew.
        with torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext():
            yield
    finally:
        model.generation_config = config
        if is_causal:
            model.set_attn_implementation(attention)


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())
