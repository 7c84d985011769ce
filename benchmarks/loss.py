"""Memory and time of a training step with the loss in chunks against whole logits, by default llama_60m at 8 × 512.

    python benchmarks/loss.py                     # peak bytes, counted on fake tensors: seconds, no memory needed
    python benchmarks/loss.py --time --rounds 7   # and seconds of forward and backward, interleaved
    python benchmarks/loss.py --time --device cuda --precision bf16

Bytes are those of all tensors that exist at once in forward and backward (torch's `MemTracker`), gradients included.
Times are taken in turns, a round of each: the ratio of every round is printed, then the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from harness import model
from harness.config.schema import ModelConfig

MODELS = Path(__file__).parents[1] / "configs" / "model"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> None:
    """Print peak bytes, and times where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--chunk", default="auto", help="tokens, or auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    chunk = arguments.chunk if arguments.chunk == "auto" else int(arguments.chunk)
    shape = (arguments.rows, arguments.seq_len)
    with (MODELS / f"{arguments.model}.yaml").open() as file:
        config = ModelConfig(**yaml.safe_load(file), loss_chunk=chunk)
    whole, chunked = (
        peak_bytes(config.model_copy(update={"loss_chunk": c}), shape, arguments.precision)
        for c in (None, chunk)
    )
    logits = shape[0] * shape[1] * config.config["vocab_size"] * 4
    size = f"{arguments.model}, {shape[0]} × {shape[1]} tokens, {arguments.precision}"
    print(f"{size}; fp32 logits {logits / 2**20:.0f} MiB")
    saved = f"less {(whole - chunked) / logits:.2f} × logits"
    print(f"peak bytes: whole {whole / 2**20:.0f} MiB, chunks {chunked / 2**20:.0f} MiB, {saved}")
    if arguments.time:
        time_steps(config, shape, arguments.precision, arguments.device, arguments.rounds)


def peak_bytes(config: ModelConfig, shape: tuple[int, int], precision: str) -> int:
    """Return the most bytes that exist at once in forward and backward of one micro-batch."""
    network, objective = _assemble(config, shape, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        batch = _batch(config, shape, "cpu")
        tracker = MemTracker()
        tracker.track_external(network)
        with tracker:
            _step(network, objective, batch, precision)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def time_steps(config: ModelConfig, shape: tuple[int, int], precision: str, device: str, rounds: int) -> None:
    """Print the seconds of a step with whole logits and with chunks, round by round."""
    variants = []
    for chunk in (None, config.loss_chunk):
        network, objective = _assemble(config.model_copy(update={"loss_chunk": chunk}), shape, device)
        variants.append((network, objective, _batch(config, shape, device)))
    ratios: list[float] = []
    for turn in range(rounds + 1):
        seconds: list[float] = []
        for network, objective, batch in variants:
            _synchronize(device)
            start = time.perf_counter()
            _step(network, objective, batch, precision)
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
        if turn:
            ratios.append(seconds[1] / seconds[0])
            print(f"whole {seconds[0]:.3f} s, chunks {seconds[1]:.3f} s, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")


def _assemble(
    config: ModelConfig, shape: tuple[int, int], device: str
) -> tuple[Any, model.CausalLMObjective]:
    network: Any = model.build(config, seed=0, device=device)
    for note in model.specialize(network, config, seq_len=shape[1], tokens=shape[0] * shape[1]):
        print(note)
    return network, model.CausalLMObjective(network, is_padded=False, loss_chunk=config.loss_chunk)


def _batch(config: ModelConfig, shape: tuple[int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = torch.randint(0, config.config["vocab_size"], (2, *shape), device=device)
    return ids, labels


def _step(network: Any, objective: model.CausalLMObjective, batch: Any, precision: str) -> None:
    network.zero_grad(set_to_none=True)
    device = batch[0].device.type
    with torch.autocast(device, dtype=HALF[precision]) if precision in HALF else nullcontext():
        outputs = network(**objective.inputs(batch))
    losses = objective.losses(outputs, batch)
    (losses.objective / batch[1].numel()).backward()


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
