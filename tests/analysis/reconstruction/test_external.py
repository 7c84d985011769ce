"""Checkpoints of other people: what the theory covers is taken, everything else refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis.reconstruction import external
from analysis.reconstruction.network import outputs
from harness.errors import InputError


def _mlp(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 7, bias=bias),
        nn.ReLU(),
        nn.Linear(7, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 1, bias=False),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_mlp_is_taken(tmp_path: Path, suffix: str, bias: bool) -> None:
    model = _mlp(bias)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    x = torch.randn(3, 4)
    found = outputs(external.network(str(path)), x.double())
    torch.testing.assert_close(found.float(), model(x).detach(), rtol=1e-5, atol=1e-6)


def _state(**changes: Tensor) -> dict[str, Tensor]:
    return {**{k: v.clone() for k, v in _mlp().state_dict().items()}, **changes}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (_state(**{"2.bias": torch.ones(5)}), "bias past layer 1"),
        (_state(**{"norm1.weight": torch.ones(7)}), "normalization"),
        (_state(**{"h.0.attn.q_proj.weight": torch.ones(7, 7)}), "attention"),
        (_state(**{"conv.weight": torch.ones(2, 1, 3, 3)}), "not a matrix of a linear layer"),
        (_state(**{"shortcut.weight": torch.ones(5, 4)}), "do not follow each other"),
        (_state(**{"0.weight": torch.full((7, 4), float("nan"))}), "not finite"),
        ({"0.weight": torch.ones(1, 4)}, "one layer"),
    ],
)
def test_what_the_theory_does_not_cover(tmp_path: Path, state: dict[str, Tensor], reason: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(InputError, match=f"^checkpoint: .*{reason}"):
        external.network(str(path))


def test_a_bias_of_zeros_past_layer_one_is_none(tmp_path: Path) -> None:
    torch.save(_state(**{"2.bias": torch.zeros(5)}), tmp_path / "weights.pt")
    assert external.network(str(tmp_path / "weights.pt")).depth == 3


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(_mlp(), tmp_path / "whole_module.pt")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        external.network(str(tmp_path / "whole_module.pt"))
    with pytest.raises(InputError, match="does not exist"):
        external.network(str(tmp_path / "none.pt"))


def test_batches(tmp_path: Path) -> None:
    path = str(tmp_path / "batch.npz")
    x = np.random.default_rng(0).random((6, 2, 2))
    np.savez(path, x=x, y=[0, 1, 0, 1, 1, 0])
    found = external.samples(path, 4, 1)
    assert found.labels.tolist() == [-1, 1, -1, 1, 1, -1]
    assert found.images.shape == (6, 4)
    pool = np.ones((4, 2, 2))
    np.savez(path, x=x, y=[0, 1] * 3, heldout=pool, heldout_y=[0, 1, 1, 0])
    assert external.samples(path, 4, 1).heldout_labels.tolist() == [-1, 1, 1, -1]
    fits = {"x": x, "y": [-1, 1] * 3, "heldout": pool}
    for arrays, reason in (
        (fits, "heldout .*has no heldout_y"),
        ({**fits, "heldout_y": [1] * 4}, r"heldout_y -1 has no image of this class"),
        ({**fits, "heldout_y": [1, -1]}, r"heldout_y .*does not fit the 4 images"),
        ({**fits, "heldout_y": [1, -1, 3, 1]}, r"heldout_y .*does not fit"),
        ({"x": x}, "has no y"),
        ({"x": x, "y": [0, 1]}, "does not fit"),
        ({"x": x * np.inf, "y": [0, 1] * 3}, "finite"),
        ({"x": x, "y": [0, 2] * 3}, "does not fit the outputs"),
    ):
        np.savez(path, allow_pickle=False, **arrays)
        with pytest.raises(InputError, match=f"^batch: .*{reason}"):
            external.samples(path, 4, 1)
