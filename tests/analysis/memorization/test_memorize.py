"""A model that is really trained, from `data.canaries` to the command: more copies are more exposed; controls fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from analysis.memorization import measures, outputs, runs, windows
from analysis.memorization.config import MemorizeConfig
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
    assert main(["memorize", str(run.group), "windows=16", *KEYS[1:]]) == 0
    return json.loads((run.group / "memorize.json").read_text())


def test_a_trained_model_exposes_what_it_saw_often(document: dict[str, Any], run: Trained) -> None:
    assert [r["step"] for r in document["runs"]] == [40, 80, 120]
    last = document["runs"][-1]
    by_copies = {group["copies"]: group for group in last["exposure"]}
    assert list(by_copies) == [0, 1, 40]
    assert by_copies[40]["low"] > by_copies[1]["high"]
    assert by_copies[40]["low"] > by_copies[0]["high"]
    assert all(check["passed"] for check in document["checks"])
    # 16 rows of 32 tokens are the evaluation of the run.
    logged = [
        json.loads(line) for line in (run.group / "muon-seed3" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {row["step"]: row["val/loss"] for row in logged if "val/loss" in row}
    assert [r["val_loss"] for r in document["runs"]] == pytest.approx(
        [losses[s] for s in (40, 80, 120)], rel=1e-5
    )
    assert (run.group / "memorize.html").stat().st_size < 1_500_000
    assert "Does the optimizer change" in (run.group / "memorize.md").read_text()


def test_results_are_kept_and_json_is_the_contract(
    run: Trained, document: dict[str, Any], capsys: Any
) -> None:
    kept = sorted((run.group / "memorize").iterdir())
    for path in kept:
        path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    capsys.readouterr()
    assert main(["memorize", str(run.group), "windows=16", *KEYS[1:], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    # The marks show that nothing was measured again.
    assert [r["seed"] for r in printed["runs"]] == [4, 4, 4]
    assert {"optimizer", "seed", "step", "val_loss", "exposure", "extraction", "membership"} <= set(
        printed["runs"][0]
    )
    assert {"copies", "mean", "low", "high"} <= set(printed["runs"][0]["exposure"][0])
    assert {"auc", "low", "high"} <= set(printed["runs"][0]["membership"])
    assert printed["comparison"]
    assert printed["costs"][0]["tokens_per_s"] > 0
    assert printed["costs"][0]["final_val_loss"] == pytest.approx(printed["runs"][-1]["val_loss"], rel=1e-5)


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
        canary = [{"name": f"n{i}", "copies": 0, "exposure": bits, "extracted": False} for i in range(8)]
        return {"exposure": [{"copies": 0}], "canaries": canary}

    assert outputs.check_null([result(1.4), result(1.5)])[0]["passed"]
    assert not outputs.check_null([result(5.0)])[0]["passed"]
    assert outputs.check_null([{"exposure": [], "canaries": []}]) == []


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


def test_a_reference_model_takes_out_what_is_easy(run: Trained, tmp_path: Path) -> None:
    _, (measured,) = runs.find([run.group], print, last_only=True)
    view = runs.open_corpus([measured], print)
    early = run.group / "muon-seed3" / "checkpoints" / "step_00000040"
    config = MemorizeConfig(windows=32, extracted=4, prefix=8, continuation=8, reference=str(early))
    torch.manual_seed(0)
    found = measures.Measurer(view, config, tmp_path).measure(measured, 40, early)
    # Against itself, every score is 0.
    assert found["membership"]["reference"]["auc"] == 0.5
