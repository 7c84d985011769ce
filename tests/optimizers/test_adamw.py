"""AdamW against torch's, bit by bit, and in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optimizers
from optimizers import presets
from optimizers.reference import AdamW
from optimizers.rounding import Rounding, compensated, rounded
from optimizers.rules.parts import adamw_kernels


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 24), (24,), (3, 5, 7)]
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def step_all(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int = 12) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_equal_to_torch_s_fused_adamw(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}
    step_all(optimizers.AdamW(ours, **options), ours)
    step_all(torch.optim.AdamW(theirs, fused=True, **options), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_defaults_are_the_preset_s() -> None:
    ours, theirs = parameters(), parameters()
    step_all(optimizers.AdamW(ours), ours)
    step_all(torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_parameters_that_missed_steps_keep_their_own_count() -> None:
    ours, theirs = parameters(), parameters()
    a, b = (
        optimizers.AdamW(ours),
        torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    )
    for t in range(6):
        for params, optimizer in ((ours, a), (theirs, b)):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 + t) if (t + i) % 2 else None
            optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs))


def test_fp64_oracle() -> None:
    params = parameters(torch.float64)
    optimizer = optimizers.AdamW(params, lr=0.01, eps=1e-3)
    oracles = [AdamW(p.detach().numpy(), 0.01, (0.9, 0.95), 1e-3, decay=0.1) for p in params]
    random = np.random.default_rng(0)
    for _ in range(30):
        for p, oracle in zip(params, oracles):
            gradient = random.standard_normal(p.shape)
            p.grad = torch.from_numpy(gradient)
            oracle.step(gradient)
        optimizer.step()
    for p, oracle in zip(params, oracles):
        np.testing.assert_allclose(p.detach().numpy(), oracle.weight, rtol=1e-12)


def test_half_weights_have_fp32_moments_and_are_rounded_once() -> None:
    half, single = (
        parameters(torch.bfloat16),
        [torch.nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)],
    )
    a, b = optimizers.AdamW(half, lr=0.01), optimizers.AdamW(single, lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for p, q in zip(half, single):
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        q.grad = p.grad.float()
    a.step()
    b.step()
    assert all(state["moment"].dtype == torch.float32 for state in a.state.values())
    for p, q in zip(half, single):
        # The fused kernel and ours differ by an fp32 ulp or two, which decides a rounding of 2⁻¹⁶ as often;
        # one of the 1,089 elements may be such a case.
        assert (p != q.bfloat16()).sum() <= 1


def test_spectra_are_those_of_the_hidden_matrices() -> None:
    params = parameters()
    optimizer = optimizers.AdamW([("w", params[0]), ("b", params[1]), ("c", params[2])])
    step_all(optimizer, params, 3)
    spectra = optimizer.moment_spectra()
    assert list(spectra) == ["w"]
    expected = torch.linalg.svdvals(optimizer.state[params[0]]["moment"])
    torch.testing.assert_close(spectra["w"], expected, rtol=1e-5, atol=1e-7)


HALF_SHAPES = [(40, 24), (24,), (3, 5, 7), (130, 70), (0,), (1,)]


def half_weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator).bfloat16() for s in HALF_SHAPES]
    image = torch.randn(4, 6, 8, 8, generator=generator).bfloat16()
    return [*weights, image.to(memory_format=torch.channels_last)]


def step_half(mode: str, masked_step: int | None, stepper: Any, steps: int = 4) -> list[torch.Tensor]:
    """Step half-precision weights of several shapes; return them and their state."""
    weights = half_weights()
    states = [
        {kind: torch.zeros_like(w, dtype=dtype) for kind, dtype in adamw_kernels.state_kinds(mode, w).items()}
        for w in weights
    ]
    settings = adamw_kernels.AdamWSettings(1e-2, 0.1, (0.9, 0.95), 1e-8, "corrected", Rounding(mode, 3))
    generator = torch.Generator().manual_seed(1)
    for t in range(steps):
        gradients = [torch.randn(w.shape, generator=generator).bfloat16() for w in weights]
        found_inf = None if masked_step is None else torch.tensor([float(t == masked_step)])
        if t == masked_step:
            gradients[0][0, 0] = torch.nan
        current = [{**state, "step": t} for state in states]
        names = [f"p{i}" for i in range(len(weights))]
        stepper(weights, gradients, current, settings, names, found_inf)
    return [*weights, *(tensor for state in states for tensor in state.values())]


def tensor_by_tensor(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: list[dict[str, Any]],
    s: adamw_kernels.AdamWSettings,
    names: list[str],
    found_inf: torch.Tensor | None,
) -> None:
    """The step of half-precision weights in plain words: each whole tensor after the other."""
    if found_inf is not None and found_inf > 0:
        return
    for weight, gradient, state, name in zip(weights, gradients, states, names):
        now = state["step"] + 1
        wide, gradient = weight.float(), gradient.float()
        state["moment"].lerp_(gradient, 1.0 - s.betas[0])
        state["second_moment"].mul_(s.betas[1]).addcmul_(gradient, gradient, value=1.0 - s.betas[1])
        root = state["second_moment"].sqrt() / math.sqrt(1.0 - s.betas[1] ** now)
        direction = state["moment"] / (1.0 - s.betas[0] ** now) / (root + s.eps)
        change = -s.lr * (direction + s.weight_decay * wide)
        if s.rounding.mode == "kahan":
            new, lost = compensated(weight, change, state["compensation"])
            state["compensation"].copy_(lost)
        else:
            new = rounded(wide + change, weight.dtype, s.rounding, name, now)
        weight.copy_(new)


@pytest.mark.parametrize("limit", [7, 1000, 1 << 17])
@pytest.mark.parametrize("masked_step", [None, 2])
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "kahan"])
def test_chunks_of_half_weights_have_the_bits_of_whole_tensors(
    mode: str, masked_step: int | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step_half(mode, masked_step, tensor_by_tensor)
    monkeypatch.setitem(adamw_kernels.CHUNK_ELEMENTS, "cpu", limit)
    found = step_half(mode, masked_step, adamw_kernels.step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Operators(TorchDispatchMode):
    """Count operators that compute, and remember the largest fp32 tensor that one of them made."""

    VIEWS = ("view", "slice", "split", "detach", "_unsafe_view", "split_with_sizes", "reshape")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in self.VIEWS:
            self.count += 1
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("mode", ["nearest", "kahan"])
def test_operators_do_not_grow_with_the_number_of_half_parameters(mode: str) -> None:
    settings = adamw_kernels.AdamWSettings(1e-2, 0.1, (0.9, 0.95), 1e-8, "corrected", Rounding(mode))

    def operators(copies: int) -> int:
        weights = [torch.ones(8, 8, dtype=torch.bfloat16) for _ in range(copies)]
        states = [
            {kind: torch.zeros(8, 8, dtype=dtype) for kind, dtype in kinds.items()} | {"step": 0}
            for kinds in (adamw_kernels.state_kinds(mode, w) for w in weights)
        ]
        names = [str(i) for i in range(copies)]
        with Operators() as counted:
            adamw_kernels.step(weights, [torch.ones_like(w) for w in weights], states, settings, names, None)
        return counted.count - copies  # the gradients

    # 40 parameters took 600 operators as 40 tensors.
    assert operators(40) == operators(2) < 45


def test_temporaries_of_half_parameters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adamw_kernels.CHUNK_ELEMENTS, "cpu", 512)
    weight, gradient = torch.ones(2, 100, 100, dtype=torch.bfloat16).unbind(0)
    state = {"moment": torch.zeros(100, 100), "second_moment": torch.zeros(100, 100), "step": 0}
    settings = adamw_kernels.AdamWSettings(1e-2, 0.1, (0.9, 0.95), 1e-8, "corrected", Rounding("stochastic"))
    with Operators() as counted:
        adamw_kernels.step([weight], [gradient], [state], settings, ["w"], None)
    assert counted.largest == 512


def test_a_second_rate_for_what_is_no_hidden_matrix_is_torch_s_with_two_groups() -> None:
    """Parameters without names: the matrix is hidden, the vector and the 3-D tensor are not."""
    ours, theirs, one_rate = parameters(), parameters(), parameters()
    step_all(optimizers.AdamW(ours, lr=3e-3, aux_lr=2e-2), ours)
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 2e-2}]
    step_all(torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    # Negative control: with one rate the matrix agrees, and the others do not.
    step_all(optimizers.AdamW(one_rate, lr=3e-3), one_rate)
    assert [torch.equal(a, b) for a, b in zip(one_rate, theirs)] == [True, False, False]


def test_embeddings_head_and_vectors_take_the_second_rate() -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 6), torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 5)
    )
    named = list(model.named_parameters())
    optimizer = optimizers.build("adamw", named, modules=model, lr=0.01, aux_lr=0.04, weight_decay=0.3)
    hidden, others = optimizer.param_groups
    assert (hidden["lr"], others["lr"]) == (0.01, 0.04)
    assert hidden["param_names"] == ["1.weight", "3.weight"]
    assert set(others["param_names"]) == {"0.weight", "1.bias", "2.weight", "2.bias", "3.bias"}
    # Nothing but the rate differs.
    same = ("betas", "eps", "eps_form", "weight_decay", "rule", "scheduled")
    assert all(hidden[key] == others[key] for key in same)


def test_a_group_that_the_user_gives_to_adamw_takes_the_second_rate_as_under_a_matrix_rule() -> None:
    first, second, third = parameters(), parameters(), parameters()
    groups = [{"params": first, "rule": "adamw"}]
    assert [group["lr"] for group in optimizers.AdamW(groups, lr=0.01, aux_lr=0.04).param_groups] == [0.04]
    groups = [{"params": second, "rule": "adamw", "lr": 0.5, "betas": (0.1, 0.2)}]
    (group,) = optimizers.AdamW(groups, lr=0.01, aux_lr=0.04).param_groups
    assert (group["lr"], group["betas"]) == (0.5, (0.1, 0.2))
    # Without a second rate there is one group.
    assert [group["lr"] for group in optimizers.AdamW(third, lr=0.01, aux_lr=None).param_groups] == [0.01]


def test_a_run_without_the_second_rate_is_the_run_that_it_was() -> None:
    without = presets.identifying_options("adamw", presets.resolve("adamw"))
    assert "aux_lr" not in without
    given = presets.identifying_options("adamw", presets.resolve("adamw", {"aux_lr": 0.01}))
    assert given == {**without, "aux_lr": 0.01}
