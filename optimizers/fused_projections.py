"""Fused projections (QKV, gate-up, stacked experts) and heads: which part of a weight is a matrix of its own.

The table says how each kind is laid out; sizes come from the attention module or the model's configuration.
Where they are missing or do not add up the weight stays whole, and its route says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A matrix inside a parameter, in stored orientation.

    Attributes:
        name: the parameter's, with the part in brackets where it has several.
        shape: (rows, columns).
        part: what the brackets hold ("q"), "" for the whole parameter.
        transposed: stored as (in, out) (`Conv1D` of transformers): matters to √(out/in) only.
        expert: index in a stack of matrices (3-D parameter); None: the parameter is one matrix.
        dim: axis of the matrix that is cut; -1: none.
        outer: the axis is read as (outer, inner): parts may be interleaved, head by head or column by column.
        start, length: interval of `inner`.
    """

    name: str
    shape: tuple[int, int]
    part: str = ""
    transposed: bool = False
    expert: int | None = None
    dim: int = -1
    outer: int = 1
    start: int = 0
    length: int = 0

    def view(self, tensor: Tensor) -> Tensor:
        """Return the block's elements of a parameter-shaped tensor, as a view: 2-D, or 3-D where interleaved."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.dim == -1:
            return tensor
        if self.outer == 1:
            return tensor.narrow(self.dim, self.start, self.length)
        inner = tensor.shape[self.dim] // self.outer
        return tensor.unflatten(self.dim, (self.outer, inner)).narrow(self.dim + 1, self.start, self.length)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return the block of a parameter-shaped tensor as (rows, columns), a view where possible."""
        # A reshape that changes nothing still costs a call per matrix and step.
        view = self.view(tensor)
        return view if view.ndim == 2 else view.reshape(self.shape)

    def like_view(self, matrix: Tensor) -> Tensor:
        """Return a (rows, columns) tensor in the shape of `view`."""
        return matrix if self.outer == 1 else matrix.unflatten(self.dim, (self.outer, self.length))

    @property
    def is_whole(self) -> bool:
        """True where it is the whole parameter."""
        return self.expert is None and self.dim == -1

    @property
    def fans(self) -> tuple[int, int]:
        """Return (out, in) of the layer that the block belongs to."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape


@dataclass(frozen=True)
class Heads:
    """Numbers of query and key-value heads of an attention layer, and the size of a head."""

    query: int
    key_value: int
    dim: int


@dataclass(frozen=True)
class Cut:
    """Parts of an axis: (name, size), repeated `outer` times."""

    parts: tuple[tuple[str, int], ...]
    outer: int = 1


_QKV = ("q", "k", "v")


def _equal(*names: str) -> Callable[[int, Heads | None], Cut | None]:
    def cut(size: int, heads: Heads | None) -> Cut | None:
        return Cut(tuple((name, size // len(names)) for name in names)) if size % len(names) == 0 else None

    return cut


def _grouped(size: int, heads: Heads | None) -> Cut | None:
    """Cut into all query heads, then all key heads, then all value heads."""
    if heads is None:
        return None
    kv = heads.key_value * heads.dim
    return Cut((("q", heads.query * heads.dim), ("k", kv), ("v", kv)))


def _interleaved(size: int, heads: Heads | None) -> Cut | None:
    """Cut, for each group of query heads that share a key head, into its queries, its key and its value.

    GPT-NeoX, Bloom and Falcon store them so.
    """
    if heads is None or heads.query % heads.key_value:
        return None
    shared = heads.query // heads.key_value
    return Cut((("q", shared * heads.dim), ("k", heads.dim), ("v", heads.dim)), outer=heads.key_value)


_GATE_UP = _equal("gate", "up")


def _alternating(size: int, heads: Heads | None) -> Cut | None:
    """Cut into gate and up, row by row (or column by column) in turn (gpt-oss)."""
    return Cut((("gate", 1), ("up", 1)), outer=size // 2) if size % 2 == 0 else None


# Last component of the module's name → layout of the output axis.
FUSED: dict[str, tuple[str, Callable[[int, Heads | None], Cut | None]]] = {
    "qkv_proj": ("q, k, v", _grouped),
    "c_attn": ("q, k, v", _grouped),
    "Wqkv": ("q, k, v", _grouped),
    "qkv": ("q, k, v", _grouped),
    "query_key_value": ("q, k, v of each head in turn", _interleaved),
    "gate_up_proj": ("gate, up", _GATE_UP),
    "Wi": ("gate, up", _GATE_UP),
    "input_linear": ("gate, up", _GATE_UP),
    "in_proj_weight": ("q, k, v", _equal(*_QKV)),
}


HEADS: dict[str, str] = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "wq", "q"), "q"),
    **dict.fromkeys(("k_proj", "key", "k_lin", "wk", "k"), "k"),
    **dict.fromkeys(("v_proj", "value", "v_lin", "wv", "v"), "v"),
}
"""Last component of the name of a module that projects to heads → what it gives."""


def split(
    name: str,
    shape: tuple[int, ...],
    module: nn.Module | None = None,
    parent: nn.Module | None = None,
    config: object | None = None,
    by_head: bool = False,
) -> tuple[tuple[Block, ...], str]:
    """Return the matrices of a parameter, and how they were found ("" for an ordinary matrix).

    Args:
        name: of the parameter.
        shape: 2-D, or 3-D for a stack of experts.
        module: owner of the parameter; its type tells if it is stored transposed.
        parent: the attention or MLP module, whose sizes are asked first.
        config: configuration of the model, asked second.
        by_head: each head of Q, K and V is a matrix, where the sizes of heads are known.
    """
    if by_head and len(shape) == 2:
        return _heads_of(name, shape, module, parent, config)
    kind = type(module).__name__ if module is not None else ""
    parts = name.split(".")
    leaf = parts[-1] if parts[-1] in FUSED or len(parts) == 1 else parts[-2]
    if len(shape) == 3:
        return _experts(name, shape, leaf, module, parent)
    rows, columns = shape
    stacked = _stacked_rows(name, (rows, columns), module)
    if stacked:
        return stacked, f"{len(stacked)} experts, each a matrix"
    transposed = kind == "Conv1D"
    whole = Block(name, (rows, columns), transposed=transposed)
    if leaf not in FUSED or (leaf == "input_linear" and not _feeds_a_gate(shape, parent)):
        return (whole,), ""
    what, layout = FUSED[leaf]
    cut = layout(shape[1 if transposed else 0], _heads(parent, config))
    blocks = _parts(whole, cut)
    if blocks is None:
        return (whole,), f"looks fused ({what}) but its sizes are not known: kept whole"
    return blocks, f"split into {what}"


def _heads_of(
    name: str,
    shape: tuple[int, ...],
    module: nn.Module | None,
    parent: nn.Module | None,
    config: object | None,
) -> tuple[tuple[Block, ...], str]:
    """Return the matrices of a parameter with Q, K and V cut into heads."""
    blocks, how = split(name, shape, module, parent, config)
    components = name.split(".")
    leaf = components[-1] if len(components) == 1 else components[-2]
    kinds = [HEADS.get(leaf) if block.is_whole else block.part for block in blocks]
    if not any(kind in _QKV for kind in kinds):
        return blocks, how
    heads = _heads(parent, config) or _heads(module, config)
    if heads is None:
        return blocks, _and(how, "the sizes of heads are not known: not split into heads")
    counts = {"q": heads.query, "k": heads.key_value, "v": heads.key_value}
    size = shape[1 if blocks[0].transposed else 0]
    matrices: list[Block] = []
    for block, kind in zip(blocks, kinds):
        if kind not in counts:
            matrices.append(block)
            continue
        axis = 1 if block.transposed else 0
        if block.shape[axis] != counts[kind] * heads.dim:
            rows = f"{block.shape[axis]} rows are not {counts[kind]} heads of {heads.dim}"
            return blocks, _and(how, f"{rows}: not split into heads")
        matrices += _cut_into_heads(block, axis, size, heads.dim)
    return tuple(matrices), _and(how, "split into heads")


def _and(how: str, more: str) -> str:
    return f"{how}, {more}" if how else more


def _cut_into_heads(block: Block, axis: int, size: int, dim: int) -> list[Block]:
    """Return the heads of a block in their order along `axis`, which has `size` rows (or columns) in all."""
    length = block.length if block.dim != -1 else block.shape[axis]
    # Of an interleaved projection, each head is an interval all the same.
    starts = [
        group * (size // block.outer) + block.start + within
        for group in range(block.outer)
        for within in range(0, length, dim)
    ]
    rows, columns = block.shape
    return [
        replace(
            block,
            name=f"{block.name.removesuffix(f'[{block.part}]')}[{part}]",
            shape=(rows, dim) if axis == 1 else (dim, columns),
            part=part,
            dim=axis,
            outer=1,
            start=start,
            length=dim,
        )
        for number, start in enumerate(starts)
        for part in [f"{block.part}.h{number}" if block.part else f"h{number}"]
    ]


def _parts(whole: Block, cut: Cut | None) -> tuple[Block, ...] | None:
    """Cut a matrix along its output axis; return None where the parts do not add up."""
    axis = 1 if whole.transposed else 0
    rows, columns = whole.shape
    if cut is None or sum(size for _, size in cut.parts) * cut.outer != whole.shape[axis]:
        return None
    blocks, start = [], 0
    for name, size in cut.parts:
        length = size * cut.outer
        part = f"{whole.part}.{name}" if whole.part else name
        blocks.append(
            replace(
                whole,
                name=f"{whole.name.removesuffix(f'[{whole.part}]')}[{part}]",
                shape=(rows, length) if whole.transposed else (length, columns),
                part=part,
                dim=axis,
                outer=cut.outer,
                start=start,
                length=size,
            )
        )
        start += size
    return tuple(blocks)


def _experts(
    name: str, shape: tuple[int, ...], leaf: str, module: nn.Module | None, parent: nn.Module | None
) -> tuple[tuple[Block, ...], str]:
    """Return the matrices of a stack of experts: one of each, or its gate and its up projection.

    The layout of a stack is stated by its module (transformers: `is_transposed`, `is_concatenated`), or else by the
    shapes of its two stacks.
    """
    experts, rows, columns = shape
    transposed = _is_transposed(module)
    whole = [
        Block(f"{name}[{e}]", (rows, columns), str(e), transposed=transposed, expert=e)
        for e in range(experts)
    ]
    is_gated = leaf in ("gate_up_proj", "Wi") or (leaf == "input_linear" and _feeds_a_gate(shape, parent))
    if not is_gated:
        return tuple(whole), f"{experts} experts, each a matrix"
    layout = _GATE_UP if getattr(module, "is_concatenated", True) else _alternating
    cut = layout(columns if transposed else rows, None)
    blocks = [_parts(block, cut) for block in whole]
    if None in blocks:
        return tuple(whole), f"{experts} experts; gate and up look fused but do not halve: kept whole"
    how = "" if cut is not None and cut.outer == 1 else ", interleaved"
    return tuple(
        part for same in blocks for part in same or ()
    ), f"{experts} experts, split into gate, up{how}"


def _is_transposed(module: nn.Module | None) -> bool:
    """Return True for experts that are stored as (in, out)."""
    stored = getattr(module, "is_transposed", None)
    if isinstance(stored, bool):
        return stored
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or not gate_up.ndim == down.ndim == 3:
        return False
    return gate_up.shape[2] == 2 * down.shape[1] and gate_up.shape[1] == down.shape[2]


def _feeds_a_gate(shape: tuple[int, ...], parent: nn.Module | None) -> bool:
    """Return True if an `input_linear` gives twice what the `output_linear` next to it takes (Granite, JetMoE)."""
    weight = getattr(getattr(parent, "output_linear", None), "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == len(shape) and shape[-2] == 2 * weight.shape[-1]


def _stacked_rows(name: str, shape: tuple[int, int], module: nn.Module | None) -> tuple[Block, ...]:
    """Return the experts of a 2-D weight that holds one below the other (DBRX); none for other weights."""
    experts, inner = _integer(module, "moe_num_experts"), _integer(module, "ffn_hidden_size")
    if experts is None or inner is None or shape[0] != experts * inner:
        return ()
    # Of the three, the down projection multiplies from the right as it is stored.
    transposed = name.rpartition(".")[2] == "w2"
    return tuple(
        Block(
            f"{name}[{e}]",
            (inner, shape[1]),
            str(e),
            transposed,
            dim=0,
            start=e * inner,
            length=inner,
        )
        for e in range(experts)
    )


def _heads(parent: nn.Module | None, config: object | None) -> Heads | None:
    """Return the sizes of the attention layer, from its module or else from the configuration, or None."""
    for source in (parent, config):
        query = _integer(source, "num_attention_heads", "num_heads", "n_head", "n_heads")
        if query is None:
            continue
        hidden = _integer(source, "hidden_size", "embed_dim", "n_embd", "d_model")
        dim = _integer(source, "head_dim")
        if dim is None and hidden is not None and hidden % query == 0:
            dim = hidden // query
        if dim is None:
            continue
        if getattr(config, "multi_query", False) is True and not getattr(
            config, "new_decoder_architecture", False
        ):
            return Heads(query, 1, dim)
        key_value = _integer(source, "num_key_value_heads", "num_kv_heads")
        key_value = key_value or _integer(config, "num_key_value_heads", "num_kv_heads") or query
        return Heads(query, key_value, dim)
    return None


def _integer(source: object | None, *names: str) -> int | None:
    for name in names:
        value = getattr(source, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
