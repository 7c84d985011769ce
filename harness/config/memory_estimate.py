"""Estimate the device memory of a run in closed form, and choose engine and micro-batch by it. Torch-free.

`optbench plan` counts by running the code on meta tensors, which takes seconds and torch. This estimate only has the
configuration, so that every command and every process can check a run in a millisecond. It is meant to be above the
plan, by a few percent for LLaMA-like models (`tests/harness/config/test_memory_estimate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from harness.config.model_facts import (
    ModelFacts,
    facts,
    parameter_count,
    router_coefficient,
    trained_parameters,
)
from harness.config.schema import PARTITIONED, SHARDED, RunConfig
from harness.errors import InputError

CONTEXT_BYTES = 1.5e9
"""Outside of torch's allocator, an assumption: CUDA context and kernels 0.5 GB, cuBLAS and cuSOLVER workspaces, NCCL's
buffers up to 1 GB."""
FRAGMENTATION = 0.05
"""Share of the peak that the allocator reserves and cannot give to a tensor; an assumption."""
RESERVE = 0.95
"""Share of a device's memory that a run may plan with."""
_HALF = ("bf16", "fp16", "bf16_pure")


def needed_bytes(peak: float) -> int:
    """Return the device memory for a peak of tensors: with context, fragmentation and a reserve."""
    return round((peak * (1 + FRAGMENTATION) + CONTEXT_BYTES) / RESERVE)


class Choice(NamedTuple):
    """How a run could use its devices."""

    engine: str
    micro_batch_size: int
    activation_checkpointing: bool

    def keys(self, asked: Choice) -> str:
        """Return the keys to type in place of another choice."""
        parts = [f"engine={self.engine}"] if self.engine != asked.engine else []
        if self.micro_batch_size != asked.micro_batch_size:
            parts.append(f"micro_batch_size={self.micro_batch_size}")
        if self.activation_checkpointing and not asked.activation_checkpointing:
            parts.append("model.activation_checkpointing=full")
        return " ".join(parts)


def choose(config: RunConfig, options: Mapping[str, Any], world_size: int, memory: int) -> Choice:
    """Choose the engine, where it is ``auto``, and the micro-batch, where it is not given.

    The first of these that fits: `ddp` (or `single`), then `fsdp2`; each with all of a process' sequences at once, else
    with the largest power of two that divides them.

    Args:
        config: as composed, with its precision resolved.
        options: of the optimizer, resolved.
        world_size: processes of the run; divides the batch.
        memory: bytes of the smallest device.

    Raises:
        InputError: the engine is ``auto``, and nothing fits; the error names what would.
    """
    asked = _asked(config, world_size)
    engines = _automatic_engines(world_size) if config.engine.name == "auto" else (config.engine.name,)
    micro_batches = _micro_batches(config, world_size)
    for engine in engines:
        for micro in micro_batches:
            choice = Choice(engine, micro, config.model.activation_checkpointing == "full")
            if needed_by(config, options, world_size, choice) <= memory:
                return choice
    if config.engine.name != "auto":
        return Choice(engines[0], micro_batches[-1], config.model.activation_checkpointing == "full")
    raise _too_large(config, options, world_size, memory, asked)


def warning(config: RunConfig, memory: int) -> str | None:
    """Return a line that says that a checked run probably does not fit; None if it does.

    Args:
        config: checked.
        memory: bytes of the smallest device.
    """
    assert config.world_size is not None
    assert config.micro_batch_size is not None
    asked = Choice(
        config.engine.name, config.micro_batch_size, config.model.activation_checkpointing == "full"
    )
    needed = needed_by(config, config.optimizer.options, config.world_size, asked)
    if needed <= memory:
        return None
    found = _fitting(config, config.optimizer.options, config.world_size, memory, asked)
    advice = f"; {found.keys(asked)} would fit" if found else ""
    return (
        f"engine.name: {config.engine.name} needs about {needed / 1e9:.0f} GB of device memory, and the smallest GPU "
        f"has {memory / 1e9:.0f} GB{advice}"
    )


def needed_by(config: RunConfig, options: Mapping[str, Any], world_size: int, choice: Choice) -> int:
    """Return the device memory of a run on another engine, micro-batch and checkpointing, with the margin, bytes."""
    return needed_bytes(max(_peaks(config, options, world_size, choice)))


