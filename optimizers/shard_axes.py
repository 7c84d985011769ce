"""The axis along which to shard each parameter, by the bytes that the optimizer then sends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from optimizers import presets
from optimizers.groups import matrix_options, rule_name
from optimizers.layouts.layout import traffic
from optimizers.presets import resolve
from optimizers.routing import Modules, route


def possible_axis(axis: int, shape: Sequence[int], ranks: int) -> int:
    """Return `axis` if torch can shard it over `ranks`, else 0, because torch refuses uneven shards along axis 1."""
    return axis if axis == 0 or (axis < len(shape) and shape[axis] % ranks == 0) else 0


def preferred_axes(
    name: str,
    named_parameters: Iterable[tuple[str, Tensor]],
    ranks: int,
    *,
    modules: Modules | None = None,
    **hyper: Any,
) -> dict[str, int]:
    """Parameter → axis along which an optimizer sends least, for `fully_shard`'s shard_placement_fn.

    Axis 1 is only chosen where it divides evenly (torch refuses it otherwise) and is strictly cheaper.

    Args:
        name: preset or rule.
        named_parameters: of the whole model.
        ranks: over which one replica is cut.
        modules: the model, for routing by module type.
        hyper: options of the optimizer, as for `optimizers.build`.
    """
    pairs = [(n, p) for n, p in named_parameters if p.requires_grad]
    options = resolve(name, {key: value for key, value in hyper.items() if value is not None})
    rule_id = rule_name(name)
    axes = {n: 0 for n, _ in pairs}
    if rule_id == "adamw":
        return axes
    rule, group_options = presets.load_rule(rule_id), matrix_options(options)
    chosen = options.get("matrix_modules")
    for routed in route(pairs, rule_id, modules, by_head=bool(options.get("split_heads")), chosen=chosen):
        if routed.rule == "adamw" or len(routed.shape) != 2 or not possible_axis(1, routed.shape, ranks):
            continue
        rows, columns = (
            sum(traffic(rule, block.shape, axis, group_options, ranks)[0] for block in routed.blocks)
            for axis in (0, 1)
        )
        axes[routed.name] = int(columns < rows)
    return axes
