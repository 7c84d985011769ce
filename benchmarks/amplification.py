"""Measure how many times a difference of one ulp in every weight grows under each preset.

    python -m benchmarks.amplification [RULE …] [--steps 20] [--dtypes fp32,bf16] [--minutes 60] [--write]

Every preset trains the model of the certificates in one process, three times: undisturbed, and twice with each initial
weight moved up or down by one ulp. With --write, the table of docs/diverge.md is replaced. After --minutes no further
preset is begun, and a line below the table names those that are missing.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from harness.files import atomic
from harness.record.certificates import Cell
from harness.verify import cells
from harness.verify.diverge.envelope import amplification
from harness.verify.pool import RankPool
from harness.verify.twins import Twin
from harness.visible import markdown_row
from optimizers import presets

PAGE = Path(__file__).resolve().parents[1] / "docs" / "diverge.md"
BEGIN, END = "<!-- table: written by benchmarks/amplification.py -->", "<!-- end of table -->"
SHOWN = (1, 4, 10, 20)
TWINS = 2


def growth(pool: RankPool, rule: str, dtype: str, steps: int, folder: Path) -> dict[int, float]:
    """Return steps done → times that one ulp has grown under a rule."""
    words = cells.overrides(Cell(rule, "single", dtype, world_size=1), str(folder))
    # The whole run is as long as what is measured: at its end the learning rate is small.
    words = [f"steps={steps}" if word.startswith("steps=") else word for word in words]
    target = "harness.verify.diverge.replays:replay"
    run = pool.run(target, words, steps, timeout_s=1800)[0]
    twins = [
        pool.run(target, words, steps, Twin(seed, moves_weights=True), timeout_s=1800)[0]
        for seed in range(TWINS)
    ]
    return amplification(run, twins)


def table(
    found: Mapping[tuple[str, str], Mapping[int, float]], steps: int, missing: Sequence[tuple[str, str]] = ()
) -> str:
    """Return the Markdown table: a row per rule and dtype, and below it a line with those that are missing."""
    shown = [step for step in SHOWN if step < steps] + [steps]
    rows = [
        ["preset", "dtype", *(f"after {step} steps" for step in shown), "per step"],
        ["---"] * (len(shown) + 3),
    ]
    for (rule, dtype), values in found.items():
        per_step = values[steps] ** (1 / steps)
        rows.append([rule, dtype, *(f"{values[step]:.3g}" for step in shown), f"{per_step:.3g}"])
    text = "\n".join(map(markdown_row, rows))
    if missing:
        text += "\n\nNot measured yet: " + ", ".join(f"`{rule}` ({dtype})" for rule, dtype in missing) + "."
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rules", nargs="*", metavar="RULE", help="presets (all)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", default="fp32")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no preset after these (no limit)"
    )
    parser.add_argument("--write", action="store_true", help="replace the table of docs/diverge.md")
    arguments = parser.parse_args(argv)
    found: dict[tuple[str, str], dict[int, float]] = {}
    asked = [
        (rule, dtype)
        for rule in arguments.rules or list(presets.PRESETS)
        for dtype in arguments.dtypes.split(",")
    ]
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch, closing(RankPool(1, Path(scratch) / "ranks")) as pool:
        for rule, dtype in asked:
            if time.monotonic() > end:
                break
            found[rule, dtype] = growth(pool, rule, dtype, arguments.steps, Path(scratch))
            print(rule, dtype, f"{found[rule, dtype][arguments.steps]:.3g}", flush=True)
    text = table(found, arguments.steps, [one for one in asked if one not in found])
    print(text)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        atomic.write_text(PAGE, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
