"""Environment variables that would change a run without any key saying so. No torch.

What a launcher tells its processes is checked in `launcher` and `engine_checks`; here is what torch and Accelerate read
by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.config.schema import RunConfig
from harness.errors import InputError

_ON = ("1", "true", "yes", "y", "on", "t")

_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "asks for Megatron-LM, which is not supported",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "asks for tensor or context parallelism, which is not supported",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "computes fp32 products in TF32 (three digits)",
}
"""Switch → what it does when it is on."""


def check(config: RunConfig, environ: Mapping[str, str]) -> None:
    """Refuse variables that change what is trained and that no key of the run names.

    Args:
        config: as composed.
        environ: of this process.

    Raises:
        InputError: the first such variable; the fix unsets it.
    """
    for variable, effect in _REFUSED.items():
        if environ.get(variable, "").lower() in _ON:
            _refuse(variable, environ, effect)
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", "none", ""):
        _refuse("ACCELERATE_DYNAMO_BACKEND", environ, "compiles the model", "model.compile=true")
    if config.model.compile:
        for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
            if environ.get(variable, "").lower() in _ON:
                _refuse(variable, environ, "turns model.compile=true off", "model.compile=false")
    accumulated = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulated.isdecimal() and accumulated != "1":
        effect = "asks for micro-batches that batch_size and micro_batch_size decide here"
        _refuse("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", environ, effect)
    if environ.get("NVIDIA_TF32_OVERRIDE", "") == "1":
        _refuse("NVIDIA_TF32_OVERRIDE", environ, "computes fp32 products in TF32 (three digits)")


def _refuse(variable: str, environ: Mapping[str, str], effect: str, instead: str | None = None) -> None:
    fix = f"unset {variable}" + (f", with {instead} in its place if it is meant" if instead else "")
    raise InputError(variable, environ[variable], f"in the environment {effect}", fix=fix)
