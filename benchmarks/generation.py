"""Tokens per second of greedy decoding against `transformers` ``generate`` on the same prompts, by default llama_9m.

    python benchmarks/generation.py                       # seconds on a CPU
    python benchmarks/generation.py --model llama_60m --device cuda --precision bf16

Prompts have the lengths of GSM8K's questions, roughly: log-normal around 60 tokens. Peers are `generate` on batches of
the same size in the order of the data, and on one prompt at a time. All take turns; the ratio of every round is
printed, then the median. The tokens are compared, too: all three decode each prompt to the same ones up to rounding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from harness import engines, model
from harness.config import checks, compose
from harness.tasks.generation import generate

Answers = list[list[int]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print tokens per second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="llama_9m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    config = checks.check(
        compose.load([f"model={arguments.model}", f"precision={arguments.precision}"]), {}, 0
    )
    engine = engines.start(config)
    if engine.device.type != torch.device(arguments.device).type:
        raise SystemExit(f"this process' device is {engine.device}, not {arguments.device}")
    network: Any = model.build(config.model, seed=0).to(engine.device)
    engine.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
    vocabulary = int(network.config.vocab_size)
    prompts = _prompts(arguments.prompts, vocabulary)
    # Random weights hardly ever give a certain token, so that answers have all their tokens.
    eos = vocabulary - 1

    def peer(rows: list[list[int]]) -> Answers:
        """Decode batches as they are, each padded to its longest prompt."""
        settings = GenerationConfig(
            max_new_tokens=arguments.new, do_sample=False, eos_token_id=eos, pad_token_id=0, use_cache=True
        )
        found: Answers = []
        network.eval()
        for row in rows:
            width = max(len(prompts[index]) for index in row)
            ids = torch.zeros(len(row), width, dtype=torch.int64, device=engine.device)
            mask = torch.zeros_like(ids)
            for place, index in enumerate(row):
                ids[place, width - len(prompts[index]) :] = torch.from_numpy(prompts[index])
                mask[place, width - len(prompts[index]) :] = 1
            with engine.autocast():
                out = network.generate(ids, attention_mask=mask, generation_config=settings)
            found += [_until(row, eos) for row in out[:, width:].tolist()]
        return found

    def ours() -> Answers:
        return generate(
            engine, network, prompts, max_new_tokens=arguments.new, eos_id=eos, batch_size=arguments.batch
        )

    order = list(range(len(prompts)))
    batches = [order[first : first + arguments.batch] for first in range(0, len(order), arguments.batch)]
    variants: dict[str, Callable[[], Answers]] = {
        "ours": ours,
        "transformers, same batch size": lambda: peer(batches),
        "transformers, one at a time": lambda: peer([[index] for index in order]),
    }
    _compare(variants, arguments.rounds)
    engine.close()


def _until(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos)] if eos in row else row


def _compare(variants: dict[str, Callable[[], Answers]], rounds: int) -> None:
    answers = {name: decode() for name, decode in variants.items()}  # also warms up
    tokens = sum(map(len, answers["ours"]))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, decode in variants.items():
            start = time.perf_counter()
            decode()
            seconds[name].append(time.perf_counter() - start)
    own = seconds["ours"]
    for name, times in seconds.items():
        same = sum(a == b for a, b in zip(answers[name], answers["ours"])) / len(answers[name])
        ratios = [t / o for t, o in zip(times, own)]
        print(
            f"{name}: {tokens / statistics.median(times):,.0f} tokens/s, ours is {statistics.median(ratios):.2f} times "
            f"as fast ({', '.join(f'{ratio:.2f}' for ratio in ratios)}); {same:.0%} of the answers are equal"
        )


def _prompts(count: int, vocabulary: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(generator.normal(np.log(60), 0.4, count)).astype(int), 8, 250)
    return [generator.integers(0, vocabulary - 1, length) for length in lengths]


if __name__ == "__main__":
    main()
