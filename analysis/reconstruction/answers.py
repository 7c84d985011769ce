"""The question of a job, its answer in a few sentences from the tables alone, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from analysis.comparison.statistics import ALPHA
from analysis.formatting import listing, plural, significant
from analysis.reconstruction.config import ReconstructionConfig
from analysis.reconstruction.page_tables import with_interval
from analysis.reconstruction.subjects import TableRow
from analysis.reconstruction.susceptibility import SCOPE

SCALES = {"margin": "weights scaled to a least margin of 1", "raw": "raw weights"}
NAMES = {"nn_top5_margin": "distance", "ncc_top5": "correlation"}


def question(config: ReconstructionConfig) -> str:
    """Return the question of the page."""
    if config.mode == "fixture":
        return "Do the weights of an exactly trained network determine the training images?"
    return "Can training images be recovered from weights, and does it depend on training time or optimizer?"


def scope(config: ReconstructionConfig) -> str:
    """Return what the answer rests on."""
    if config.mode == "fixture":
        return "Exact statements about one network in closed form, recomputed in fp64."
    if config.checkpoint is not None:
        return f"One checkpoint and its batch. {SCOPE}"
    sets = plural(config.data_sets, "set of images", "sets of images")
    return f"{sets} with {plural(config.seeds, 'victim')} each per optimizer. {SCOPE}"


def answer(config: ReconstructionConfig, tables: Mapping[str, Sequence[TableRow]]) -> str:
    """Return the result in a few sentences; what is not significant after Holm's correction is called open."""
    sentences = [_alternatives(config, tables["alternatives"])]
    pairs = list(tables["paired"])
    if pairs:
        least = min(row["radius"] for row in pairs)
        pairs = [row for row in pairs if row["radius"] == least and row["objective"] == "l2"]
        sentences += [
            _training(
                [row for row in pairs if row["contrast"] == "training"],
                [row for row in pairs if row["contrast"] == "conventions"],
            ),
            _optimizers([row for row in pairs if row["contrast"] == "optimizers"]),
            _offsets([row for row in pairs if row["contrast"] == "offsets"]),
        ]
    sentences.append(_wrong_radius(tables["attack"]))
    return " ".join(sentence for sentence in sentences if sentence) or "Certificates only."


def verdict(row: TableRow) -> str:
    """Return "less", "more" or "open": how the first member of a pair is recovered, by the p-value after Holm."""
    if row["p_holm"] is None or row["p_holm"] > ALPHA:
        return "open"
    is_distance = row["contrast"] != "optimizers" and not row["measure"].startswith("ncc")
    return "less" if (row["difference"] > 0) == is_distance else "more"


def _training(rows: Sequence[TableRow], conventions: Sequence[TableRow]) -> str:
    if not rows or rows[0]["half_width"] is None:
        return ""
    words = {"less": "recovered less", "more": "recovered more", "open": "open"}
    sentences = []
    for pair in dict.fromkeys(row["pair"] for row in rows):
        own = [row for row in rows if row["pair"] == pair]
        parts = []
        for weights in dict.fromkeys(row["weights"] for row in own):
            figures = [
                f"{NAMES[row['measure']]} {words[verdict(row)]} "
                f"({with_interval(row['difference'], row['half_width'])})"
                for row in own
                if row["weights"] == weights
            ]
            parts.append(f"on {SCALES[weights]} {listing(figures)}")
        sentences.append(f"{pair}: {listing(parts)}.")
        sentences.append(_convention(own, [row for row in conventions if row["pair"] == pair]))
    return " ".join(sentence for sentence in sentences if sentence)


def _convention(training: Sequence[TableRow], conventions: Sequence[TableRow]) -> str:
    """Say whether the effect of training depends on the scale of the weights: by its own test, not by two verdicts."""
    if not conventions:
        return ""
    figures = listing(
        [
            f"{NAMES[row['measure']]} {with_interval(row['difference'], row['half_width'])}"
            for row in conventions
        ]
    )
    if any(verdict(row) != "open" for row in conventions):
        return f"The outcome depends on the scale of the weights under attack (raw − scaled: {figures})."
    clear = {row["weights"] for row in training if verdict(row) != "open"}
    start = "Significant under one convention only; the" if len(clear) == 1 else "The"
    return f"{start} difference of the conventions is open (raw − scaled: {figures})."


def _optimizers(rows: Sequence[TableRow]) -> str:
    if not rows or rows[0]["half_width"] is None:
        return ""
    weights = rows[0]["weights"]
    by_pair: dict[str, list[str]] = {}
    for row in rows:
        if row["weights"] == weights:
            by_pair.setdefault(row["pair"], []).append(verdict(row))
    clear = []
    for pair, verdicts in by_pair.items():
        # Both measures must agree.
        if set(verdicts) in ({"more"}, {"less"}):
            one, other = pair.split(" − ")
            clear.append(
                f"{one} leaks more than {other}"
                if verdicts[0] == "more"
                else f"{other} leaks more than {one}"
            )
    if not clear:
        return "No two optimizers differ clearly in distance and correlation."
    rest = "" if len(clear) == len(by_pair) else "; other pairs are open"
    return f"In distance and correlation, {listing(clear)}, on {SCALES[weights]}{rest}."


def _offsets(rows: Sequence[TableRow]) -> str:
    """Say what an attacker loses who believes in another offset than the first."""
    if not rows or rows[0]["half_width"] is None:
        return ""
    words = {"less": "recovered less", "more": "recovered more", "open": "open"}
    sentences = []
    for pair, weights in dict.fromkeys((row["pair"], row["weights"]) for row in rows):
        figures = [
            f"{NAMES[row['measure']]} {words[verdict(row)]} ({with_interval(row['difference'], row['half_width'])})"
            for row in rows
            if (row["pair"], row["weights"]) == (pair, weights)
        ]
        sentences.append(f"{pair}, {SCALES[weights]}: {listing(figures)}.")
    return " ".join(sentences)


def _alternatives(config: ReconstructionConfig, rows: Sequence[TableRow]) -> str:
    if not rows:
        return ""
    good = [row for row in rows if not row["is_control"] and row["passed"]]
    controls = [row for row in rows if row["is_control"]]
    far = max((row["nn_distance"] for row in good), default=0.0)
    refused = sum(not row["passed"] for row in controls)
    start = "No: " if config.mode == "fixture" and good else ""
    return (
        f"{start}{len(good)} other training sets explain the weights, the farthest {significant(far)} away from any "
        f"training image; {refused} of {len(controls)} controls are refused."
    )


def _wrong_radius(attack: Sequence[TableRow]) -> str:
    attacks = [row for row in attack if row["kind"] == "attack"]
    if len({row["radius"] for row in attacks}) < 2:
        return ""
    far = [row for row in attacks if row["radius"] == max(r["radius"] for r in attacks)]
    below = fmean(row["beats_truth"] for row in far)
    return (
        f"With candidates started at {far[0]['radius']:g} times the usual norm, {below:.0%} of the attacks fit the "
        f"weights better than the training images do."
    )
