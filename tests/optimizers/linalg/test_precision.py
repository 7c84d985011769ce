"""Global precision switches, autocast, torch.compile and meta tensors do not change what is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from optimizers.linalg.inverse_root import inverse_root
from optimizers.linalg.newton_schulz import cubic, newton_schulz, polar_express
from optimizers.linalg.polar import METHODS, polar
from optimizers.linalg.robust import full_precision
from optimizers.linalg.spectra import orthogonality_error, polar_error
from optimizers.linalg.subspace import randomized_basis, svd_basis, test_matrix

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def matrix() -> torch.Tensor:
    return torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))


CALLS = {
    **{f"polar {name}": lambda m, name=name: polar(m, name).factor for name in METHODS},
    "newton_schulz fp32": lambda m: newton_schulz(m, dtype=torch.float32),
    "cubic spectral": lambda m: cubic(m, norm="spectral"),
    "polar_express bf16": lambda m: polar_express(m),
    "svd_basis": lambda m: svd_basis(m, 8, "left"),
    "randomized_basis": lambda m: randomized_basis(m, 8, "right", test_matrix(0, "w", 0, (24, 12))),
    "orthogonality_error": orthogonality_error,
    "polar_error": lambda m: polar_error(polar(m).factor, m),
    "inverse_root": lambda m: inverse_root(m.double().mT @ m.double(), 1e-6).root,
}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    expected = CALLS[name](matrix())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CALLS[name](matrix()), expected)
        # Negative control: outside the guard autocast does reach fp32 products.
        assert (matrix().mT @ matrix()).dtype == torch.bfloat16


@pytest.fixture
def restore_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("restore_precision")
@pytest.mark.parametrize("level", ["highest", "high", "medium"])
def test_the_guard_switches_reduced_products_off_and_back(level: str) -> None:
    torch.set_float32_matmul_precision(level)
    before = [backend.fp32_precision for backend in MATMULS]
    if level == "medium":
        assert before == ["tf32", "bf16"]
    with full_precision("cpu"):
        assert [backend.fp32_precision for backend in MATMULS] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in MATMULS] == before
    # torch refuses its older switch where the two interfaces disagree: both must have stayed usable.
    assert torch.get_float32_matmul_precision() == level
    assert torch.backends.cuda.matmul.allow_tf32 is (level != "highest")


def tf32_by_operator() -> None:
    MATMULS[0].fp32_precision = "tf32"


def tf32_by_switch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


SETTINGS = {
    "default": lambda: None,
    "level high": lambda: torch.set_float32_matmul_precision("high"),
    "level medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": tf32_by_switch,
    "per operator": tf32_by_operator,
}


def legacy_flags() -> tuple[str, object] | str:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return "refused"


@pytest.mark.usefixtures("restore_precision")
@pytest.mark.parametrize("name", SETTINGS)
def test_torchs_older_switches_can_be_read_inside_the_guard(name: str) -> None:
    """Matrix products on CUDA, the profiler and inductor read them; a mix of old and new makes torch raise."""
    SETTINGS[name]()
    before = [backend.fp32_precision for backend in MATMULS], legacy_flags()
    with full_precision("cpu"):
        assert legacy_flags() == ("highest", False)
        with full_precision("cpu"):
            assert legacy_flags() == ("highest", False)
        assert [backend.fp32_precision for backend in MATMULS] == ["ieee", "ieee"]
    assert ([backend.fp32_precision for backend in MATMULS], legacy_flags()) == before


@pytest.mark.usefixtures("restore_precision")
def test_switching_operators_alone_would_make_reads_raise() -> None:
    """Negative control."""
    torch.set_float32_matmul_precision("high")
    MATMULS[0].fp32_precision = "ieee"
    assert legacy_flags() == "refused"


@pytest.mark.usefixtures("restore_precision")
def test_the_guard_restores_after_an_exception() -> None:
    torch.set_float32_matmul_precision("high")
    with pytest.raises(KeyError), full_precision("cpu"):
        raise KeyError
    assert [backend.fp32_precision for backend in MATMULS] == ["tf32", "tf32"]


@pytest.mark.usefixtures("restore_precision")
@pytest.mark.parametrize("name", CALLS)
def test_every_entry_runs_its_products_under_the_guard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the products themselves: whatever the global switch says, they run with it off."""
    seen: list[list[object]] = []

    def watch(owner: object, attribute: str, everything: bool) -> None:
        original = getattr(owner, attribute)

        def watched(first: torch.Tensor, *args: object, **kwargs: object):
            # The switches do not reach fp64 products.
            if everything or first.dtype != torch.float64:
                seen.append([backend.fp32_precision for backend in MATMULS])
            return original(first, *args, **kwargs)

        monkeypatch.setattr(owner, attribute, watched)

    torch.set_float32_matmul_precision("medium")
    m = matrix()
    for attribute in ("bmm", "baddbmm"):
        watch(torch, attribute, everything=False)
    watch(torch.Tensor, "__matmul__", everything=False)
    for attribute in ("eigh", "svd", "qr", "cholesky_ex"):
        watch(torch.linalg, attribute, everything=True)
    CALLS[name](m)
    assert all(state == ["ieee", "ieee"] for state in seen)
    assert seen or name == "orthogonality_error"


COMPILED = [name for name in CALLS if name not in ("randomized_basis", "cubic spectral")]


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_into_one_graph(name: str) -> None:
    """No graph break, also not at the data-dependent fallbacks, and the same numbers."""
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(matrix()), call(matrix()))
    poisoned = matrix()
    poisoned[1] = 0.0
    assert torch.equal(compiled(poisoned), call(poisoned))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_meta_tensors_have_the_real_ones_shapes(method: str, dtype: torch.dtype) -> None:
    """Plans run rules on meta tensors."""
    real = polar(torch.randn(2, 5, 3).to(dtype), method)
    meta = polar(torch.empty(2, 5, 3, dtype=dtype, device="meta"), method)
    for ours, planned in zip(real, meta):
        assert (ours is None) == (planned is None)
        if ours is not None and planned is not None:
            assert planned.device.type == "meta"
            assert (ours.shape, ours.dtype, ours.stride()) == (planned.shape, planned.dtype, planned.stride())


def test_meta_tensors_through_roots_and_bases() -> None:
    root = inverse_root(torch.empty(2, 4, 4, dtype=torch.float64, device="meta"), 1e-6)
    assert root.root.shape == (2, 4, 4)
    assert svd_basis(torch.empty(2, 5, 4, device="meta"), 3, "left").shape == (2, 5, 3)


@pytest.mark.parametrize("name", CALLS)
def test_results_are_detached(name: str) -> None:
    assert not CALLS[name](matrix().requires_grad_()).requires_grad


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_agrees_with_the_cpu(method: str) -> None:
    expected = polar(matrix(), method).factor
    result = polar(matrix().cuda(), method)
    # Another library's summation order, κ of about 10; the iterations amplify it by up to 485.
    torch.testing.assert_close(result.factor.cpu(), expected, rtol=0, atol=2e-4)
    assert int(result.fallbacks) == 0


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dwh", "newton_schulz", "polar_express"])
def test_the_default_path_on_cuda_does_not_synchronize(method: str) -> None:
    m = matrix().cuda()
    polar(m, method)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        polar(m, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
