"""Decide which parameter takes which rule, and which matrices a fused projection consists of.

2-D weights of hidden linear layers take the matrix rule; embeddings, the output head, poolers, norms, biases and
whatever is not a matrix take AdamW. The types of modules decide if modules are passed, otherwise names and ndim
(`NAME_PATTERNS`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from optimizers.fused_projections import Block, split
from optimizers.module_patterns import first_match
from optimizers.options import OptionError

# Dotted-name components that mark a 2-D weight as no hidden matrix, for models whose modules are not given.
NAME_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"(embed|embedding|embeddings|embed_tokens|tok_embeddings|wte|wpe|word_embeddings)\w*", "embedding"),
    (r"(pos|position|positional|token_type)_?(emb|embed|embedding|embeddings|encoding)\w*", "embedding"),
    (r"(lm_head|head|output|output_layer|embed_out|classifier|score|unembed|unembedding)", "output head"),
    (r"(\w*norm\w*|ln|ln_\w+|\w+_ln|layernorm\w*|rmsnorm\w*)", "norm"),
    (r"(router|gate_network|wg)", "router"),
)

NOT_CHOSEN = "hidden matrix, not in matrix_modules"
"""Reason of the routes that `matrix_modules` left out."""

_CLASSIFIERS = ("classifier", "pre_classifier", "classification_head")
_HEADS = re.compile(NAME_PATTERNS[2][0])
_ROUTER_MODULES = re.compile(r"\w*(Router|TopK\w*Gat(e|ing)|MoEGate)\w*")


@dataclass(frozen=True)
class Route:
    """The rule of one parameter, the reason, and the matrices inside it.

    Attributes:
        name: of the parameter.
        shape: of the full parameter.
        numel: elements.
        rule: "adamw", or the matrix rule.
        reason: why, in a few words; for fused weights also how they are split.
        blocks: matrices that the rule sees; empty for AdamW. In the preset adamw hidden matrices keep theirs,
            because their spectra are reported.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    rule: str
    reason: str
    blocks: tuple[Block, ...] = ()


Modules = nn.Module | Iterable[tuple[str, nn.Module]]


@dataclass(frozen=True)
class _Owner:
    name: str
    parameter: str
    module: nn.Module
    parent: nn.Module | None


class ModuleIndex:
    """Who owns which parameter, by identity: names may carry prefixes of wrappers, parameters don't."""

    def __init__(self, modules: Modules) -> None:
        root = modules if isinstance(modules, nn.Module) else None
        named = list(root.named_modules(remove_duplicate=False)) if root is not None else list(modules)  # type: ignore[arg-type]
        by_name: Mapping[str, nn.Module] = dict(named)
        self.owners: dict[int, list[_Owner]] = {}
        self.heads: set[int] = set()
        self.config: object | None = getattr(root, "config", None)
        for name, module in named:
            parent = by_name.get(name.rpartition(".")[0]) if name else None
            for parameter_name, parameter in module.named_parameters(recurse=False):
                owner = _Owner(name, parameter_name, module, parent)
                self.owners.setdefault(id(parameter), []).append(owner)
            outputs = getattr(module, "get_output_embeddings", None)
            head = outputs() if callable(outputs) else None
            if isinstance(head, nn.Module):
                self.heads.update(id(p) for p in head.parameters(recurse=False))


def route(
    named: Sequence[tuple[str, Tensor]],
    rule: str,
    modules: Modules | None = None,
    plain: bool = False,
    by_head: bool = False,
    chosen: Sequence[str] | None = None,
) -> list[Route]:
    """Decide the rule of each parameter, and the matrices inside it.

    Args:
        named: (name, parameter); names unique.
        rule: the matrix rule. "adamw": everything takes AdamW, hidden matrices are still marked by blocks.
        modules: a model, or its (name, module) pairs: then module types decide.
        plain: the parameters came without names: every 2-D one is a hidden matrix.
        by_head: each head of Q, K and V is a matrix.
        chosen: patterns of module names (`optimizers.module_patterns`): other hidden matrices take AdamW; None: all
            hidden matrices take the rule.

    Raises:
        OptionError: a parameter is given twice, or under a name that is taken; or `chosen` without names.
    """
    names: set[str] = set()
    seen: set[int] = set()
    for name, parameter in named:
        if name in names or id(parameter) in seen:
            raise OptionError("params", name, "is given twice")
        names.add(name)
        seen.add(id(parameter))
    if chosen is not None and plain:
        raise OptionError("matrix_modules", list(chosen), "needs the names of the parameters", ("null",))
    index = ModuleIndex(modules) if modules is not None else None
    routes = [_route_one(name, parameter, rule, index, plain, by_head) for name, parameter in named]
    return routes if chosen is None or rule == "adamw" else [_choose(r, chosen) for r in routes]


