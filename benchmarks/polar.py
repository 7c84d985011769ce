"""Measure accuracy and cost of the polar methods (method × κ × shape), and the energy that randomized bases
capture.

    python benchmarks/polar.py                 # rewrites the tables in docs/polar.md and docs/img/polar.png
    python benchmarks/polar.py --quick --out DIR

The error is ‖O - O*‖_F/√k, O* the fp64 SVD factor of the same fp32 matrix under the same cut. Spectra are
log-uniform. Times are medians of interleaved rounds in one process, per matrix; they depend on the machine,
the errors do not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optimizers.linalg.newton_schulz import newton_schulz
from optimizers.linalg.polar import polar
from optimizers.linalg.robust import default_rtol
from optimizers.linalg.subspace import randomized_basis, svd_basis, test_matrix

BEGIN, END = "<!-- tables: written by benchmarks/polar.py -->", "<!-- end of tables -->"
NO_CUT = 1e-12

METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "svd (fp32)": lambda m, cut: polar(m, "svd", cut).factor,
    "qr_svd (fp64)": lambda m, cut: polar(m, "qr_svd", cut).factor,
    "gram": lambda m, cut: polar(m, "gram", cut).factor,
    "dwh": lambda m, cut: polar(m, "dwh", cut).factor,
    "newton_schulz 5": lambda m, cut: polar(m, "newton_schulz").factor,
    "newton_schulz 5, bf16": lambda m, cut: newton_schulz(m, dtype=torch.bfloat16),
    "cubic 5": lambda m, cut: polar(m, "cubic").factor,
    "polar_express 8": lambda m, cut: polar(m, "polar_express").factor,
}


@dataclass(frozen=True)
class Plan:
    """What is measured: shapes (batch, short, long), κ, rounds of timing, (m, n, rank) of the basis study."""

    shapes: tuple[tuple[int, int, int], ...]
    kappas: tuple[float, ...]
    rounds: int
    basis: tuple[int, int, int]


FULL = Plan(
    ((8, 64, 256), (4, 128, 512), (2, 256, 1024)), tuple(10.0**e for e in range(9)), 5, (768, 512, 64)
)
QUICK = Plan(((2, 8, 24),), (1.0, 1e4, 1e8), 1, (48, 32, 8))


def stack(batch: int, m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """Return fp32 matrices (batch, m, n), m ≤ n, with singular values `sigma` (m,) and Haar-distributed vectors."""
    generator = torch.Generator().manual_seed(seed)

    def haar(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(batch, rows, columns, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0]

    return ((haar(m, m) * sigma) @ haar(n, m).mT).float()


def errors(plan: Plan, rtol: float | None) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Return (short, long) → method → median error over the batch, for each κ."""
    table: dict[tuple[int, int], dict[str, list[float]]] = {}
    for batch, m, n in plan.shapes:
        rows = table.setdefault((m, n), {name: [] for name in METHODS})
        for kappa in plan.kappas:
            matrices = stack(
                batch, m, n, torch.logspace(0, -torch.tensor(kappa).log10(), m, dtype=torch.float64)
            )
            cut = default_rtol((m, n), torch.float32) if rtol is None else rtol
            exact = polar(matrices.double(), "svd", cut).factor
            for name, method in METHODS.items():
                off = torch.linalg.matrix_norm(method(matrices, cut).double() - exact) / m**0.5
                rows[name].append(float(off.median()))
    return table


def milliseconds(plan: Plan) -> dict[tuple[int, int], dict[str, float]]:
    """Return (short, long) → method → milliseconds per matrix at κ = 1e3."""
    table: dict[tuple[int, int], dict[str, float]] = {}
    for batch, m, n in plan.shapes:
        matrices = stack(batch, m, n, torch.logspace(0, -3, m, dtype=torch.float64))
        cut = default_rtol((m, n), torch.float32)
        taken: dict[str, list[float]] = {name: [] for name in METHODS}
        for turn in range(plan.rounds + 1):
            for name, method in METHODS.items():
                start = time.perf_counter()
                method(matrices, cut)
                if turn:  # the first round warms up
                    taken[name].append((time.perf_counter() - start) / batch * 1e3)
        table[m, n] = {name: statistics.median(times) for name, times in taken.items()}
    return table


