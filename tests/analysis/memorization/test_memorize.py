"""A model that is really trained, from `data.canaries` to the command: more copies are more exposed; controls fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from analysis.comparison.document import judge_folder
from analysis.memorization import exposure, measures, outputs, runs, windows
from analysis.memorization.config import MemorizeConfig
from harness import export
from harness import model as models
from harness.cli import main
from harness.config import compose
from harness.data import Batches, canaries, prepare
from harness.data.tokenizer import load
from harness.errors import InputError
from tests.faults.forked import trained
from tests.harness.running import small, write_documents

KEYS = ("windows=32", "extracted=8", "prefix=8", "continuation=8")
CANARIES = "data.canaries={count:8,copies:[1,40],seed:1}"


class Trained(NamedTuple):
    """A group of one run with checkpoints after 40, 80 and 120 steps."""

    group: Path
    words: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Trained:
    folder = tmp_path_factory.mktemp("memorize")
    words = [
        "optimizer=muon",
        "optimizer.lr=0.02",
        CANARIES,
        "steps=120",
        "eval.every=40",
        "eval.tokens=512",
        "seed=3",
    ]
    words += ["checkpoint.every=40", "checkpoint.keep=9", "moments.every=null", "name=muon-seed3", "group=g"]
    words = small(write_documents(folder), folder, *words, f"data.cache_dir={session_cache}")
    assert trained(words, 1, folder / "said.txt") == [0], (folder / "said.txt").read_text()
    return Trained(folder / "g", words)


@pytest.fixture(scope="module")
def document(run: Trained) -> dict[str, Any]:
    assert main(["memorize", str(run.group), "windows=32", *KEYS[1:]]) == 0
    return json.loads((run.group / "memorize.json").read_text())


def test_a_trained_model_exposes_what_it_saw_often(document: dict[str, Any], run: Trained) -> None:
    assert [r["step"] for r in document["runs"]] == [40, 80, 120]
    last = document["runs"][-1]
    by_copies = {group["copies"]: group for group in last["exposure"]}
    assert list(by_copies) == [0, 1, 40]
    assert by_copies[40]["low"] > by_copies[1]["high"]
    assert by_copies[40]["low"] > by_copies[0]["high"]
    assert all(check["passed"] for check in document["checks"])
    # More windows than the validation split has rows: all of them.
    view, config = view_of(run)
    checkpoint = run.group / "muon-seed3" / "checkpoints" / "step_00000120"
    model = export.load(checkpoint, config, export.choice(checkpoint, None))
    validation = np.asarray(view.corpus.tokens())[view.corpus.train_tokens :]
    rows = [
        torch.from_numpy(validation[i : i + 33].astype(np.int64)) for i in range(0, len(validation) - 32, 32)
    ]
    losses = [float(model(row[None], labels=row[None]).loss.detach()) for row in rows]
    assert last["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert last["membership"]["others"] == len(rows)
    assert last["robustness"]["embedding_radius"]["low"] > 0.0
    assert {"head_margin", "embedding_radius"} <= {entry["measure"] for entry in document["comparison"]}
    assert (run.group / "memorize.html").stat().st_size < 1_500_000
    assert "Does the optimizer change" in (run.group / "memorize.md").read_text()


def test_results_are_kept_and_json_is_the_contract(
    run: Trained, document: dict[str, Any], capsys: Any
) -> None:
    kept = sorted((run.group / "memorize").iterdir())
    for path in kept:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"cpu_s": 4321}))
    capsys.readouterr()
    assert main(["memorize", str(run.group), "windows=32", *KEYS[1:], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    # The marks show that nothing was measured again.
    assert [r["cpu_s"] for r in printed["runs"]] == [4321, 4321, 4321]
    assert {"optimizer", "seed", "step", "val_loss", "exposure", "extraction", "membership"} <= set(
        printed["runs"][0]
    )
    assert {"copies", "mean", "low", "high"} <= set(printed["runs"][0]["exposure"][0])
    assert {"auc", "low", "high"} <= set(printed["runs"][0]["membership"])
    assert printed["comparison"]
    assert printed["costs"][0]["tokens_per_s"] > 0
    # The report of the same runs shows it.
    (judged,) = judge_folder(run.group).sets
    (exposed,) = [e["optimizers"][0]["mean"] for e in printed["comparison"] if e["measure"] == "exposure_1"]
    assert judged.table.rows[0].cells["memorization"].value == exposed
    assert printed["costs"][0]["final_val_loss"] == pytest.approx(printed["runs"][-1]["val_loss"], rel=0.01)


def test_labels_are_those_of_the_present_set_though_numbers_are_kept(
    run: Trained, document: dict[str, Any]
) -> None:
    """An arm that is added between two calls gives the first one a longer label."""
    assert document["runs"][0]["optimizer"] == "muon"
    other = run.group / "muon-other"
    shutil.copytree(run.group / "muon-seed3", other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("lr: 0.02", "lr: 0.03"))
    try:
        assert main(["memorize", str(run.group), "windows=32", *KEYS[1:]]) == 0
    finally:
        shutil.rmtree(other)
    both = json.loads((run.group / "memorize.json").read_text())
    labels = [r["optimizer"] for r in both["runs"]]
    assert labels == ["muon (lr=0.02)"] * 3 + ["muon (lr=0.03)"] * 3
    assert [cost["optimizer"] for cost in both["costs"]] == sorted(set(labels))
    same = [{k: v for k, v in r.items() if k != "optimizer"} for r in document["runs"]]
    # The kept numbers, whatever the arm is called now.
    assert [r["membership"] for r in both["runs"][:3]] == [r["membership"] for r in same]
    assert "muon (lr=0.03)" in (run.group / "memorize.md").read_text()


def test_a_run_that_did_not_finish_sets_no_level(run: Trained) -> None:
    other = run.group / "muon-broken"
    shutil.copytree(run.group / "muon-seed3", other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("lr: 0.02", "lr: 0.03"))
    summary = json.loads((other / "summary.json").read_text())
    said: list[str] = []
    for state in ("diverged", "failed"):
        (other / "summary.json").write_text(json.dumps(summary | {"state": state}))
        _, found = runs.find([run.group], said.append, last_only=True)
        assert [measured.run.folder.name for measured in found] == ["muon-seed3"]
        assert any("muon-broken" in line and state in line for line in said)
    shutil.rmtree(other)


def view_of(run: Trained) -> tuple[windows.CorpusView, Any]:
    config = compose.load(run.words)
    corpus = prepare(config.data)
    return windows.CorpusView(corpus, config, load(str(corpus.tokenizer_folder))), config


def test_an_untrained_model_knows_nothing(run: Trained, tmp_path: Path) -> None:
    view, config = view_of(run)
    measurer = measures.Measurer(
        view, MemorizeConfig(windows=128, extracted=4, prefix=8, continuation=8), tmp_path
    )
    model = models.build(config.model, seed=7).eval()
    found = measurer.of_model(model, view.training_rows(config, 120, 128))
    assert found["membership"]["low"] < 0.5 < found["membership"]["high"]
    assert all(group["mean"] < 4.0 for group in found["exposure"])


def test_training_rows_are_those_that_the_run_has_seen_without_canaries(run: Trained) -> None:
    view, config = view_of(run)
    rows = view.training_rows(config, 2, 1000)
    assert 0 < len(rows.indices) < 16
    seen = Batches(view.corpus, config.seq_len, config.seed, "packed").rows(0, 16)[0]
    texts = load(str(view.corpus.tokenizer_folder)).tokenizer
    assert {tuple(row) for row in rows.ids.tolist()} <= {tuple(row) for row in seen.tolist()}
    assert not any("The number of" in texts.decode(row) for row in rows.ids.tolist())


@pytest.mark.parametrize("control", ["validation", "leaked null", "fewer copies"])
def test_a_corpus_with_canaries_in_the_wrong_place_is_refused(
    control: str, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, config = view_of(run)
    corpus = view.corpus
    tokens = np.array(corpus.tokens())
    inserted, held_out = canaries.inserted(config.data.canaries), canaries.held_out(config.data.canaries)
    ids = {c.name: view.encoder.encode_bare([c.text])[0] for c in (inserted[0], held_out[9])}
    if control == "validation":
        ids, at = ids[inserted[0].name], corpus.train_tokens + 5
    elif control == "leaked null":
        ids, at = ids[held_out[9].name], 5
    else:
        ids, at = np.zeros(3, dtype=np.int64), int(windows.occurrences(tokens, ids[inserted[0].name])[0])
    tokens[at : at + len(ids)] = ids
    monkeypatch.setattr(corpus, "tokens", lambda: tokens)
    messages = {
        "validation": "1 times in the validation split, which should hold it 0",
        "leaked null": "is held out, and in the training split all the same: the null is leaked",
        "fewer copies": "0 times in the training split, which should hold it 1",
    }
    with pytest.raises(InputError, match=messages[control]):
        windows.CorpusView(corpus, config, view.encoder)


def test_a_null_that_is_known_fails_the_check() -> None:
    def result(bits: float) -> dict[str, Any]:
        canary = [{"name": f"n{i}", "copies": 0, "exposure": bits, "extracted": False} for i in range(32)]
        return {"exposure": [{"copies": 0}], "canaries": canary}

    assert outputs.check_null([result(1.4), result(1.5)])[0]["passed"]
    assert not outputs.check_null([result(5.0)])[0]["passed"]
    # Alternatives that were trained on, each after every name, leave the secrets of the null behind.
    losses = np.random.default_rng(0).normal(size=(32, 128))
    for gain, passes in ((0.0, True), (1.5, False)):
        bits = exposure.exposures(losses[:, 0], losses[:, 1:] - gain)
        found = outputs.check_null([result(float(bits.mean()))])[0]
        assert found["passed"] is passes, found
    assert outputs.check_null([{"exposure": [], "canaries": []}]) == []


def test_a_checkpoint_that_saw_too_little_is_left_out(
    run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (measured,) = runs.find([run.group], print, last_only=False)
    view = runs.open_corpus([measured], print)
    whole = view.training_rows
    monkeypatch.setattr(
        view, "training_rows", lambda config, step, count: whole(config, step, 1 if step == 40 else count)
    )
    measurer = measures.Measurer(view, MemorizeConfig(extracted=8, prefix=8, continuation=8), tmp_path)
    monkeypatch.setattr(measurer, "_extraction", lambda *_: {})
    monkeypatch.setattr(measurer, "_canaries", lambda *_: {"exposure": [], "canaries": []})
    said: list[str] = []
    found = measures.measure_all([measured], measurer, said.append)
    assert [result["step"] for result in found] == [80, 120]
    assert "step 40: left out: it has seen fewer than two rows" in said[0]
    early = measured._replace(checkpoints=measured.checkpoints[:1])
    with pytest.raises(InputError, match="holds no checkpoint that has seen two rows"):
        measures.measure_all([early], measurer, said.append)


def test_losses_that_are_not_finite_name_the_checkpoint(
    run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (measured,) = runs.find([run.group], print, last_only=True)
    view = runs.open_corpus([measured], print)

    def broken(*_: Any) -> Any:
        model = models.build(measured.config.model, seed=7).eval()
        next(iter(model.parameters())).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(export, "load", broken)
    measurer = measures.Measurer(view, MemorizeConfig(prefix=8, continuation=8), tmp_path)
    with pytest.raises(InputError, match=r"step_00000120.*losses of rows are not finite"):
        measures.measure_all([measured], measurer, print)
    assert not list(tmp_path.iterdir())
    with pytest.raises(exposure.NotFinite):
        exposure.exposures(np.array([np.nan]), np.zeros((1, 3)))


def test_copies_that_no_row_holds_whole() -> None:
    # Rows of 10: tokens 0 … 10, 10 … 20; the third begins at 20 and is not full. A copy has 4 tokens.
    whole = [0, 6, 7, 10, 17]
    cut = [8, 9, 18, 20, 23]
    assert [windows.cut_copies(np.array([p]), 4, 10, 2) for p in whole] == [0] * 5
    assert [windows.cut_copies(np.array([p]), 4, 10, 2) for p in cut] == [1] * 5


def test_one_seed_is_not_tested() -> None:
    def headline(*p: float | None) -> str:
        pairs = [
            {"a": "adamw", "b": "muon", "difference": 1.0, "planned": True, "p": x, "p_holm": x, "seeds": 1}
            for x in p
        ]
        entry = {"val_loss": 4.0, "title": "exposure", "pairs": pairs}
        fields = {"results": [], "dose": [], "costs": [], "checks": [], "notes": []}
        return outputs.headline(
            outputs.Memorization(title="t", key="k", config=MemorizeConfig(), comparison=[entry], **fields)
        )

    assert headline(None, None) == "Not tested: one seed."
    assert "1 of 1 planned difference between optimizers is larger" in headline(0.01)
    assert "none of 2 planned differences" in headline(None, 0.6)
    assert "1 of 2 planned differences" in headline(0.6, 0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "names no run; fix: optbench memorize runs/GROUP"),
        (["nowhere"], "is not a folder of runs"),
        (["{tmp}"], "holds no run"),
        (["{tmp}", "windows=2"], "windows: 2 is wrong; allowed: a whole number ≥ 8"),
        (["{tmp}", "window=20"], "did you mean windows"),
        (["{tmp}", "{tmp}"], "--out: nothing is needed for several folders"),
        (
            ["{group}", "prefix=30", "continuation=30"],
            "with continuation is 60 tokens, and rows of these runs hold 33",
        ),
        (["{group}", *KEYS, "reference={tmp}"], "holds no checkpoint"),
    ],
)
def test_bad_input_is_named(
    words: list[str], message: str, run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(tmp=tmp_path, group=run.group) for word in words]
    assert main(["memorize", *filled]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_reference_model_takes_out_what_is_easy(
    run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (measured,) = runs.find([run.group], print, last_only=True)
    view = runs.open_corpus([measured], print)
    early = run.group / "muon-seed3" / "checkpoints" / "step_00000040"
    config = MemorizeConfig(windows=32, extracted=4, prefix=8, continuation=8, reference=str(early))
    with pytest.raises(InputError, match="was trained on the same corpus: it saw the training rows"):
        measures.Measurer(view, config, tmp_path)
    # The same rows in a corpus of another identity, as without canaries.
    monkeypatch.setattr(view.corpus, "sha256", "another")
    with pytest.raises(InputError, match=r"was trained on \d+ of \d+ rows that are measured"):
        measures.Measurer(view, config, tmp_path).measure(measured, 40, early)
    # As if it had been trained on other text.
    monkeypatch.setattr(measures, "occurrences", lambda *_: [])
    found = measures.Measurer(view, config, tmp_path).measure(measured, 40, early)
    # Against itself, every score is 0.
    assert found["membership"]["reference"]["auc"] == 0.5
