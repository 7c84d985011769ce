"""A checkpoint of the user's own with its batch: accepted if the theory covers its architecture, else refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.reconstruction.network import Network
from analysis.reconstruction.samples import SampleSet
from harness.errors import InputError

_REFUSED = (
    (r"(norm|\bln\b|ln_|layernorm|bn\d|batchnorm)", "normalization: Φ is not homogeneous in its parameters"),
    (
        r"(attn|attention|q_proj|k_proj|qkv)",
        "attention: Φ is not homogeneous of one degree, nor piecewise affine",
    ),
    (r"(embed|wte|wpe)", "embeddings: the input is not a vector that could be reconstructed"),
)
COVERED = "a chain of linear layers with ReLU between them and biases in the first layer alone"


def network(path: str) -> Network:
    """Return the network of a state dict (.safetensors, or torch's file of tensors alone).

    Raises:
        InputError: no such file, more than tensors in it, or an architecture that the theory does not cover.
    """
    state = _state(Path(path))
    for name in state:
        for pattern, why in _REFUSED:
            if re.search(pattern, name.lower()):
                raise InputError("checkpoint", name, f"is {why}", allowed=COVERED)
    weights = [(name, value) for name, value in state.items() if not name.endswith("bias")]
    if not weights or any(value.ndim != 2 for _, value in weights):
        odd = next((f"{name} {tuple(v.shape)}" for name, v in weights if v.ndim != 2), path)
        raise InputError("checkpoint", odd, "is not a matrix of a linear layer", allowed=COVERED)
    for (one, first), (other, second) in pairwise(weights):
        if second.shape[1] != first.shape[0]:
            shapes = f"{one} {tuple(first.shape)} and {other} {tuple(second.shape)}"
            raise InputError(
                "checkpoint", shapes, "do not follow each other (a residual or a branch?)", allowed=COVERED
            )
    if len(weights) < 2:
        raise InputError("checkpoint", path, "has one layer, and no ReLU", allowed=COVERED)
    first_bias = f"{weights[0][0].removesuffix('weight')}bias"
    for name, value in state.items():
        is_zero = not bool(value.any())
        if name.endswith("bias") and name != first_bias and not is_zero:
            reason = "is a bias past layer 1: Φ is not homogeneous in its parameters"
            raise InputError("checkpoint", name, reason, allowed=COVERED)
    bias = state.get(first_bias)
    relu_network = Network(
        tuple(value.double().contiguous() for _, value in weights),
        bias.double() if bias is not None and bool(bias.any()) else None,
    )
    if not all(bool(torch.isfinite(p).all()) for p in relu_network.parameters):
        raise InputError("checkpoint", path, "holds weights that are not finite")
    return relu_network


def samples(path: str, inputs: int, outputs: int) -> SampleSet:
    """Return the training batch of an external checkpoint, as it was fed to the network; it has no public pool.

    Args:
        path: .npz with `x` (n, d) and `y` (n,), ±1 or class numbers; optional `heldout`, `heldout_y`, `shape`.
        inputs, outputs: of the network.

    Raises:
        InputError: another format or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise InputError("batch", path, f"is not an .npz of arrays ({error})") from None
    missing = [key for key in ("x", "y") if key not in arrays]
    if missing:
        raise InputError("batch", path, f"has no {' and no '.join(missing)}", allowed="x (n, d) and y (n,)")
    x, y = (
        arrays["x"].reshape(len(arrays["x"]), -1).astype(np.float64),
        arrays["y"].astype(np.float64).reshape(-1),
    )
    if x.shape != (len(y), inputs) or not np.isfinite(x).all():
        raise InputError(
            "batch", f"x {x.shape}", f"does not fit: {len(y)} labels, {inputs} inputs, finite numbers"
        )
    values = sorted({float(v) for v in y}, reverse=True)
    if outputs == 1 and values == [1.0, 0.0]:
        y, values = 2 * y - 1, [1.0, -1.0]
    expected = [1.0, -1.0] if outputs == 1 else [float(i) for i in range(outputs)]
    if not set(values) <= set(expected):
        raise InputError("batch", f"y {values[:5]}", "does not fit the outputs", allowed=str(expected))
    heldout = arrays.get("heldout", np.zeros((0, inputs)))
    heldout = heldout.reshape(len(heldout), inputs).astype(np.float64)
    side = round(inputs**0.5)
    shape = tuple(int(v) for v in arrays["shape"]) if "shape" in arrays else (side, side)
    if int(np.prod(shape)) != inputs:
        raise InputError(
            "batch", f"shape {shape}", f"has not {inputs} pixels", fix="shape=(h, w) in the .npz"
        )
    heldout_labels = _pool_labels(arrays, len(heldout), expected)
    return SampleSet(
        images=x,
        labels=y,
        heldout=heldout,
        heldout_labels=heldout_labels,
        # The batch's owner declares these as the attacker's, in the network's coordinates.
        public=heldout,
        mean=np.zeros(inputs),
        offset=0.0,
        shape=shape,
        names={label: f"{label:+g}" for label in expected},
    )


def _pool_labels(arrays: Mapping[str, np.ndarray], count: int, expected: list[float]) -> np.ndarray:
    """Return the labels of the public images, (count,): held-out images are drawn by class, so each must occur.

    Raises:
        InputError: no labels, labels that do not fit, or a class without an image.
    """
    if not count:
        return np.zeros(0)
    fix = "one label per image of heldout, as in y"
    if "heldout_y" not in arrays:
        raise InputError("batch", f"heldout ({count} images)", "has no heldout_y", fix=fix)
    labels = arrays["heldout_y"].astype(np.float64).reshape(-1)
    if expected == [1.0, -1.0] and set(labels) <= {0.0, 1.0}:
        labels = 2 * labels - 1
    if len(labels) != count or not set(labels) <= set(expected):
        reason = f"does not fit the {count} images of heldout"
        raise InputError("batch", f"heldout_y ({len(labels)})", reason, allowed=str(expected), fix=fix)
    missing = [label for label in expected if label not in labels]
    if missing:
        reason = "has no image of this class, which every draw of held-out images needs"
        fix = "heldout with an image of every class, or without heldout"
        raise InputError("batch", f"heldout_y {missing[0]:+g}", reason, fix=fix)
    return labels


def _state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise InputError("checkpoint", path, "does not exist", fix="checkpoint=FILE.safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for a bad file
        raise InputError(
            "checkpoint", path, f"cannot be read as tensors ({str(error).splitlines()[0]})"
        ) from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            "checkpoint", path, "is not a state dict: name → tensor", fix="torch.save(model.state_dict(), …)"
        )
    return state