def peak_bytes(config: RunConfig) -> float:
    """Return the peak of a checked run's tensors on each process, without the margin of devices, bytes."""
    assert config.world_size is not None
    assert config.micro_batch_size is not None
    saves = config.model.activation_checkpointing == "full"
    choice = Choice(config.engine.name, config.micro_batch_size, saves)
    return max(_peaks(config, config.optimizer.options, config.world_size, choice))


def _peaks(config: RunConfig, options: Mapping[str, Any], world_size: int, choice: Choice) -> Iterator[float]:
    """Yield the bytes of the start, of a step's forward and backward pass, and of a refresh."""
    shapes = facts(config.model)
    total, trained = parameter_count(config.model), trained_parameters(config.model)
    hidden, layers = shapes.hidden_size or 0, shapes.layers or 1
    tables = 2 * (shapes.vocab_size or 0) * hidden
    layer = max(0, total - tables) / layers
    width = 2 if config.precision in _HALF else 4
    stored = 2 if config.precision == "bf16_pure" else 4
    shards = world_size if choice.engine in (*SHARDED, *PARTITIONED) else 1
    if choice.engine == "hsdp":
        shards //= config.engine.replicas or 1
    state, basis = _state(config, shapes, options, trained)
    state_here = state / shards + (basis if choice.engine in SHARDED else basis / shards)
    weights = total * stored / shards
    gradients = trained * stored / shards
    buffers, workspace = 0.0, 8 * layer
    if choice.engine in SHARDED or choice.engine == "zero3":
        # Gathered: two layers and what is outside of them; whole gradients of one of these, and its fp32 copy.
        buffers = (tables + 2 * layer) * width + max(tables, tables / 2 + layer) * (width + 4)
        workspace = 2.5 * basis + 4 * layer
        if choice.engine == "zero3":
            # Shards to compute with, masters, and parameters that are small enough to stay whole.
            weights = (total * width + trained * 4) / shards + 2e5 * width * layers
    elif choice.engine in PARTITIONED:
        weights = total * width + trained * 4 / shards
        gradients = trained * width if choice.engine == "zero1" else trained * 4 / shards
        buffers = 5e8 * width + (4 * min(5e8, total) if width == 2 else 0)
    else:
        buffers = tables / 2 * 4
        if config.precision in ("bf16", "fp16"):
            buffers += 2 * (total - tables / 2)  # autocast's copies
    held = weights + gradients + state_here
    # Random weights are made in place, parameter by parameter; those of a folder are whole at first.
    is_whole_first = shards > 1 and config.model.path is not None
    made = total * stored if is_whole_first else max(tables / 2, layer) * 4
    yield weights + state_here + made + (0 if shards > 1 else gradients)
    yield held + buffers + _activations(config, shapes, choice)
    yield held + workspace


def _state(
    config: RunConfig, shapes: ModelFacts, options: Mapping[str, Any], total: int
) -> tuple[float, float]:
    """Return the bytes of the optimizer's state without bases, and of the bases of its subspaces."""
    from optimizers.presets import load_rule, preset
    from optimizers.rule_options import stores_in_half

    def width(kind: str) -> float:
        return 2.0 if stores_in_half(kind, options) else 4.0

    adamw = 2 * width("moment")
    average = 0.0 if options.get("average_decay") is None else 4.0 * total
    if config.optimizer.target is not None or config.optimizer.name == "adamw" or shapes.matrices is None:
        return adamw * total + average, 0.0
    rule = load_rule(preset(config.optimizer.name).rule)
    layers = shapes.layers or 1
    sizes = {"basis": 0.0, "other": 0.0}
    covered = 0
    for rows, columns in (shapes.for_rule(options).matrices or {}).values():
        covered += rows * columns
        for kind, size in rule.state((rows, columns), options).items():
            count = 1
            for side in size:
                count *= side
            sizes["basis" if kind == "basis" else "other"] += count * width(kind)
    rest = max(0, total - covered * layers)
    return layers * sizes["other"] + adamw * rest + average, layers * sizes["basis"]


