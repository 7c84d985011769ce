"""Factors that are orthogonal and wrong. Orthogonality accepts each of them; the polar error must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimizers.linalg.inverse_root import inverse_root
from optimizers.linalg.newton_schulz import POLAR_EXPRESS, newton_schulz
from optimizers.linalg.polar import polar
from optimizers.linalg.spectra import orthogonality_error, polar_error
from tests.oracles.polar import rounded_to_bits, with_spectrum


def moment(kappa: float = 1e3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(with_spectrum(np.geomspace(1.0, 1.0 / kappa, 24), 96, 24, seed)[0]).float()


def judged(factor: torch.Tensor, matrix: torch.Tensor) -> tuple[float, float]:
    return float(orthogonality_error(factor)), float(polar_error(factor, matrix))


def test_the_exact_factor_passes_both() -> None:
    matrix = moment()
    orthogonality, error = judged(polar(matrix).factor, matrix)
    assert orthogonality < 1e-6
    assert error < 1e-6


def test_a_warm_started_inverse_root_is_orthogonal_and_wrong() -> None:
    """polar(M P) = polar(M) only if P commutes with MᵀM, and yesterday's P does not."""
    rng = np.random.default_rng(1)
    yesterday = moment().double()
    # A step of μ = 0.95: ‖ΔM‖/‖M‖ of some per cent, much of it in the small directions.
    change = torch.from_numpy(rng.standard_normal(yesterday.shape))
    change *= torch.linalg.matrix_norm(yesterday) / torch.linalg.matrix_norm(change)
    today = 0.95 * yesterday + 0.05 * change
    old = inverse_root(yesterday.mT @ yesterday, 1e-6).root
    start = today @ old
    warm = start @ inverse_root(start.mT @ start, 1e-6).root
    orthogonality, error = judged(warm, today)
    assert orthogonality < 1e-9
    assert error > 0.05


def _bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.from_numpy(rounded_to_bits(x.double().numpy(), bits)).float()


@pytest.mark.parametrize(("bits", "least"), [(10, 5e-4), (7, 5e-3)])
def test_low_precision_stages_with_a_clean_up_are_orthogonal_and_wrong(bits: int, least: float) -> None:
    """TF32 (10 bits) or bf16 (7) stages, then fp32 steps: the error of size eps·κ is frozen in."""
    matrix = moment()

    def run(rounding: int | None) -> torch.Tensor:
        def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b if rounding is None else _bits(a, rounding) @ _bits(b, rounding)

        x = (matrix / (1.02 * torch.linalg.matrix_norm(matrix))).mT
        for index in range(9):
            a, b, c = (v / 1.02**p for v, p in zip(POLAR_EXPRESS[min(index, 7)], (1, 3, 5)))
            gram = product(x, x.mT)
            x = a * x + product(b * gram + c * product(gram, gram), x)
        for _ in range(5):
            x = 1.5 * x - 0.5 * (x @ x.mT) @ x
        return x.mT

    orthogonality, error = judged(run(bits), matrix)
    assert orthogonality < 1e-6
    assert error > least
    # The same stages in fp32 are fine up to fp32's own eps·κ: the low precision is what did it.
    assert judged(run(None), matrix)[1] < least / 10


def test_column_scaling_first_is_orthogonal_and_wrong() -> None:
    """A diagonal preconditioner (AOL, Jacobi) does not commute with MᵀM either."""
    matrix = moment(1e2)
    scaled = matrix / torch.linalg.vector_norm(matrix, dim=0)
    orthogonality, error = judged(polar(scaled).factor, matrix)
    assert orthogonality < 1e-6
    assert error > 0.01


def test_the_triangular_factor_is_orthogonal_and_wrong() -> None:
    """QR orthonormalizes, but to another basis."""
    matrix = moment(1e2)
    orthogonality, error = judged(torch.linalg.qr(matrix)[0], matrix)
    assert orthogonality < 1e-6
    assert error > 0.1


def test_four_steps_instead_of_five() -> None:
    """At κ = 1e3 five steps miss the exact factor by 0.26 and four by 0.43 (log-uniform spectrum)."""
    matrix = moment()
    five, four = (judged(newton_schulz(matrix, steps, dtype=torch.float32), matrix)[1] for steps in (5, 4))
    assert 0.2 < five < 0.3
    assert four > 0.4


def test_an_fp32_gram_is_not_enough() -> None:
    """Forming the Gram in fp32 squares κ into fp32's rounding."""
    matrix = moment(1e3)
    gram = (matrix.mT @ matrix).double()
    factor = matrix @ inverse_root(gram, 1e-6).root.float()
    assert float(polar_error(factor, matrix)) > 1e3 * float(polar_error(polar(matrix).factor, matrix))
