"""Tables for readers: means over sets of images with their intervals, in the order in which they answer the question.

Files and JSON hold every row and column; these tables hold what fits a page. Terminal and page print the same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from analysis.formatting import significant
from analysis.reconstruction.subjects import TableRow
from analysis.text_tables import TextTable

MOST_COLUMNS = 7
"""Most networks of a table that is shown with a column per network."""
MEASURES = {"nn_top5_margin": "distance on the margin", "ncc_top5": "correlation"}
ATTACKS = {"l2": "ℓ2", "matched": "matched", None: "–"}
KINDS = {
    "attack": "attack",
    "pooled": "all attacks pooled",
    "heldout": "held-out images",
    "gaussian": "Gaussians",
    "pair_means": "means of pairs of training images",
    "oracle": "attack from the training images",
}
ALTERNATIVE_KINDS = {
    "null_split": "split orthogonal to all images",
    "in_span_split": "split inside the images' span",
    "dead_pixel_split": "split along dead pixels",
    "merge": "merged groups",
    "margin_split": "split along the margin",
    "random_split": "control: random directions",
}
_CERTIFICATE = {
    "margin_min": "least margin",
    "residual": "residual, own gates",
    "residual_clarke": "residual, Clarke gates",
    "alignment_l2": "alignment ℓ2",
    "alignment_spectral": "alignment spectral",
    "alignment_linf": "alignment ℓ∞",
    "alignment_hybrid": "alignment, own norm",
    "outside": "W₁ outside the span",
    "split_radius": "split radius",
    "groups": "groups",
}


def page_tables(tables: Mapping[str, Sequence[TableRow]]) -> list[TextTable]:
    """Return the tables that have rows."""
    attack = tables["attack"]
    found = [
        _paired(tables["paired"], "training", "Trained longer"),
        _paired(tables["paired"], "conventions", "Trained longer: raw against scaled weights"),
        _paired(tables["paired"], "optimizers", "Optimizer against optimizer"),
        _paired(tables["paired"], "offsets", "What the attacker believes of the offset"),
        _susceptibility(tables["susceptibility"]),
        _duplicates(tables["duplicates"]),
        _attacks(attack),
        _equal_fit(attack),
        _certificates(tables["certificate"]),
        _alternatives(tables["alternatives"]),
    ]
    return [table for table in found if table.rows]


def cell(value: Any) -> str:
    """Return a value as readers see it: three digits, yes or no, a dash for a missing one."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def with_interval(mean: float, half: float | None) -> str:
    """Return a mean with its half width, three decimals."""
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def _paired(rows: Sequence[TableRow], contrast: str, title: str) -> TextTable:
    what = {
        "training": "Distances and correlations themselves.",
        "conventions": "What training changes on raw weights less what it changes on scaled weights.",
        "optimizers": "Advantages over held-out images: 0 is chance, 1 the image itself.",
        "offsets": "Distances and correlations of the attack with one offset less those with the first.",
    }
    caption = (
        "Differences within sets of images with Student's paired 95 % interval over sets. A longer distance and a "
        "lower correlation mean less recovery. p: paired t-test, after Holm's correction for the rows of one attack. "
        + what[contrast]
    )
    shows_offset = _has_offsets(rows)
    shown = [
        [
            row["pair"],
            f"{ATTACKS[row['objective']]}, {row['weights']}",
            cell(row["radius"]) if contrast == "offsets" else _start(row, shows_offset),
            MEASURES[row["measure"]],
            f"{row['first']:.3f}, {row['second']:.3f}",
            with_interval(row["difference"], row["half_width"]),
            cell(row["p_holm"]),
            f"{row['leaks_more']} of {row['data_sets']}",
        ]
        for row in rows
        if row["contrast"] == contrast
    ]
    heads = [
        "pair",
        "attack, weights",
        "radius",
        "measure",
        "means",
        "difference",
        "p (Holm)",
        "first leaks more",
    ]
    return TextTable(heads, shown, title, caption)


