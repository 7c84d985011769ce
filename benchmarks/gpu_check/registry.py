"""The stages of the GPU check, in the order in which they run: what decides most comes first."""

from __future__ import annotations

from benchmarks.gpu_check.runner import Stage

_PLACE = "benchmarks.gpu_check.stages"

STAGES = (
    Stage("environment", "Environment", f"{_PLACE}.environment:run", 30),
    Stage("tests", "Tests that need a GPU", f"{_PLACE}.marked_tests:run", 150),
    Stage("presets", "Twenty steps of every preset", f"{_PLACE}.presets:run", 180),
    Stage("polar", "Polar factors", f"{_PLACE}.polar_methods:run", 75),
    Stage("attention", "Attention kernels", f"{_PLACE}.attention:run", 120),
    Stage("memory", "Memory and time against the plan", f"{_PLACE}.memory:run", 75),
    Stage("step_time", "Step times against peers", f"{_PLACE}.step_times:run", 75),
    Stage("loss", "Loss in chunks and compiled graphs", f"{_PLACE}.loss_and_compile:run", 90),
    Stage("launching", "What the launcher decides", f"{_PLACE}.launching:run", 90),
    Stage("processes", "Two processes", f"{_PLACE}.processes:run", 240),
    Stage("features", "Other claims", f"{_PLACE}.features:run", 150),
)