def _choose(found: Route, patterns: Sequence[str]) -> Route:
    """Return the route of a parameter where only hidden matrices with certain names take the rule."""
    if found.rule == "adamw":
        return found
    pattern = first_match(found.name, patterns)
    if pattern is None:
        return replace(found, rule="adamw", reason=NOT_CHOSEN, blocks=())
    return replace(found, reason=f"{found.reason}, chosen by {pattern}")


def _route_one(
    name: str, parameter: Tensor, rule: str, index: ModuleIndex | None, plain: bool, by_head: bool
) -> Route:
    shape = tuple(parameter.shape)
    owners = index.owners.get(id(parameter), []) if index is not None else []
    if plain:
        reason = None if len(shape) == 2 else f"{len(shape)}-D"
    elif owners and index is not None:
        reason = _not_hidden_by_module(parameter, owners, index)
    else:
        reason = _not_hidden_by_name(name, len(shape))
    if reason is not None or 0 in shape:
        return Route(name, shape, parameter.numel(), "adamw", reason or "empty")
    blocks, how = split(name, shape, *_facts(owners, index), by_head=by_head)
    kind = type(owners[0].module).__name__ if owners else "2-D" if plain else "2-D, by name"
    reason = f"hidden matrix ({kind})" + (f": {how}" if how else "")
    return Route(name, shape, parameter.numel(), rule, reason, blocks)


def _facts(
    owners: Sequence[_Owner], index: ModuleIndex | None
) -> tuple[nn.Module | None, nn.Module | None, object | None]:
    if not owners:
        return None, None, index.config if index is not None else None
    owner = owners[0]
    config = getattr(owner.parent, "config", None) or (index.config if index is not None else None)
    return owner.module, owner.parent, config


def _not_hidden_by_module(parameter: Tensor, owners: Sequence[_Owner], index: ModuleIndex) -> str | None:
    """Return why this parameter is not a hidden matrix, or None.

    A tied weight is an embedding wherever else it is used.
    """
    if any(isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)) for owner in owners):
        return "embedding, tied to the output head" if len(owners) > 1 else "embedding"
    if id(parameter) in index.heads:
        return "output head"
    owner = owners[0]
    if parameter.ndim == 3 and type(owner.module).__name__.endswith("Experts"):
        return None
    if parameter.ndim != 2:
        norm = "norm" in type(owner.module).__name__.lower()
        return "bias" if owner.parameter == "bias" else "norm" if norm else f"{parameter.ndim}-D"
    # A Linear called "output" inside a block is a projection (BERT); near the top it is the head.
    leaf = owner.name.rpartition(".")[2]
    at_top = owner.name.count(".") <= 1
    if at_top and isinstance(owner.module, nn.Linear) and _HEADS.fullmatch(leaf):
        return "output head"
    if (part := _classifier_part(owner.name, owner.parent)) is not None:
        return part
    # The linear layer of a router may be a module inside it (DBRX, JetMoE).
    types = [type(m).__name__ for m in (owner.module, owner.parent) if m is not None]
    if any(_ROUTER_MODULES.fullmatch(name) for name in types) or re.fullmatch(NAME_PATTERNS[4][0], leaf):
        return "router"
    if isinstance(owner.module, nn.Linear) or type(owner.module).__name__ == "Conv1D":
        return None
    return _not_hidden_by_name(f"{owner.name}.{owner.parameter}", parameter.ndim)


def _not_hidden_by_name(name: str, ndim: int) -> str | None:
    parts = name.lower().split(".")
    if re.fullmatch(r"(\w+_)?bias", parts[-1]):
        return "bias"
    if ndim == 2 and (part := _classifier_part(name)) is not None:
        return part
    for pattern, reason in NAME_PATTERNS:
        # The last two components name the layer; deeper ones are containers ("model.embedding_stack.0.…").
        if any(re.fullmatch(pattern, part) for part in parts[-2:]):
            return reason
    return None if ndim == 2 else f"{ndim}-D"


def _classifier_part(name: str, parent: nn.Module | None = None) -> str | None:
    """Return "pooler" or "output head" for the linear layers through which a classifier reads its encoder, or None.

    Args:
        name: of the layer or parameter; names may carry a wrapper's prefix.
        parent: the module that holds the layer.
    """
    components = name.removeprefix("module.").split(".")
    if "pooler" in components:
        return "pooler"
    # RoBERTa's head is a dense layer and a projection; DistilBERT's first layer has a name of its own.
    is_head_class = parent is not None and type(parent).__name__.endswith("Head") and len(components) == 2
    return "output head" if is_head_class or components[0] in _CLASSIFIERS else None


def table(routes: Iterable[Route]) -> list[tuple[str, str, str, str]]:
    """Return (name, shape, rule, reason) of each route, as printed at start."""
    return [(r.name, "×".join(map(str, r.shape)), r.rule, r.reason) for r in routes]