def _susceptibility(rows: Sequence[TableRow]) -> TextTable:
    shows_offset = _has_offsets(rows)
    shown = [
        [
            row["optimizer"],
            cell(row["step"]),
            f"{ATTACKS[row['objective']]}, {row['weights']}",
            _start(row, shows_offset),
            with_interval(row["advantage_nn_top5_margin"], row["half_width_nn_top5_margin"]),
            with_interval(row["advantage_ncc_top5"], row["half_width_ncc_top5"]),
            f"{row['beats_truth']:.0%}",
            f"{row['data_sets']} × {row['seeds']}",
        ]
        for row in rows
    ]
    heads = ["optimizer", "step", "attack, weights", "radius", "advantage, distance", "advantage, correlation",
             "fits better than truth", "sets × victims"]  # fmt: skip
    caption = (
        "Advantage: 0 is what as many held-out images get, 1 the image itself. On the margin, chance is the nearer of "
        "held-out images as they are and rescaled. ±: 95 % over sets of images, none for one set."
    )
    return TextTable(heads, shown, "How much each optimizer leaks", caption)


def _duplicates(rows: Sequence[TableRow]) -> TextTable:
    shows_offset = _has_offsets(rows)
    shown = [
        [
            _network(row),
            KINDS[row["kind"]],
            _attack_name(
                row["objective"], row["weights"], row["radius"], row["offset"] if shows_offset else None
            ),
            *(with_interval(row[f"hits_{t}"], row[f"half_width_hits_{t}"]) for t in (10, 25, 50)),
        ]
        for row in rows
        if row["kind"] != "gaussian"
    ]
    heads = ["network", "candidates", "attack, weights, radius", "within 10 %", "25 %", "50 %"]
    caption = (
        "Share of training images that a candidate equals up to 10, 25 and 50 % of the image's norm, candidates on the "
        "margin. As many held-out images show how much of it is chance."
    )
    return TextTable(heads, shown, "How often a candidate equals a training image", caption)


def _attacks(rows: Sequence[TableRow]) -> TextTable:
    keys = ("optimizer", "step", "kind", "objective", "weights", "radius", "offset", "candidates")
    shows_offset = _has_offsets(rows)
    figures = (
        "residual",
        "residual_true",
        "nn_top5",
        "nn_top5_margin",
        "ncc_top5",
        "good_published",
        "good_mutual",
    )
    sizes = {row["candidates"] for row in rows if row["kind"] == "attack"}
    shown = []
    for key, means in _means(rows, keys, figures):
        optimizer, step, kind, objective, weights, radius, offset, candidates = key
        # Baselines of the size of the pool are in the files.
        if kind in ("heldout", "gaussian", "pair_means") and candidates not in sizes:
            continue
        shown.append(
            [
                _network({"optimizer": optimizer, "step": step}),
                KINDS[kind],
                _attack_name(objective, weights, radius, offset if shows_offset else None),
                *(cell(means[name]) for name in figures[:5]),
                f"{cell(means['good_published'])}, {cell(means['good_mutual'])}",
            ]
        )
    heads = ["network", "candidates", "attack, weights, radius", "K", "K of the truth", "distance", "on margin",
             "correlation", "SSIM > 0.4"]  # fmt: skip
    caption = (
        "Means over sets and victims. K: relative squared residual. Distance, correlation: of the five best-matched "
        "images. SSIM: number of images above 0.4, matched as published (best of the candidates nearest to the image, "
        "Gaussian window) and mutually (best of all candidates, both images stretched)."
    )
    return TextTable(heads, shown, "Attacks and baselines", caption)


def _network(row: TableRow) -> str:
    return f"{row['optimizer']}, step {row['step']}" if row["step"] else row["optimizer"]


def _has_offsets(rows: Sequence[TableRow]) -> bool:
    """Return True if attackers of these rows believe in several offsets, so that each row must name its own."""
    return len({row["offset"] for row in rows if row.get("offset") is not None}) > 1


def _start(row: TableRow, shows_offset: bool) -> str:
    return f"{cell(row['radius'])}, offset {row['offset']:g}" if shows_offset else cell(row["radius"])


