"""A checkpoint as a Hugging Face folder: `transformers` loads it, and the loss is the run's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from harness import export, model
from harness.checkpoint import store
from harness.checkpoint.files import Saved
from harness.checkpoint.store import Store
from harness.cli import main
from harness.config import compose
from harness.errors import InputError
from tests.faults.forked import trained
from tests.harness.running import small, write_documents
from tests.harness.tasks.running import classifier


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """Two processes that each hold half of the weights, and of their average."""
    folder = tmp_path_factory.mktemp("export")
    words = ["world_size=2", "engine=fsdp2", "optimizer=muon", "checkpoint.every=2", "name=run"]
    words.append("optimizer.average_decay=0.5")
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
    network = AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    ids = torch.tensor([tokenizer("ba de ki")["input_ids"]])
    assert network(input_ids=ids).logits.shape == (1, ids.shape[1], 512)
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


def test_either_kind_of_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = Saved(Store(run).folder(4))
    for wanted, said, kind in (("average", "the average", "average"), ("raw", "step 4 of 4", "weight")):
        assert main(["export", str(run), str(tmp_path / wanted), "--weights", wanted]) == 0
        assert capsys.readouterr().out.startswith(said)
        network = AutoModelForCausalLM.from_pretrained(tmp_path / wanted, local_files_only=True)
        for name, p in network.named_parameters():
            assert torch.equal(p, saved.whole(name, kind)), name
    saved.close()
    copy = tmp_path / "copy"
    shutil.copytree(Store(run).folder(4), copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("average_decay: 0.5", "average_decay: null"))
    assert export.choice(copy, None) == "raw"
    with pytest.raises(InputError, match=r"trained without optimizer.average_decay.*--weights raw"):
        export.choice(copy, "average")


def test_a_damaged_newest_one_is_passed_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (Store(copy).folder(4) / "rank_00000.safetensors").write_bytes(b"")
    assert main(["export", str(copy), str(tmp_path / "model"), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["checkpoint"].endswith("step_00000002")
    assert (found["step"], found["last_step"], found["steps_planned"], found["is_last"]) == (2, 4, 4, False)
    assert "has 0 bytes" in found["warnings"][0]
    assert found["warnings"][1] == "step 2 is not the last step of the run: it has done 4"
    assert [f"warning: {line}" for line in found["warnings"]] == err.splitlines()[-2:]
    assert main(["export", str(Store(copy).folder(4)), str(tmp_path / "other")]) == 2
    assert "has 0 bytes" in capsys.readouterr().err


def test_which_step_it_is_and_that_it_is_not_the_last(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "last")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("the average of the weights at step 4 of 4, from ")
    assert "not the last" not in err
    assert main(["export", str(Store(run).folder(2)), str(tmp_path / "first")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("the average of the weights at step 2 of 4, from ")
    assert "warning: step 2 is not the last step of the run: it has done 4" in err
    # A run that was killed after its last checkpoint, and one that was stopped with one.
    for step, planned, line in [(9, 20, "step 4 is not the last step"), (4, 20, "has not finished")]:
        copy = tmp_path / f"run{step}"
        shutil.copytree(run, copy)
        status = json.loads((copy / "status.json").read_text()) | {"step": step, "steps": planned}
        (copy / "status.json").write_text(json.dumps(status))
        assert main(["export", str(copy), str(tmp_path / f"model{step}")]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("the average of the weights at step 4 of 20")
        assert line in err


def test_neighbours_in_the_cache_have_no_say(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged manifests of other corpora, sorted before and behind the one that is looked for."""
    copy, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(run, copy)
    for number, content in enumerate(
        [b"{", b"[]", b"[" * 9000, b"\xff\xfe", b'{"sha256": ' + b"9" * 5000 + b"}", b""]
    ):
        for name in (f"0-{number}", f"zz-{number}"):
            (cache / name).mkdir(parents=True)
            (cache / name / "manifest.json").write_bytes(content)
    os.mkfifo((cache / "0-1").parent / "0-pipe")
    checkpoint = Store(copy).folder(4)
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    for corpus in Path(config["data"]["cache_dir"]).iterdir():
        if (corpus / "manifest.json").exists():
            shutil.copytree(corpus, cache / corpus.name)
    config["data"]["cache_dir"] = str(cache)
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    _reseal(checkpoint)
    assert main(["export", str(copy), str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["has_tokenizer"] is True


def _reseal(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: store.digest(checkpoint / name) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "manifest.sha256").write_text(store.digest(checkpoint / "manifest.json")["sha256"] + "\n")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_that_blocks_the_next_try(
    error: BaseException,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After the weights are written, where the tokenizer is copied."""
    real = export._copy_tokenizer

    def refuse(*_: object) -> bool:
        raise error

    monkeypatch.setattr(export, "_copy_tokenizer", refuse)
    assert main(["export", str(run), str(tmp_path / "model")]) != 0
    if isinstance(error, OSError):
        assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export, "_copy_tokenizer", real)
    assert main(["export", str(run), str(tmp_path / "model")]) == 0


def test_the_files_are_for_whom_the_umask_lets_read_them(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main(["export", str(run), str(tmp_path / "model")]) == 0
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o640"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export"], "is not CHECKPOINT FOLDER"),
        (["export", "nowhere", "model"], "holds no checkpoint"),
        (["export", "RUN", "EXISTING"], "exists already"),
        (["export", "RUN", "/proc/model"], "cannot be written"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"RUN": str(run), "EXISTING": str(tmp_path)}.get(word, word) for word in words]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_an_adapter_is_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], session_cache: Path
) -> None:
    corpus = write_documents(tmp_path)
    words = ["model.adapter=lora", "model.lora.rank=4", "optimizer=adamw", "optimizer.lr=0.01", "name=run"]
    where = f"data.cache_dir={session_cache}"
    said = tmp_path / "said.txt"
    assert trained(small(corpus, tmp_path, *words, where), 1, said) == [0], said.read_text()
    run, target = tmp_path / "default" / "run", tmp_path / "model"
    assert main(["export", str(run), str(target)]) == 0
    assert "the lora adapter is merged into its weights" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
    saved = Saved(Store(run).folder(4))
    trained_names = saved.names("weight")
    assert trained_names
    assert all(".lora_" in name for name in trained_names)
    # By hand: W + alpha/rank·B·A, of the weights that the seed gives.
    start = dict(
        model.build(compose.load(small(corpus, tmp_path, *words[2:4])).model, seed=0).named_parameters()
    )
    for name, p in merged.named_parameters():
        layer = name.removesuffix(".weight")
        expected = start[name].detach().clone()
        if f"{layer}.lora_A.default.weight" in trained_names:
            a, b = (saved.whole(f"{layer}.lora_{x}.default.weight", "weight") for x in "AB")
            assert b.abs().max() > 0
            expected += 16 / 4 * b @ a
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)
    saved.close()


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_weights_that_it_was_trained_with(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], session_cache: Path
) -> None:
    start = tmp_path / "start"
    assert main(["export", str(run), str(start)]) == 0
    words = [w for w in small(write_documents(tmp_path), tmp_path) if not w.startswith("model")]
    words += [f"model.path={start}", "model.adapter=lora", "optimizer=adamw", "optimizer.lr=0.01", "name=run"]
    said = tmp_path / "said.txt"
    assert trained([*words, f"data.cache_dir={session_cache}"], 1, said) == [0], said.read_text()
    assert main(["export", str(tmp_path / "default" / "run"), str(tmp_path / "model")]) == 0
    # Another run is exported to the same place, as the next try would be.
    shutil.rmtree(start)
    assert main(["export", str(run), str(start), "--weights", "raw"]) == 0
    assert main(["export", str(tmp_path / "default" / "run"), str(tmp_path / "other")]) == 2
    said_last = capsys.readouterr().err
    assert "does not hold the weights that this adapter was trained with" in said_last
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_classifier_keeps_its_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], session_cache: Path
) -> None:
    words = classifier(tmp_path, "model.adapter=lora", "optimizer=adamw", "optimizer.lr=0.01", "name=run")
    where, said = f"data.cache_dir={session_cache}", tmp_path / "said.txt"
    assert trained([*words, where], 1, said) == [0], said.read_text()
    run, target = tmp_path / "default" / "run", tmp_path / "model"
    assert main(["export", str(run), str(target)]) == 0
    network = AutoModelForSequenceClassification.from_pretrained(target, local_files_only=True)
    labels = yaml.safe_load((run / "config.yaml").read_text())["task"]["labels"]
    assert [network.config.id2label[i] for i in range(len(labels))] == labels
    saved = Saved(Store(run).folder(4))
    assert torch.equal(network.classifier.weight, saved.whole("classifier.weight", "weight"))
    saved.close()
