"""What a matrix of results carries: the contrast of matched pairs, the interaction as a whole, and a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.comparison.statistics import ALPHA, Interval
from analysis.matrix import two_way
from analysis.matrix.results import Matrix
from analysis.matrix.two_way import Floats, VarianceSource


@dataclass(frozen=True)
class Verdict:
    """The judged matrix.

    Attributes:
        variance: analysis of variance; empty for an incomplete matrix.
        pairs: what main effects leave of each cell's mean, shape (rows, columns).
        matching: contrast of matched pairs over seeds; None where no pair matches or the matrix is incomplete.
        resampled: its 95 % interval over resampled seeds, and examples where every run kept its answers; None likewise.
        interacts: how much the fine-tuning optimizers differ depends on the optimizer of pretraining, on these
            validation examples.
        favours: ``matched`` or ``other`` pairs; None where the numbers carry neither.
        sentence: the result.
        detail: the numbers behind it.
    """

    variance: list[VarianceSource]
    pairs: Floats | None
    matching: Interval | None
    resampled: tuple[float, float] | None
    interacts: bool
    favours: str | None
    sentence: str
    detail: str


def judge(matrix: Matrix) -> Verdict:
    """Judge a matrix; what fewer than two seeds, rows or columns can't carry is not claimed."""
    if not matrix.is_complete:
        optimizers = f"{len(matrix.rows)} × {len(matrix.columns)} optimizers"
        found = f"Found: {optimizers} and {len(matrix.seeds)} seeds that every cell has."
        sentence = "There is no complete table of at least two pretraining and two fine-tuning optimizers."
        return Verdict([], None, None, None, False, None, sentence, found)
    variance = two_way.variance(matrix.values)
    pairs = two_way.interactions(matrix.values.mean(2))
    interaction = variance[2]
    interacts = interaction.p < ALPHA
    weights = two_way.matching_weights(matrix.rows, matrix.columns)
    matching = resampled = favours = None
    if weights is not None:
        matching = two_way.matching(matrix.values, weights)
        of_examples = matrix.values[..., None] if matrix.of_examples is None else matrix.of_examples
        resampled = two_way.resampled_matching(of_examples, weights) if len(matrix.seeds) > 1 else None
        favours = _favours(matrix, matching, resampled)
    sentence = _sentence(matrix, matching, favours, interacts)
    detail = _detail(matrix, interaction, matching, resampled)
    return Verdict(variance, pairs, matching, resampled, interacts, favours, sentence, detail)


def _favours(matrix: Matrix, matching: Interval, resampled: tuple[float, float] | None) -> str | None:
    """Return the better pairs if zero is outside of both intervals, over seeds and over resamples."""
    if resampled is None or not abs(matching.mean) > matching.half_width:
        return None
    if resampled[0] <= 0 <= resampled[1]:
        return None
    return "matched" if matching.mean * matrix.measure.sign > 0 else "other"


def _sentence(matrix: Matrix, matching: Interval | None, favours: str | None, interacts: bool) -> str:
    measure = matrix.measure
    if len(matrix.seeds) < 2:
        return "One seed: the table says nothing about what another seed would give."
    if favours is not None and matching is not None:
        better = "helps" if favours == "matched" else "hurts"
        direction = "raises" if matching.mean > 0 else "lowers"
        return (
            f"Fine-tuning with the optimizer of pretraining {better}: it {direction} {measure.title} by "
            f"{measure.gap_text(abs(matching.mean))} against what the two optimizers give by themselves."
        )
    if interacts:
        return (
            "How much the fine-tuning optimizers differ depends on the optimizer of pretraining (on these validation "
            "examples), but a matched pair is not shown to be better or worse than others."
        )
    return "Nothing shows that the optimizer of pretraining changes which optimizer fine-tunes best."


def _detail(
    matrix: Matrix,
    interaction: VarianceSource,
    matching: Interval | None,
    resampled: tuple[float, float] | None,
) -> str:
    measure, seeds = matrix.measure, len(matrix.seeds)
    parts: list[str] = []
    if matching is not None and seeds > 1:
        low, high = matching.mean - matching.half_width, matching.mean + matching.half_width
        parts.append(
            f"Matched pairs: {measure.gap_text(matching.mean)}, 95 % {measure.gap(low)} to {measure.gap(high)} over "
            f"{seeds} seeds (Student's t)"
        )
        if resampled is not None:
            what = "seeds and examples" if matrix.of_examples is not None else "seeds"
            parts.append(f"{measure.gap(resampled[0])} to {measure.gap(resampled[1])} over resampled {what}")
        parts.append(f"an effect below {measure.gap_text(matching.half_width)} could not be told from none")
    if math.isfinite(interaction.p):
        error = len(matrix.rows) * (len(matrix.columns) - 1) * (seeds - 1)
        test = f"F({interaction.df}, {error}) = {interaction.f:.2f}, p = {interaction.p:.2g}"
        parts.append(f"interaction as a whole: {test}")
    return "; ".join(parts) + "." if parts else ""
