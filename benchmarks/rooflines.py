"""Measure what bounds a step on this machine: rates of products and eigenproblems, and alternatives that are
not used.

    python -m benchmarks.rooflines [--threads 2] [--rounds 15] [--quick] [--json]

Products are those of Newton-Schulz on hidden matrices of LLaMA-60M and larger ones, one at a time, medians. Triangle:
XXᵀ by strips of 256 rows of which only the lower part is multiplied, then mirrored, against the whole product. Inverse
roots: of a stack of Grams by eigenvalues ("gram") and by Halley steps ("dwh"). Gram form: Newton-Schulz in bf16 whose
iterations work on XXᵀ and return to X after some of them; its error against fp64, and that of the plain iteration.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from optimizers.linalg.inverse_root import RootSolver
from optimizers.linalg.newton_schulz import JORDAN, newton_schulz

STRIP = 256


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call after a first call that does not count."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def triangle(x: Tensor, out: Tensor) -> None:
    """Compute out ← XXᵀ (k, k), multiplying each strip of rows only up to its diagonal."""
    for start in range(0, len(x), STRIP):
        stop = min(start + STRIP, len(x))
        torch.mm(x[start:stop], x[:stop].T, out=out[start:stop, :stop])
        out[:start, start:stop] = out[start:stop, :start].T


def gram_form(matrix: Tensor, plan: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Apply Newton-Schulz to one (k, l), k ≤ l; each entry of `plan` is a number of iterations that share one XXᵀ."""
    a, b, c = JORDAN
    x = matrix.to(dtype)
    x = x / x.norm()
    for iterations in plan:
        gram, scale, product = x @ x.T, 1.0, None
        for i in range(iterations):
            weight = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # W - aI
            # (scale I + P)(aI + w) = scale·a I + aP + scale·w + Pw
            product = weight if product is None else a * product + scale * weight + product @ weight
            scale *= a
            if i + 1 < iterations:
                half = torch.addmm(gram, weight, gram, beta=a)
                gram = torch.addmm(half, half, weight, beta=a)
        assert product is not None
        x = torch.addmm(x, product, x, beta=scale)
    return x


def products(k: int, length: int, rounds: int) -> dict[str, float]:
    """Return the GFlop/s of the products of one matrix (k, l), and the time of the triangle over that of the whole."""
    found: dict[str, float] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(k, length).to(dtype)
        weight, out = torch.randn(k, k).to(dtype), torch.empty(k, k, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        whole = seconds(partial(torch.mm, x, x.T), rounds)
        flops = 2e-9 * k * k * length
        found[f"{name} XXᵀ"] = flops / whole
        found[f"{name} WX"] = flops / seconds(partial(torch.mm, weight, x), rounds)
        if dtype != torch.float64:
            found[f"{name} triangle / whole"] = seconds(partial(triangle, x, out), rounds) / whole
    return found


def roots(count: int, rank: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a batch of inverse roots by each exact method on Gram matrices."""
    moments = torch.randn(count, rank, 4 * rank, dtype=torch.float64)
    grams = moments @ moments.mT
    solvers = {method: RootSolver(method, 1e-6, dtype=torch.float32) for method in ("gram", "dwh")}
    return {method: 1e3 * seconds(partial(solve, grams), rounds) for method, solve in solvers.items()}


def gram_form_errors(k: int, length: int) -> dict[str, float]:
    """Return ‖O - O₆₄‖_F / ‖O₆₄‖_F of five iterations in bf16 on a Gaussian matrix."""
    matrix = torch.randn(k, length, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(matrix.double(), dtype=torch.float64)
    forms = {
        "plain": newton_schulz(matrix).double(),
        "two at a time": gram_form(matrix, (2, 2, 1), torch.bfloat16).double(),
        "three at a time": gram_form(matrix, (2, 3), torch.bfloat16).double(),
    }
    return {name: float((form - exact).norm() / exact.norm()) for name, form in forms.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small matrices: that it runs, not how fast")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    shapes = [(32, 48)] if given.quick else [(512, 512), (512, 1376), (1024, 1024), (1024, 2736)]
    rank = 8 if given.quick else 128
    results: dict[str, dict[str, float]] = {
        f"products {k}×{length}, GFlop/s": products(k, length, given.rounds) for k, length in shapes
    }
    results[f"56 inverse roots of {rank}×{rank}, ms"] = roots(56, rank, given.rounds)
    k, length = shapes[min(1, len(shapes) - 1)]
    results[f"error of bf16 Newton-Schulz in Gram form, {k}×{length}"] = gram_form_errors(k, length)
    if given.json:
        print(json.dumps({"schema_version": 1, "results": results}, ensure_ascii=False))
        return 0
    for title, values in results.items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name:26} {value:.3g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
