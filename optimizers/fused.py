"""Fused projections: which rows (or columns) of a weight are a matrix of their own.

The table says how each kind is laid out; sizes come from the attention module or the model's configuration.
Where they are missing or do not add up the weight stays whole, and its route says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A matrix inside a parameter, in stored orientation.

    Attributes:
        name: the parameter's, with the part in brackets where it has several.
        shape: (rows, columns).
        part: what the brackets hold ("q"), "" for the whole parameter.
        transposed: stored as (in, out) (`Conv1D` of transformers): matters to √(out/in) only.
        dim: axis that is cut, or -1: the whole parameter, or -2: one of a stack of matrices.
        outer: the axis is read as (outer, inner): parts may be interleaved, head by head.
        start, length: interval of `inner`; for dim -2: which matrix, and 1.
    """

    name: str
    shape: tuple[int, int]
    part: str = ""
    transposed: bool = False
    dim: int = -1
    outer: int = 1
    start: int = 0
    length: int = 0

    def view(self, tensor: Tensor) -> Tensor:
        """The block's elements of a parameter-shaped tensor, as a view: 2-D, or 3-D where interleaved."""
        if self.dim == -1:
            return tensor
        if self.dim == -2:
            return tensor[self.start]
        if self.outer == 1:
            return tensor.narrow(self.dim, self.start, self.length)
        inner = tensor.shape[self.dim] // self.outer
        return tensor.unflatten(self.dim, (self.outer, inner)).narrow(self.dim + 1, self.start, self.length)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The block of a parameter-shaped tensor as (rows, columns): a view where possible."""
        # A reshape that changes nothing still costs a call per matrix and step.
        view = self.view(tensor)
        return view if view.ndim == 2 else view.reshape(self.shape)

    def like_view(self, matrix: Tensor) -> Tensor:
        """A (rows, columns) tensor in the shape of `view`."""
        return matrix if self.outer == 1 else matrix.unflatten(self.dim, (self.outer, self.length))

    @property
    def fans(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer."""

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
    """All query heads, then all key heads, then all value heads."""
    if heads is None:
        return None
    kv = heads.key_value * heads.dim
    return Cut((("q", heads.query * heads.dim), ("k", kv), ("v", kv)))


def _interleaved(size: int, heads: Heads | None) -> Cut | None:
    """Per group of query heads that share a key head: its queries, its key, its value (GPT-NeoX, Bloom,
    Falcon)."""
    if heads is None or heads.query % heads.key_value:
        return None
    shared = heads.query // heads.key_value
    return Cut((("q", shared * heads.dim), ("k", heads.dim), ("v", heads.dim)), outer=heads.key_value)


# Last component of the module's name → layout of the output axis.
FUSED: dict[str, tuple[str, Callable[[int, Heads | None], Cut | None]]] = {
    "qkv_proj": ("q, k, v", _grouped),
    "c_attn": ("q, k, v", _grouped),
    "Wqkv": ("q, k, v", _grouped),
    "qkv": ("q, k, v", _grouped),
    "query_key_value": ("q, k, v of each head in turn", _interleaved),
    "gate_up_proj": ("gate, up", _equal("gate", "up")),
    "Wi": ("gate, up", _equal("gate", "up")),
    "in_proj_weight": ("q, k, v", _equal(*_QKV)),
}


def split(
    name: str,
    shape: tuple[int, ...],
    module: nn.Module | None = None,
    parent: nn.Module | None = None,
    config: object | None = None,
) -> tuple[tuple[Block, ...], str]:
    """The matrices of a parameter, and how they were found ("" for an ordinary matrix).

    Args:
        name: of the parameter.
        shape: 2-D, or 3-D for a stack of experts.
        module: owner of the parameter; its type tells whether it is stored transposed.
        parent: the attention or MLP module, whose sizes are asked first.
        config: configuration of the model, asked second.
    """
    kind = type(module).__name__ if module is not None else ""
    parts = name.split(".")
    leaf = parts[-1] if parts[-1] in FUSED or len(parts) == 1 else parts[-2]
    if len(shape) == 3:
        blocks = tuple(
            Block(f"{name}[{e}]", (shape[1], shape[2]), str(e), dim=-2, start=e, length=1)
            for e in range(shape[0])
        )
        return blocks, f"{shape[0]} experts, each a matrix"
    rows, columns = shape
    transposed = kind == "Conv1D"
    whole = (Block(name, (rows, columns), transposed=transposed),)
    if leaf not in FUSED:
        return whole, ""
    axis = 1 if transposed else 0
    what, layout = FUSED[leaf]
    cut = layout(shape[axis], _heads(parent, config))
    if cut is None or sum(size for _, size in cut.parts) * cut.outer != shape[axis]:
        return whole, f"looks fused ({what}) but its sizes are not known: kept whole"
    blocks, start = [], 0
    for part, size in cut.parts:
        length = size * cut.outer
        block_shape = (rows, length) if transposed else (length, columns)
        blocks.append(Block(f"{name}[{part}]", block_shape, part, transposed, axis, cut.outer, start, size))
        start += size
    return tuple(blocks), f"split into {what}"


def _heads(parent: nn.Module | None, config: object | None) -> Heads | None:
    """Sizes of the attention layer, from its module or else from the configuration; None if they are not
    there."""
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