def _attack_name(
    objective: str | None, weights: str | None, radius: float | None, offset: float | None
) -> str:
    if objective is None:
        return "–"
    parts = [ATTACKS[objective], weights or "all", "" if radius is None else f"{radius:g}"]
    parts.append("" if offset is None else f"offset {offset:g}")
    return ", ".join(part for part in parts if part)


def _equal_fit(rows: Sequence[TableRow]) -> TextTable:
    attacks = [row for row in rows if row["kind"] == "attack"]
    keys = ("optimizer", "step", "objective", "weights", "radius", "offset")
    shows_offset = _has_offsets(rows)
    figures = ("level_step", "nn_top5_at_level", "nn_top5_margin_at_level", "ncc_top5_at_level")
    if len({row["radius"] for row in attacks}) < 2:
        return TextTable([], [])
    shown = []
    for key, means in _means(attacks, keys, figures):
        own = [row for row in attacks if tuple(row[k] for k in keys) == key]
        reached = sum(row["level_step"] is not None for row in own)
        start = _start({"radius": key[4], "offset": key[5]}, shows_offset)
        names = [key[0], cell(key[1]), f"{ATTACKS[key[2]]}, {key[3]}", start]
        shown.append([*names, f"{reached} of {len(own)}", *(cell(means[name]) for name in figures)])
    heads = ["optimizer", "step", "attack, weights", "radius", "reached", "at step", "distance", "on the margin",
             "correlation"]  # fmt: skip
    caption = (
        "Candidates when K first fell to attack.level: the same fit of the weights from other initial radii. Means "
        "over the attacks that reached it."
    )
    return TextTable(heads, shown, "Recovery at equal fit", caption)


def _certificates(rows: Sequence[TableRow]) -> TextTable:
    shown = [
        [_network({"optimizer": optimizer, "step": step}), *(cell(means[name]) for name in _CERTIFICATE)]
        for (optimizer, step), means in _means(rows, ("optimizer", "step"), tuple(_CERTIFICATE))
    ]
    caption = (
        "Means over sets and victims; networks are scaled to a least margin of 1. Alignment with the multipliers' "
        "gradient in a norm is 1 at a KKT point of that norm."
    )
    table = TextTable(["network", *_CERTIFICATE.values()], shown, "Certificates", caption)
    return table.transposed() if 0 < len(shown) <= MOST_COLUMNS else table


def _alternatives(rows: Sequence[TableRow]) -> TextTable:
    groups: dict[tuple[Any, ...], list[TableRow]] = defaultdict(list)
    for row in rows:
        key = (
            row["optimizer"],
            row["step"],
            row["kind"],
            None if row["kind"] == "margin_split" else row["radius"],
        )
        groups[key].append(row)
    shown = []
    for (_, _, kind, radius), own in groups.items():
        passed = sum(row["passed"] for row in own)
        shown.append(
            [
                _network(own[0]),
                ALTERNATIVE_KINDS[kind],
                "–" if radius is None else f"{radius:,.6g}",
                cell(max(row["residual_projected"] for row in own)),
                cell(min(row["margin_projected"] for row in own)),
                significant(min(row["nn_distance"] for row in own)),
                f"{passed} of {len(own)}",
            ]
        )
    heads = ["network", "set", "radius", "residual", "least margin", "nearest image", "passed"]
    caption = (
        "Largest residual, least margin and distance to the nearest training image over sets and victims, for weights "
        "without their part along a split (none at an exact KKT network). A set passes if it explains the weights as "
        "the training images do; controls are wrong on purpose and must not."
    )
    return TextTable(heads, shown, "Other training sets for the same weights", caption)


def _means(
    rows: Sequence[TableRow], keys: Sequence[str], figures: Sequence[str]
) -> list[tuple[tuple[Any, ...], dict[str, float | None]]]:
    """Return (values of the keys, means of the figures over rows that have them), in order of appearance."""
    groups: dict[tuple[Any, ...], list[TableRow]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(key) for key in keys)].append(row)
    out = []
    for key, group in groups.items():
        values = {name: [row[name] for row in group if row.get(name) is not None] for name in figures}
        out.append((key, {name: fmean(found) if found else None for name, found in values.items()}))
    return out
