"""The section of docs/RESULTS.md on the public logs of track 3, computed from their summary alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.comparison import seed_noise, statistics, track3
from analysis.comparison.seed_noise import SeedSpread
from analysis.results import track3_summary
from analysis.results.markdown import render as render_template
from analysis.results.markdown import table
from analysis.results.prediction import Correlation, rank_correlation, within_arms

Floats = NDArray[np.float64]
Arms = Sequence[Mapping[str, Any]]
DIFFERENCES = (0.0005, 0.001, 0.002, 0.005)
"""Nats/token, for which the runs that are needed are given."""


def render(summary: Mapping[str, Any]) -> str:
    """Return the section as Markdown."""
    arms: Arms = summary["arms"]
    samples = {arm["arm"]: _known(_values(arm, "final")) for arm in arms}
    wide = seed_noise.wide_arms(samples)
    alike = [arm for arm in arms if arm["arm"] not in wide]
    noise = seed_noise.pooled([samples[arm["arm"]] for arm in alike])
    equal_p = seed_noise.equal_spreads([samples[arm["arm"]] for arm in alike])
    values = dict(
        {key: summary[key] for key in ("source", "model", "runs", "copies", "folders")},
        files=len(summary["files"]),
        used=sum(len(arm["runs"]) for arm in arms),
        diverged=sum(arm["diverged"] for arm in arms),
        arms=len(arms),
        target=track3.TARGET,
        sigma=track3.SIGMA,
        margin=track3.MARGIN,
        near=f"{track3_summary.NEAR:.0%}",
        noise=_noise(alike, summary["shares"], noise),
        wide="; ".join(
            f"{name} ({ratio:.1f} times the others, p {_p(p)})" for name, (ratio, p) in wide.items()
        ),
        noise_of_all=f"{seed_noise.pooled(list(samples.values())).sd:.5f}",
        rejected="rejected" if equal_p < statistics.ALPHA else "not rejected",
        equal_p=_p(equal_p),
        needed=_needed(noise),
        prediction=_prediction(alike, summary["shares"], summary["steps"]),
        within=_within(alike, arms, summary["shares"]),
        findings=_findings(summary),
        submissions=_submissions(arms),
    )
    return render_template("track3.md.j2", values)


def _noise(arms: Arms, shares: Sequence[float], end: SeedSpread) -> str:
    rows = []
    for i, share in enumerate(shares):
        samples = [_known(_values(arm, "at_share", i)) for arm in arms]
        rows.append((f"{share:.0%} of the run", seed_noise.pooled(samples)))
    rows.append(("the end", end))
    return table(
        ("at", "degrees of freedom", "deviation", "95 % interval"),
        [(name, str(at.freedom), f"{at.sd:.5f}", f"{at.low:.5f} to {at.high:.5f}") for name, at in rows],
    )


def _needed(noise: SeedSpread) -> str:
    return table(
        (
            "difference (nats/token)",
            "runs of each arm",
            "at the low end",
            "at the high end",
            "runs for the rule",
        ),
        [
            (
                f"{difference:g}",
                *(_count(statistics.runs_needed(sd, difference)) for sd in (noise.sd, noise.low, noise.high)),
                _count(runs_for_the_rule(noise.sd, difference)),
            )
            for difference in DIFFERENCES
        ],
    )


def runs_for_the_rule(sd: float, difference: float) -> int:
    """Return the least n with P((target − mean)·√n ≥ margin) ≥ 80 % for normal runs with deviation ``sd``."""
    z = float(stats.norm.ppf(statistics.POWER))
    return max(1, math.ceil(((track3.MARGIN + z * sd) / difference) ** 2 - 1e-9))


def _prediction(arms: Arms, shares: Sequence[float], steps: Sequence[int]) -> str:
    ends, reached = _means(arms, "final"), _means(arms, "reaches_target")
    by_share = [rank_correlation(_means(arms, "at_share", i), ends) for i in range(len(shares))]
    by_step = [rank_correlation(_means(arms, "at_step", i), reached) for i in range(len(steps))]
    return table(
        ("figure in progress", "figure predicted", "rank correlation"),
        [
            *(
                (f"loss at {share:.0%} of the own run", "final loss", _shown(found, "arms"))
                for share, found in zip(shares, by_share, strict=True)
            ),
            *(
                (f"loss at step {step:,}", f"steps to {track3.TARGET}", _shown(found, "arms"))
                for step, found in zip(steps, by_step, strict=True)
            ),
        ],
    )


def _within(alike: Arms, arms: Arms, shares: Sequence[float]) -> str:
    """Return the correlations over the arms whose runs vary alike, and over all arms next to them."""

    def shown(chosen: Arms, i: int) -> str:
        pairs = [(_values(arm, "at_share", i), _values(arm, "final")) for arm in chosen]
        return _shown(within_arms(pairs), "degrees of freedom")

    heads = ("figure of a run", "correlation with its final loss", "with the arms that are left out")
    rows = [(f"loss at {share:.0%}", shown(alike, i), shown(arms, i)) for i, share in enumerate(shares)]
    columns = 2 if len(alike) == len(arms) else 3
    return table(heads[:columns], [row[:columns] for row in rows])


def _findings(summary: Mapping[str, Any]) -> str:
    lines = [f"- `{finding['code']}`: {finding['message']}" for finding in summary["findings"]]
    lines += [f"- {remark}" for remark in summary["remarks"]]
    return "\n".join(lines) or "Nothing was found."


def _submissions(arms: Arms) -> str:
    rows = []
    for arm in sorted(arms, key=lambda arm: (arm["first_passing_step"] or math.inf, arm["arm"])):
        finals = _known(_values(arm, "final"))
        found, rule = statistics.interval(finals), track3.rule(finals, diverged=arm["diverged"])
        spread = (f"{found.half_width:.4f}", f"{found.sd:.5f}") if found.n > 1 else ("–", "–")
        mean = f"{found.mean:.4f}" if found.n else "–"
        margin = f"{rule.margin:.4f}".replace("-", "−") if found.n else "–"
        margin += "" if rule.passed else f" (fails{f', {rule.diverged} diverged' if rule.diverged else ''})"
        step = "–" if arm["first_passing_step"] is None else f"{arm['first_passing_step']:,}"
        rows.append((arm["arm"], str(len(arm["runs"])), f"{arm['last_step']:,}", mean, *spread, margin, step))
    return table(
        ("arm", "runs", "last step", "mean", "±", "deviation", "margin at the end", "first step"), rows
    )


def _values(arm: Mapping[str, Any], key: str, index: int | None = None) -> Floats:
    """Return a figure of each run, NaN where it is not known."""
    found = [run[key] if index is None else run[key][index] for run in arm["runs"]]
    return np.array([math.nan if value is None else value for value in found], float)


def _known(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _means(arms: Arms, key: str, index: int | None = None) -> list[float]:
    """Return the mean of a figure for each arm; NaN where a run lacks it."""
    return [float(_values(arm, key, index).mean()) for arm in arms]


def _shown(found: Correlation, of: str) -> str:
    if math.isnan(found.value):
        return "–"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f}; {found.n} {of})".replace("-", "−")


def _count(n: int | None) -> str:
    return "more than 10,000" if n is None else f"{n:,}"


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"