def energies(plan: Plan) -> list[tuple[str, str, list[float]]]:
    """Return (spectrum, side, energy of each basis over the best possible) on a gradient changed by 30 %."""
    m, n, rank = plan.basis
    index = torch.arange(1, n + 1, dtype=torch.float64)
    results = []
    for label, sigma in (
        ("i^-0.5", index**-0.5),
        ("i^-1", 1 / index),
        ("exp(-i/40) + 1e-3", (-index / 40).exp() + 1e-3),
    ):
        old = stack(1, n, m, sigma)[0].T
        noise = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
        new = old + 0.3 * noise * torch.linalg.matrix_norm(old) / torch.linalg.matrix_norm(noise)
        best = float(torch.linalg.svdvals(new)[:rank].square().sum())
        sketch = test_matrix(0, "weight", 1, (n, min(rank + 8, n)))
        for side in ("left", "right"):
            kept = svd_basis(old, rank, side)
            bases = [kept] + [randomized_basis(new, rank, side, sketch, q) for q in (1, 2)]
            bases += [randomized_basis(new, rank, side, sketch, q, warm=kept) for q in (1, 2)]
            inside = [(b.mT @ new if side == "left" else new @ b).square().sum() for b in bases]
            results.append((label, side, [float(value) / best for value in inside]))
    return results


def markdown(
    plan: Plan,
    cut: dict[tuple[int, int], dict[str, list[float]]],
    uncut: dict[tuple[int, int], dict[str, list[float]]],
    times: dict[tuple[int, int], dict[str, float]],
    energy: list[tuple[str, str, list[float]]],
) -> str:
    """Return the tables as docs/polar.md contains them."""
    head = " | ".join(f"{kappa:.0e}" for kappa in plan.kappas)
    lines: list[str] = []
    for title, table in (("Default cut", cut), (f"No cut (`rtol={NO_CUT:g}`)", uncut)):
        for (m, n), rows in table.items():
            lines += ["", f"**{title}, {m}×{n}**: error for κ =", "", f"| method | {head} | ms |"]
            lines += ["|---" * (len(plan.kappas) + 2) + "|"]
            for name, values in rows.items():
                cells = " | ".join(f"{value:.1e}" for value in values)
                lines.append(f"| {name} | {cells} | {times[m, n][name]:.2f} |")
    m, n, rank = plan.basis
    lines += [
        "",
        f"**Energy in a basis of {rank}, {m}×{n}**, over the best possible, gradient changed by 30 %:",
    ]
    lines += [
        "",
        "| spectrum | side | old basis kept | random q=1 | random q=2 | warm q=1 | warm q=2 |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {label} | {side} | " + " | ".join(f"{v:.4f}" for v in row) + " |" for label, side, row in energy
    ]
    lines += ["", f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), CPU."]
    return "\n".join(lines).strip() + "\n"


def plot(plan: Plan, table: dict[tuple[int, int], dict[str, list[float]]], path: Path) -> None:
    """Draw the error over κ without a cut, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(table), figsize=(4.6 * len(table), 4.4), sharey=True, squeeze=False)
    for axis, ((m, n), rows) in zip(axes[0], table.items()):
        for name, values in rows.items():
            approximate = "5" in name or "8" in name
            axis.loglog(plan.kappas, values, "--" if approximate else "-o", ms=3, lw=1.3, label=name)
        axis.set(title=f"{m}×{n}", xlabel="κ(M)", ylim=(1e-9, 2))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("‖O - O*‖_F/√k")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def replaced(page: str, tables: str) -> str:
    """Return `page` with the text between the two markers replaced; of a page without markers, just the tables."""
    if BEGIN not in page or END not in page:
        return f"{BEGIN}\n\n{tables}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, then write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, not what comes out")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "docs", help="folder of polar.md"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        cut, uncut = errors(plan, None), errors(plan, NO_CUT)
        tables = markdown(plan, cut, uncut, milliseconds(plan), energies(plan))
    finally:
        torch.set_num_threads(threads)
    page = options.out / "polar.md"
    options.out.mkdir(parents=True, exist_ok=True)
    page.write_text(replaced(page.read_text() if page.exists() else "", tables))
    plot(plan, uncut, options.out / "img" / "polar.png")
    print(tables)


if __name__ == "__main__":
    main()
