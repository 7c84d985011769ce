"""The report as files: self-contained, whole, and with nothing in it that a name could break."""

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from plotly.offline import get_plotlyjs

from analysis import formatting
from analysis.comparison import document
from analysis.comparison.document import Document
from analysis.comparison.sets import group_into_sets
from analysis.pages import screenshot
from analysis.report import details, report, report_page
from analysis.report.main_plot import main_plot
from analysis.report.moment_plots import heat_map, over_depth, over_steps, read_spectra, short
from analysis.report.plots import memory, step_time
from analysis.text_tables import TextTable
from tests.analysis import synthetic
from tests.analysis.synthetic import TYPICAL, Recipe


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """Four arms, two seeds, one more run that diverged, and a second set of one run."""
    root = synthetic.group(tmp_path_factory.mktemp("runs"), seeds=[0, 1])
    synthetic.write(root, Recipe(**{**vars(TYPICAL["muon"]), "seed": 2, "state": "diverged", "stop_at": 70}))
    synthetic.write(root / "other", Recipe("adamw", steps=400, overrides={"steps": 400}))
    return document.judge_folder(root)


@pytest.fixture(scope="module")
def html(found: Document) -> str:
    return report_page.render(found)


class Tags(HTMLParser):
    """Start tags, and the nesting errors that a browser would mend in silence."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.errors: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)


def parsed(html: str) -> Tags:
    reader = Tags()
    reader.feed(html)
    return reader


def test_the_page_is_well_formed_and_loads_nothing(html: str) -> None:
    page = parsed(html)
    assert (page.errors, page.open) == ([], [])
    assert not [attrs for _, attrs in page.tags if {"src", "srcset", "action", "background"} & attrs.keys()]
    assert all(
        str(attrs.get("href", "")).startswith(("#", "data:")) for tag, attrs in page.tags if "href" in attrs
    )
    assert html.count("default-src 'none'") == 1


def test_plotly_is_inside_once(html: str) -> None:
    start = get_plotlyjs()[200:400]
    assert html.count(start) == 1


def test_ids_are_unique_and_labels_lead_somewhere(html: str) -> None:
    tags = parsed(html).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for tag, attrs in tags if tag == "a"} <= set(ids)


def test_two_sets_get_two_verdicts_and_none_across(html: str) -> None:
    assert "2 sets that differ in data, model, budget or precision" in html
    assert len(re.findall('class="verdict"', html)) == 2


def test_the_sets_as_workloads_have_ratios_and_scores(found: Document, html: str) -> None:
    text = html.split('id="profiles"')[1].split("</section>")[0]
    profiles = found.profiles
    assert profiles is not None
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert rows[0][:2] == ["optimizer", "score"]
    scores = dict(zip(profiles.submissions, profiles.scores, strict=True))
    assert [(row[0], row[1]) for row in rows[1:]] == [
        (name, f"{score:.3f}") for name, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    ]


def test_one_set_is_no_workload_among_others(tmp_path: Path) -> None:
    group = synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1], has_moments=False)
    assert 'id="profiles"' not in report_page.render(document.judge_folder(group))


def test_the_failed_run_is_a_row_and_a_warning(html: str) -> None:
    assert re.search(r"diverged at step 70</td>", html)
    assert "1 run diverged: muon (seed 2)." in html


def test_figures_are_valid_json_with_null_for_what_is_not_finite(html: str) -> None:
    blocks = re.findall(r'<script type="application/json" class="figures">(.*?)</script>', html, re.S)
    assert len(blocks) == 2

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    figures: dict[str, Any] = {}
    for block in blocks:
        figures |= json.loads(block, parse_constant=refuse)
    for name in ("main", "training-loss", "step-time", "memory", "condition-number", "heat"):
        assert f"set0-{name}" in figures
    labels = figures["set0-main"]["figure"]["layout"]["meta"]["labels"]
    assert [label["text"] for label in labels] == ["adamw", "galore", "muon", "sumo"]


def test_words_from_runs_can_not_break_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    synthetic.group(
        tmp_path, [evil.replace("/", "∕")], seeds=[0, 1], summary={"lr_source": evil, "warnings": [evil]}
    )
    for folder in tmp_path.iterdir():
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["optimizer"]["name"] = evil
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        facts = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**facts, "optimizer": evil, "command": evil}))
    page = parsed(report_page.render(document.judge_folder(tmp_path)))
    assert page.errors == []
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 4


def test_all_files_are_written_and_agree(
    found: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    written = report.write(found, tmp_path / "new" / "folder")
    names = [path.name for path in written.files]
    assert names == ["report.html", "comparison.md", "comparison.csv", "comparison.json"]
    assert written.remarks, "a picture that is not made is said"
    assert "Chromium" in written.remarks[0]
    assert sorted(p.name for p in written.html.parent.iterdir()) == sorted(names), "no scratch files stay"
    data = json.loads(written.files[3].read_text())
    assert set(data) == {"schema_version", "runs", "comparison", "warnings"}
    assert len(data["runs"]) == 10
    rows = [row for one in data["comparison"]["sets"] for row in one["table"]["rows"]]
    with written.files[2].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["optimizer"] for line in lines] == [row["optimizer"] for row in rows]
    assert [line["loss [nats/token]"] for line in lines] == [
        "" if r["loss"] is None else repr(r["loss"]) for r in rows
    ]


def test_the_command_of_the_comparison_is_shown(tmp_path: Path) -> None:
    synthetic.group(tmp_path, seeds=[0])
    command = "optbench compare adamw muon galore sumo seeds=1 preset=quickstart"
    (tmp_path / "compare.json").write_text(
        json.dumps({"commands": [command], "optimizers": ["sumo", "adamw"]})
    )
    read = document.judge_folder(tmp_path)
    assert command in report_page.render(read)
    assert [arm.label for arm in read.sets[0].comparison.arms] == ["sumo", "adamw", "galore", "muon"]


def test_the_finish_shows_all_arms_that_learned_and_no_more(tmp_path: Path) -> None:
    """An arm that stayed above the unigram entropy must not flatten the others."""
    synthetic.group(tmp_path, seeds=[0, 1])
    synthetic.group(tmp_path, ["stuck"], seeds=[0, 1], end=8.0)
    (judged,) = document.judge_folder(tmp_path).sets
    main = main_plot(judged.comparison)
    assert main
    meta = main.figure["layout"]["meta"]
    low, high = meta["ranges"]["tokens"]["finish"]["y"]
    ends = {label["text"]: label["y"] for label in meta["labels"]}
    assert all(low < ends[name] < high for name in TYPICAL)
    assert high < 4.5
    assert ends["stuck"] > high
    assert meta["ranges"]["tokens"]["whole"]["y"][1] > ends["stuck"]


def test_bands_span_the_seeds(found: Document) -> None:
    main = main_plot(found.sets[0].comparison)
    assert main
    bands = [trace for trace in main.figure["data"] if trace["meta"].get("band")]
    assert len(bands) == 4
    arm = found.sets[0].comparison.arms[0]
    finals = [run.final_loss for run in arm.finished]
    half = len(bands[0]["y"]) // 2
    assert bands[0]["y"][half - 1] == max(finals)
    assert bands[0]["y"][half] == min(finals)


def test_a_run_that_was_evaluated_once_shows_its_training_loss(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], eval_every=1000)
    (judged,) = document.judge_folder(tmp_path).sets
    main = main_plot(judged.comparison)
    assert main
    assert main.title == "Training loss"


def test_thinning_keeps_spikes_and_ends(found: Document) -> None:
    import numpy as np

    from analysis.runs.curves import thinned

    values = np.sin(np.linspace(0, 20, 20_000))
    values[7_321], values[12_345] = 50, -50
    kept = thinned(values, 400)
    assert len(kept) <= 400
    assert {0, 7_321, 12_345, 19_999} <= set(kept.tolist())
    assert 7_321 not in np.arange(0, 20_000, 50), "plain striding would have lost it"


def test_bars_and_spectra_carry_the_measured_numbers(found: Document) -> None:
    comparison = found.sets[0].comparison
    spectra = read_spectra(comparison)
    times, sizes, heat = step_time(comparison), memory(comparison), heat_map(comparison, spectra)
    assert times
    assert sizes
    assert heat
    optimizer = next(trace for trace in times.figure["data"] if trace["name"] == "optimizer")
    assert optimizer["x"] == pytest.approx([4.0, 11.0, 16.0, 19.0])
    moment = next(trace for trace in sizes.figure["data"] if trace["name"] == "state: moment")
    assert moment["x"] == pytest.approx([b / 2**20 for b in (4_800_000, 1_300_000, 3_100_000, 1_300_000)])
    assert heat.choices["Optimizer"] == ["adamw", "galore", "muon", "sumo"]
    assert heat.choices["Figure"][:2] == ["condition number", "effective rank"]
    assert len(heat.figure["data"][0]["z"]) == 28
    shown = {
        plot.key: {t["name"] for t in plot.figure["data"]}
        for plots in (over_steps(comparison, spectra), over_depth(comparison, spectra))
        for plot in plots.values()
    }
    assert len(shown) == 10
    for key in ("polar-error", "polar-error-depth", "orthogonality-error"):
        assert shown[key] == {"muon", "sumo"}, "no factor, no error"
    assert shown["condition-number-depth"] == set(TYPICAL)


def test_figures_over_depth_are_those_of_the_last_probe(tmp_path: Path) -> None:
    """Block b holds κ = 10^(b+1), the last probe ten times that: median and largest are known."""
    folder = synthetic.write(tmp_path, Recipe("sumo"))
    rows = [
        {"step": step, "layer": f"model.layers.{b}.mlp.{part}.weight", "condition_number": at * x * 10.0**b}
        for step, at in ((1, 10), (200, 100))
        for b in (10, 2, 0)
        for part, x in (("up_proj", 1), ("down_proj", 3), ("gate_proj", 2))
    ]
    pd.DataFrame(rows).to_parquet(folder / "moments.parquet")
    (judged,) = document.judge_folder(tmp_path).sets
    plot = over_depth(judged.comparison, read_spectra(judged.comparison))["condition_number"]
    median, largest = plot.figure["data"]
    assert median["x"] == [0, 2, 10], "blocks by number, not by letter"
    assert median["y"] == pytest.approx([200 * 10.0**b for b in (0, 2, 10)])
    assert largest["y"] == pytest.approx([300 * 10.0**b for b in (0, 2, 10)])
    assert "At step 200" in plot.caption


def test_heat_maps_stay_light_with_many_arms_and_matrices(tmp_path: Path) -> None:
    for arm in range(12):
        synthetic.write(tmp_path, Recipe(f"arm{arm}", layers=24, steps=4000, log_every=100))
    (judged,) = document.judge_folder(tmp_path).sets
    heat = heat_map(judged.comparison, read_spectra(judged.comparison))
    assert heat
    cells = sum(len(t["z"]) * len(t["z"][0]) for t in heat.figure["data"])
    assert 50_000 < cells <= 150_000
    steps = heat.figure["data"][0]["x"]
    assert steps[0] == "1"


def test_every_parameter_is_listed_with_the_rule_of_each_arm(found: Document) -> None:
    table = details.parameters(found.sets[0].comparison)
    assert table.heads == ["parameter", "shape", "adamw", "galore", "muon", "sumo"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["model.layers.[0–3].self_attn.q_proj.weight"] == [
        "128 × 128",
        "adamw",
        "galore",
        "muon",
        "sumo",
    ]
    assert rows["model.embed_tokens.weight"] == ["4096 × 128", *["adamw"] * 4]
    listed = sum(4 if "[0–3]" in name else 1 for name in rows)
    assert listed == len(found.runs[0].parameters)


def test_blocks_with_other_rules_stand_apart(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, Recipe("sumo"))
    path = folder / "parameters.json"
    rows = json.loads(path.read_text())
    for row in rows:
        if row["name"] == "model.layers.1.mlp.up_proj.weight":
            row["rule"] = "adamw"
    path.write_text(json.dumps(rows))
    (judged,) = document.judge_folder(tmp_path).sets
    body = details.parameters(judged.comparison).rows
    mine = {row[0]: row[2] for row in body if "up_proj" in row[0]}
    assert mine == {
        "model.layers.[0, 2, 3].mlp.up_proj.weight": "sumo",
        "model.layers.1.mlp.up_proj.weight": "adamw",
    }


def test_differences_outside_of_the_optimizer_stand_apart(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"], [0], overrides={"max_grad_norm": 2.0})
    synthetic.group(tmp_path, ["sumo"], [0], options={"rank": 32})
    runs = document.judge_folder(tmp_path).runs
    for run in runs:
        run.comparison_key = "same"
    (comparison,) = group_into_sets(runs)
    outside, own = details.config_difference(comparison)
    assert outside == TextTable(["key", "adamw", "sumo"], [["max_grad_norm", "2.0", "1.0"]])
    assert [row[0] for row in own.rows] == ["optimizer.name", "optimizer.lr", "optimizer.rank"]


def test_the_finish_stands_in_numbers_too(found: Document) -> None:
    table = details.last_evaluations(found.sets[0].comparison)
    assert table.heads == ["step", "adamw", "galore", "muon", "sumo"]
    assert [row[0] for row in table.rows] == [str(step) for step in range(20, 201, 20)]
    assert table.rows[-1][1:] == [formatting.loss(arm.final.mean) for arm in found.sets[0].comparison.arms]


def test_where_it_came_from_is_said_once_and_where_runs_disagree_twice(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], [0])
    path = tmp_path / "sumo-seed0" / "environment.json"
    changed = {**json.loads(path.read_text()), "git": {"commit": "f" * 40, "modified": True}}
    path.write_text(json.dumps(changed))
    (judged,) = document.judge_folder(tmp_path).sets
    told = dict(details.provenance(judged.comparison))
    assert told["code"] == (
        "optbench 0.1.0, commit 0123456789 | optbench 0.1.0, commit ffffffffff with uncommitted changes"
    )
    assert told["versions"] == "Python 3.11.2, torch 2.13.0+cpu"
    assert told["machine"] == "cpu, 2 processes (ddp)"
    assert told["corpus"] == "c" * 12
    assert told["comparison key"] == judged.comparison.key
    assert "different_code" in {c.code for c in judged.warnings}


def test_commands_are_those_that_made_each_set(tmp_path: Path) -> None:
    """Two groups below one folder, one of them made by `compare`, one run by run."""
    synthetic.group(tmp_path / "a", ["adamw", "sumo"], [0])
    synthetic.group(tmp_path / "b", ["muon"], [0])
    (tmp_path / "a" / "compare.json").write_text(json.dumps({"commands": ["optbench compare adamw sumo"]}))
    (judged,) = document.judge_folder(tmp_path).sets
    assert judged.commands == [
        "optbench compare adamw sumo",
        "optbench train optimizer=muon seed=0 steps=200",
    ]


def test_an_axis_that_an_arm_lacks_is_named(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"], [0, 1])
    key = document.judge_folder(tmp_path).runs[0].comparison_key
    (tmp_path / "soap.csv").write_text(f"step,val/loss,comparison_key\n100,4,{key}\n200,3.4,{key}\n")
    (judged,) = document.judge_folder(tmp_path).sets
    main = main_plot(judged.comparison)
    assert main
    assert main.axes == ["steps"]
    for words_ in ("Not over tokens: soap records none.", "Not over FLOPs: soap records none."):
        assert words_ in main.caption


def test_layer_names_are_shortened_without_merging() -> None:
    names = [
        f"model.layers.{i}.{part}"
        for i in (0, 1, 10)
        for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight")
    ]
    assert [short(name) for name in names[:2]] == ["0 q_proj", "0 up_proj"]
    assert len({short(name) for name in names}) == len(names)
    assert short("lm_head.weight") == "lm_head"


def test_what_is_wrong_with_runs_is_on_the_page_beside_the_rest(tmp_path: Path) -> None:
    """A torn line, a killed run, an older schema, a NaN loss, a missing seed, a resumed run: each is said."""
    synthetic.group(tmp_path, ["adamw", "galore", "muon", "sumo"])
    shutil.rmtree(tmp_path / "sumo-seed2")
    killed = Recipe(**{**vars(TYPICAL["muon"]), "seed": 3, "state": "running", "stop_at": 90})
    with (synthetic.write(tmp_path, killed) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "train/lo')
    for name, path, changes in (
        ("adamw-seed0", "summary.json", {"schema_version": 0}),
        ("adamw-seed1", "status.json", {"attempts": [{"first_step": 0}, {"first_step": 80}]}),
        ("galore-seed2", "summary.json", {"val/loss": math.nan}),
    ):
        target = tmp_path / name / path
        target.write_text(json.dumps({**json.loads(target.read_text()), **changes}))
    found = document.judge_folder(tmp_path)
    page = report_page.render(found)
    severe = [warning.message for judged in found.sets for warning in judged.warnings if warning.severe]
    for text in (
        "No winner is named: 2 of 12 runs did not finish.",
        "sumo has no run with seed 2 or 3; pairs use common seeds only.",
        "1 run not finished (or killed): muon (seed 3).",
        "1 run failed: galore (seed 2).",
        "Resumed: adamw seed 1 at step 80.",
    ):
        assert text in page
        assert any(text in message for message in severe) or text == found.sets[0].verdict.headline
    for text in (
        "the last line of metrics.jsonl is torn",
        "muon-seed3: no summary.json: the run is not finished or was killed.",
        "adamw-seed0: written by schema 0, this is 1: missing values stay blank.",
        "galore-seed2: finished without a finite validation loss: it counts as failed.",
    ):
        assert text in page
    labels = [arm.label for arm in found.sets[0].comparison.arms]
    assert [(arm.label, arm.final.n) for arm in found.sets[0].comparison.arms] == list(
        zip(labels, [3, 2, 3, 2], strict=True)
    )


def test_many_commands_and_pairs_are_folded(tmp_path: Path) -> None:
    for arm in range(13):
        synthetic.write(tmp_path, Recipe("sumo", options={"rank": arm}, has_moments=False), f"{arm}")
    page = report_page.render(document.judge_folder(tmp_path))
    assert "<summary>78 pairs of 13 optimizers</summary>" in page
    (judged,) = document.judge_folder(tmp_path).sets
    judged.commands[:] = [f"optbench train seed={seed}" for seed in range(9)]
    again = document.Document(tmp_path, [], [judged])
    assert "<summary>9 commands</summary>" in report_page.render(again)


def test_runs_without_measurements_still_make_a_page(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = synthetic.write(tmp_path, Recipe(seed=seed, has_moments=False))
        for name in ("parameters.json", "environment.json", "metrics.jsonl"):
            (folder / name).unlink()
    assert parsed(report_page.render(document.judge_folder(tmp_path))).errors == []
