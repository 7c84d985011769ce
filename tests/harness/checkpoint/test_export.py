"""A checkpoint as a Hugging Face folder: `transformers` loads it, and the loss is the run's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.checkpoint.store import Store
from harness.cli import main
from tests.faults.forked import trained
from tests.harness.running import small, write_documents


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """Two processes that each hold half of the weights."""
    folder = tmp_path_factory.mktemp("export")
    words = ["world_size=2", "engine=fsdp2", "optimizer=muon", "checkpoint.every=2", "name=run"]
    where = f"data.cache_dir={session_cache}"
    corpus = write_documents(folder)
    assert trained(small(corpus, folder, *words, where), 2, folder / "said.txt") == [0, 0]
    return folder / "default" / "run"


def test_transformers_loads_it_and_training_goes_on_from_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], session_cache: Path
) -> None:
    target = tmp_path / "model"
    assert main(["export", str(run), str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["has_tokenizer"] is True
    model = AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    ids = torch.tensor([tokenizer("ba de ki")["input_ids"]])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], 512)
    # Another run starts from it: at a learning rate of nothing, its loss is the one that the run ended with.
    corpus = write_documents(tmp_path)
    words = [word for word in small(corpus, tmp_path) if not word.startswith("model")]
    again = [f"model.path={target}", "optimizer.lr=1e-30", "steps=1", "name=again"]
    where = f"data.cache_dir={session_cache}"
    kept = [word for word in words if not word.startswith("steps=")]
    assert trained([*kept, *again, where], 1, tmp_path / "said.txt") == [0], (
        tmp_path / "said.txt"
    ).read_text()
    ended = json.loads((run / "summary.json").read_text())["val/loss"]
    begun = json.loads((tmp_path / "default" / "again" / "summary.json").read_text())["val/loss"]
    assert begun == pytest.approx(ended, rel=1e-5)


def test_a_damaged_newest_one_is_passed_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (Store(copy).folder(4) / "rank_00000.safetensors").write_bytes(b"")
    assert main(["export", str(copy), str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"].endswith("step_00000002")
    assert main(["export", str(Store(copy).folder(4)), str(tmp_path / "other")]) == 2
    assert "has 0 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export"], "is not CHECKPOINT FOLDER"),
        (["export", "nowhere", "model"], "holds no checkpoint"),
        (["export", "RUN", "EXISTING"], "exists already"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"RUN": str(run), "EXISTING": str(tmp_path)}.get(word, word) for word in words]
    assert main(words) == 2
    assert said in capsys.readouterr().err
