"""Optimizers by the names that people import or write: SUMO, GaLore, Muon, AdamW; presets, plug-ins, import paths."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from optimizers.optimizer import Optimizer
from optimizers.options import OptionError
from optimizers.presets import names, preset
from optimizers.routing import Modules


class SUMO(Optimizer):
    """SUMO (Refael et al. 2025, arXiv 2505.24749); preset "sumo" unless another of its presets is named."""

    default_preset = "sumo"


class GaLore(Optimizer):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507)."""

    default_preset = "galore"


class Muon(Optimizer):
    """Muon (Jordan et al. 2024); preset "muon" unless another of its presets is named."""

    default_preset = "muon"


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    default_preset = "adamw"


CLASSES: dict[str, type[Optimizer]] = {"sumo": SUMO, "galore": GaLore, "muon": Muon, "adamw": AdamW}


def build(
    name: str,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    modules: Modules | None = None,
    process_group: Any = None,
    layout: str | None = None,
    work: str = "replicated",
    **hyper: Any,
) -> torch.optim.Optimizer:
    """Build the optimizer of this name over a model's parameters.

    Args:
        name: a preset, a rule that another package brings (`optimizers.names()`), or the import path of a
            torch.optim.Optimizer, which then gets all parameters and `hyper` as they are.
        named_parameters: (name, parameter), as `model.named_parameters()` gives them. Parameters that do not
            require gradients are left out.
        modules: the model, or its (name, module) pairs; decides what is an embedding, a head or a hidden
            matrix. Without it names and ndim decide.
        process_group: the processes that hold equal replicas of the parameters (DDP); None: this process
            alone, also where torch.distributed is initialized.
        layout: "partitioned" where DeepSpeed's ZeRO-1, 2 or 3 is about to cut the parameters up; see `Optimizer`.
        work: "replicated" (each replica computes every matrix) or "split" (each computes its share).
        hyper: options of the preset (`optimizers.resolve`). A value of None for `lr` means the preset's.

    Raises:
        OptionError: unknown name or option, bad value, rank larger than a matrix side, no hidden matrix.
    """
    pairs = list(named_parameters)
    if name not in names() and "." in name:
        return plugin(name)([p for _, p in pairs if p.requires_grad], **hyper)
    rule = preset(name).rule
    if hyper.get("lr", 0.0) is None:
        hyper = {key: value for key, value in hyper.items() if key != "lr"}
    kind = CLASSES.get(rule, Optimizer)
    return kind(
        pairs, preset=name, modules=modules, process_group=process_group, layout=layout, work=work, **hyper
    )


@lru_cache(maxsize=64)
def plugin(target: str) -> type[torch.optim.Optimizer]:
    """Return the torch.optim.Optimizer class at an import path such as ``pytorch_optimizer.SOAP``.

    Raises:
        OptionError: not importable, or no torch.optim.Optimizer.
    """
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise OptionError("target", target, "is not an import path", ("package.module.Class",))
    try:
        loaded = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            "target", target, f"cannot be imported ({error})", ("package.module.Class",)
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, torch.optim.Optimizer)):
        raise OptionError("target", target, "is not a torch.optim.Optimizer", ("package.module.Class",))
    return loaded