def _activations(config: RunConfig, shapes: ModelFacts, choice: Choice) -> float:
    """Return the bytes that a micro-batch keeps for the backward pass, with its logits.

    Per token, a layer of width h and inner width i keeps, in numbers: fp32 copies of the inputs of both norms, what
    these return, q, k, v, the attention's output, and four tensors of width i. `optbench plan` counts 44h + 16i bytes
    in fp32, 26h + 8i with half-precision weights, and 36h + 8i under autocast, whose residual stream is fp32.
    """
    hidden, layers = shapes.hidden_size or 0, shapes.layers or 1
    inner = max((max(size) for size in (shapes.matrices or {}).values()), default=4 * hidden)
    is_half = config.precision in _HALF
    casts = config.precision in ("bf16", "fp16") and choice.engine not in (*SHARDED, *PARTITIONED)
    per_layer = (36 if casts else 26 if is_half else 44) * hidden + (8 if is_half else 16) * inner
    if config.model.attention == "eager":
        # Scores, their softmax in fp32 and its copy.
        per_layer += 3 * 4 * (shapes.heads or 1) * config.seq_len
    if choice.activation_checkpointing:
        kept = per_layer + layers * hidden * (2 if is_half and not casts else 4)
    else:
        kept = per_layer * layers
    tokens = choice.micro_batch_size * config.seq_len
    return tokens * kept + _loss(config, shapes, tokens, is_half)


def _loss(config: RunConfig, shapes: ModelFacts, tokens: int, is_half: bool) -> float:
    """Return the bytes of whole logits, or of a chunk with the gradients of the hidden states and of the head."""
    vocabulary, hidden = shapes.vocab_size or 0, shapes.hidden_size or 0
    whole = tokens * vocabulary * (16.0 if is_half else 12.0)
    chunk = config.model.loss_chunk
    if chunk is None:
        return whole
    # Automatic: 256 MiB of fp32 logits, at least 1,024 tokens (`harness.model.linear_loss`).
    logits = max(2**28, 4096 * vocabulary) if chunk == "auto" else 4 * chunk * vocabulary
    return min(whole, 2.0 * logits + 8.0 * tokens * hidden + 4.0 * vocabulary * hidden)


def _asked(config: RunConfig, world_size: int) -> Choice:
    engine = _automatic_engines(world_size)[0] if config.engine.name == "auto" else config.engine.name
    micro = config.micro_batch_size or config.batch_size // world_size
    return Choice(engine, micro, config.model.activation_checkpointing == "full")


def _automatic_engines(world_size: int) -> tuple[str, ...]:
    return ("single",) if world_size == 1 else ("ddp", "fsdp2")


def _micro_batches(config: RunConfig, world_size: int) -> list[int]:
    """Return the micro-batches to choose from, the largest first."""
    if config.micro_batch_size is not None:
        return [config.micro_batch_size]
    whole = config.batch_size // world_size
    # The routers' loss depends on the cut into passes: there the memory of a machine must not decide.
    if router_coefficient(config.model):
        return [whole]
    powers = [1 << k for k in range(whole.bit_length()) if whole % (1 << k) == 0]
    return list(dict.fromkeys([whole, *reversed(powers)]))


def _too_large(
    config: RunConfig, options: Mapping[str, Any], world_size: int, memory: int, asked: Choice
) -> InputError:
    least = min(
        needed_by(config, options, world_size, Choice(engine, micro, asked.activation_checkpointing))
        for engine in _automatic_engines(world_size)
        for micro in _micro_batches(config, world_size)
    )
    reason = (
        f"finds no engine for the {memory / 1e9:.0f} GB of the smallest GPU: the run needs about {least / 1e9:.0f} GB "
        f"on each of {world_size} process(es)"
    )
    found = _fitting(config, options, world_size, memory, asked)
    remedy = found.keys(asked) if found else "more processes, a smaller seq_len or a smaller model"
    fix = f"{remedy}; engine={asked.engine} by name to try anyway (optbench plan says what takes the memory)"
    return InputError("engine.name", "auto", reason, fix=fix)


def _fitting(
    config: RunConfig, options: Mapping[str, Any], world_size: int, memory: int, asked: Choice
) -> Choice | None:
    """Return the choice that fits and changes least; a smaller micro-batch before checkpointing before the engine."""
    whole = config.batch_size // world_size
    smaller = [1 << k for k in range(whole.bit_length()) if whole % (1 << k) == 0]
    micro_batches = [asked.micro_batch_size, *reversed([m for m in smaller if m < asked.micro_batch_size])]
    if router_coefficient(config.model):
        micro_batches = [asked.micro_batch_size]
    for engine in dict.fromkeys([asked.engine, *_automatic_engines(world_size)]):
        for checkpoints in dict.fromkeys([asked.activation_checkpointing, True]):
            for micro in micro_batches:
                choice = Choice(engine, micro, checkpoints)
                if needed_by(config, options, world_size, choice) <= memory:
                    return choice
    return None
