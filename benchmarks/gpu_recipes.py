"""Tables of docs/gpus.md: memory and time of recipes for 1B and 7B on one and two nodes, as `optbench plan` gives them.

python -m benchmarks.gpu_recipes            # prints Markdown; a minute or two on one core
"""

from __future__ import annotations

import shlex
from typing import Any

from harness.config import checks, compose
from harness.config.schema import RunConfig
from harness.plan.command import device_name, size
from harness.plan.estimate import plan

COMMON = "seq_len=2048 batch_size=512"
RECIPES = {
    "1B, one node": "model=llama_1b",
    "1B, two nodes": "model=llama_1b world_size=16",
    "7B, one node": "model=llama_7b",
    "7B, one node, larger micro-batch": "model=llama_7b micro_batch_size=8 model.activation_checkpointing=full",
    "7B, two nodes": "model=llama_7b engine=hsdp engine.replicas=2 micro_batch_size=2 world_size=16",
    "7B, one node, sumo": "model=llama_7b optimizer=sumo",
    "7B, one node, muon": "model=llama_7b optimizer=muon",
}
DEVICE = "H100"
PHASES = ("build", "forward_backward", "optimizer_step", "refresh_step", "evaluation", "probes", "checkpoint")


def command(recipe: str) -> str:
    """Return what to type for a recipe."""
    keys = dict(word.split("=", 1) for word in shlex.split(recipe))
    processes = keys.pop("world_size", "8")
    given = " ".join(f"{key}={value}" for key, value in keys.items())
    return f"optbench plan {given} {COMMON} --world-size {processes} --device {DEVICE}"


def planned(recipe: str) -> tuple[RunConfig, dict[str, Any]]:
    """Return the checked configuration of a recipe and its plan."""
    keys = ["wandb.mode=disabled", *shlex.split(COMMON), *shlex.split(recipe)]
    if "world_size=" not in recipe:
        keys.append("world_size=8")
    memory = size("--memory", "80GB")
    config = compose.load(keys)
    assert config.world_size is not None
    config = checks.check(config, {}, config.world_size, memory=memory)
    return config, plan(config, memory, device=device_name(DEVICE))


def main() -> None:
    """Print the commands, then one table of choices and phases and one of the bytes by kind."""
    plans = {name: planned(recipe) for name, recipe in RECIPES.items()}
    for recipe in RECIPES.values():
        print(command(recipe))
    kinds = list(dict.fromkeys(kind for _, found in plans.values() for kind in found["per_rank"]))
    columns = ["recipe", "engine", "micro-batch", "needs, GB", "s a step", "tokens/s", *PHASES]
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name, (config, found) in plans.items():
        time = found["step_time_s"][DEVICE]
        cells = [
            name,
            config.engine.name,
            str(config.micro_batch_size),
            f"{found['needed_bytes'] / 1e9:.0f}",
            f"{time['total']:.1f}; {time['expected_from']:.1f} to {time['expected_to']:.1f}",
            f"{time['expected_tokens_per_s_from'] / 1e3:.0f}k to {time['expected_tokens_per_s_to'] / 1e3:.0f}k",
            *(f"{found['phases'][phase]['total_bytes'] / 1e9:.1f}" for phase in PHASES),
        ]
        print("| " + " | ".join(cells) + " |")
    print("\n| kind, GB | " + " | ".join(plans) + " |\n|" + "---|" * (1 + len(plans)))
    for kind in kinds:
        sizes = (found["per_rank"].get(kind, 0) / 1e9 for _, found in plans.values())
        print(f"| {kind} | " + " | ".join(f"{value:.2f}" for value in sizes) + " |")


if __name__ == "__main__":
    main()
