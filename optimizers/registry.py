"""From names to optimizers and rules: presets, rules of other packages, and any torch optimizer by import
path."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from optimizers.classes import CLASSES
from optimizers.optimizer import Optimizer
from optimizers.options import OptionError
from optimizers.presets import names, preset
from optimizers.routing import Modules


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
    """The optimizer of this name over a model's parameters.

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
        work: "replicated" or "split": whether each of the replicas computes every matrix, or its share.
        hyper: options of the preset (`optimizers.resolve`). A value of None for `lr` means the preset's.

    Raises:
        OptionError: unknown name or option, bad value, rank larger than a matrix side, no hidden matrix.
    """
    pairs = list(named_parameters)
    if name not in names() and "." in name:
        return plugin(name)([p for _, p in pairs if p.requires_grad], **hyper)
    chosen = preset(name)
    if hyper.get("lr", 0.0) is None:
        hyper = {key: value for key, value in hyper.items() if key != "lr"}
    kind = CLASSES.get(chosen.rule, Optimizer)
    return kind(
        pairs, preset=name, modules=modules, process_group=process_group, layout=layout, work=work, **hyper
    )


@lru_cache(maxsize=64)
def plugin(target: str) -> type[torch.optim.Optimizer]:
    """The torch.optim.Optimizer class at an import path such as ``pytorch_optimizer.SOAP``.

    Raises:
        OptionError: not importable, or no torch.optim.Optimizer.
    """
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise OptionError("target", target, "is no import path", ("package.module.Class",))
    try:
        found = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            "target", target, f"cannot be imported ({error})", ("package.module.Class",)
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise OptionError("target", target, "is no torch.optim.Optimizer", ("package.module.Class",))
    return found
