"""Code that a tokenizer or data set brings along is not executed, and nobody is asked."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import pytest

from harness.config.schema import DataConfig, RunConfig
from harness.data import hub
from harness.data import tokenizer as tok
from harness.errors import InputError
from harness.files.cache import Fingerprints

from .conftest import t5_like, write_jsonl


def with_code(folder: Path, mark: Path) -> Path:
    """A tokenizer folder whose class is in a Python file of its own, which leaves a mark when it is executed."""
    folder.mkdir()
    (folder / "mine.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from tokenizers import Tokenizer\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "class Config(PretrainedConfig):\n"
        "    model_type = 'mine'\n"
        "class Mine(PreTrainedTokenizerFast):\n"
        "    vocab_files_names = {'inner': 'inner.data'}\n"
        "    def __init__(self, inner=None, **kwargs):\n"
        "        super().__init__(tokenizer_object=Tokenizer.from_file(inner), **kwargs)\n"
    )
    t5_like(folder / "t5")
    (folder / "t5" / "tokenizer.json").rename(folder / "inner.data")
    auto_map = {"AutoTokenizer": ["mine.Mine", "mine.Mine"], "AutoConfig": "mine.Config"}
    settings = {"auto_map": auto_map, "tokenizer_class": "Mine", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map, "model_type": "mine"}))
    return folder


def test_code_of_a_tokenizer_is_executed_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    mark = tmp_path / "executed"
    folder = with_code(tmp_path / "tokenizer", mark)
    with pytest.raises(InputError, match=r"contains its own Python code.*fix: trust_remote_code=true"):
        tok.load(str(folder))
    assert not mark.exists()
    # The control: trusted, the same folder is executed, and is a tokenizer.
    encoder = tok.load(str(folder), trust_remote_code=True)
    assert mark.exists()
    assert encoder.eos_id == 1


def test_a_tokenizer_json_next_to_code_is_read_without_it(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = with_code(tmp_path / "tokenizer", mark)
    (folder / "tokenizer.json").write_bytes((folder / "inner.data").read_bytes())
    for trusted in (False, True):
        assert tok.load(str(folder), trusted).eos_id == 1
    assert not mark.exists()


def test_the_key_is_off_unless_given() -> None:
    assert RunConfig().trust_remote_code is False


def test_loading_scripts_of_data_sets_are_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(InputError, match=r"data\.dataset"):
        list(hub.stream(DataConfig(source="datasets", dataset=str(folder))))
    write_jsonl(folder / "a.jsonl", ["text"])
    with contextlib.suppress(InputError):
        list(hub.stream(DataConfig(source="datasets", dataset=str(folder))))
    assert not mark.exists()


def test_pipes_in_the_places_of_tokenizers_and_data_sets_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"data\.tokenizer: .*pipe is a named pipe"):
        tok.identity(str(tmp_path / "pipe"), 300)
    folder = t5_like(tmp_path / "t5")
    os.mkfifo(folder / "vocab.json")
    for call in (lambda: tok.identity(str(folder), 300), lambda: tok.load(str(folder))):
        with pytest.raises(InputError, match=r"vocab\.json is a named pipe"):
            call()
    (folder / "vocab.json").unlink()
    assert tok.load(str(folder)).eos_id == 1
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", ["text"])
    os.mkfifo(tmp_path / "set" / "b.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl is a named pipe"):
        hub.describe(DataConfig(source="datasets", dataset=str(tmp_path / "set")), Fingerprints(tmp_path))


@pytest.mark.parametrize("name", ["", "x" * 300, "~nobody_of_this_name/t.json", "./dangling"])
def test_odd_names_of_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"data\.tokenizer"):
        tok.load(name)


def test_a_tokenizer_in_a_folder_with_brackets(tmp_path: Path) -> None:
    assert tok.load(str(t5_like(tmp_path / "a [1] *"))).eos_id == 1


def test_damaged_tokenizer_files_are_one_line(tmp_path: Path) -> None:
    folder = t5_like(tmp_path / "t5")
    rng = random.Random(0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (folder / name).read_bytes()
        deep = b"[" * 100_000
        for trial in range(60):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
            if trial % 4 == 1:
                del damaged[rng.randrange(len(whole)) :]
            (folder / name).write_bytes(deep if trial == 0 else damaged)
            # Whatever else came out would fail here.
            with contextlib.suppress(InputError):
                tok.load(str(folder))
        (folder / name).write_bytes(whole)
