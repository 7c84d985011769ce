"""The cache with real processes: built once, whole or not at all, never used when damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.schema import DataConfig
from harness.data import cached_folder as caching
from harness.data import open_corpus, prepare
from harness.errors import InputError
from harness.files.cache import cache_root

from .conftest import MakeConfig, documents, write_jsonl

# Prepares the corpus of a configuration given as JSON; prints its hash and whether this process built it.
WORKER = """
import sys
from harness.config.schema import DataConfig
from harness.data import prepare
said = []
def say(line):
    said.append(line)
    print(line, file=sys.stderr, flush=True)
corpus = prepare(DataConfig.model_validate_json(sys.argv[1]), say=say)
print(corpus.sha256, any("tokenizing" in line for line in said))
"""


def start(config: DataConfig, code: str = WORKER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, config.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def leftovers(config: DataConfig) -> list[str]:
    return [p.name for p in cache_root(config.cache_dir).iterdir() if p.name.startswith(".")]


def test_the_second_call_opens_what_the_first_built(config_for: MakeConfig) -> None:
    config = config_for(documents(100))
    said: list[str] = []
    first = prepare(config, say=said.append)
    assert said[-1].endswith("for validation")
    second = prepare(config, say=lambda line: pytest.fail(line))
    assert first.manifest == second.manifest == open_corpus(first.folder).manifest
    assert leftovers(config) == []


def test_a_rebuilt_corpus_is_equal_to_the_byte(config_for: MakeConfig, tmp_path: Path) -> None:
    config = config_for(documents(100))
    one, two = prepare(config), prepare(config.model_copy(update={"cache_dir": str(tmp_path / "other")}))
    assert one.folder.name == two.folder.name
    for name in ("tokens.bin", "documents.npy", "manifest.json", "tokenizer/tokenizer.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert one.sha256 == two.sha256


def test_what_decides_the_tokens_decides_the_folder(config_for: MakeConfig) -> None:
    texts = documents(100)
    config = config_for(texts)
    first = prepare(config)
    # How tokens are cut into rows does not change them.
    assert prepare(config.model_copy(update={"mode": "padded"})).folder == first.folder
    for change in ({"vocab_size": 300}, {"validation_tokens": 400}, {"max_tokens": 5000}):
        assert prepare(config.model_copy(update=change)).folder != first.folder
    write_jsonl(Path(config.files[0]), [*texts[:-1], texts[-1] + "!"])
    changed = prepare(config)
    assert changed.folder != first.folder
    assert changed.sha256 != first.sha256


def test_many_processes_build_one_cache(config_for: MakeConfig) -> None:
    config = config_for(documents(3000))
    workers = [start(config) for _ in range(4)]
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [w.returncode for w in workers] == [0] * 4, results
    outputs = [stdout.split() for stdout, _ in results]
    assert len({sha for sha, _ in outputs}) == 1
    assert [built for _, built in outputs].count("True") == 1
    assert leftovers(config) == []


def test_killed_while_building_then_built_by_the_next(config_for: MakeConfig) -> None:
    config = config_for(documents(500))
    # The build stops when its files are written but the folder has its temporary name.
    code = WORKER.replace(
        "said = []",
        "import time, harness.data.cached_folder as c\n"
        "c.sync_folder = lambda _: (print('now', file=sys.stderr, flush=True), time.sleep(600))\nsaid = []",
    )
    victim = start(config, code)
    assert victim.stderr is not None
    while "now" not in victim.stderr.readline():
        assert victim.poll() is None
    waiting = start(config)
    assert waiting.stderr is not None
    assert "waiting for another process" in waiting.stderr.readline()
    unfinished = leftovers(config)
    assert len(unfinished) == 1
    assert not list(cache_root(config.cache_dir).glob("test-*"))
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    stdout, stderr = waiting.communicate(timeout=60)
    assert stdout.split()[1] == "True", stderr
    assert leftovers(config) == []
    assert prepare(config, say=lambda line: pytest.fail(line)).sha256 == stdout.split()[0]


def damage_tokens(folder: Path) -> None:
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "tokens.bin").write_bytes(data)


def truncate(folder: Path) -> None:
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(100)


@pytest.mark.parametrize(
    "damage",
    [
        damage_tokens,
        truncate,
        lambda f: (f / "documents.npy").unlink(),
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:200]),
        lambda f: (f / "manifest.json").unlink(),
        lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"),
    ],
    ids=["bit", "truncated", "no boundaries", "half a manifest", "no manifest", "tokenizer"],
)
def test_a_damaged_corpus_is_built_again(config_for: MakeConfig, damage) -> None:  # type: ignore[no-untyped-def]
    config = config_for(documents(100))
    first = prepare(config)
    tokens = (first.folder / "tokens.bin").read_bytes()
    damage(first.folder)
    with pytest.raises(InputError, match="holds no complete corpus"):
        open_corpus(first.folder)
    said: list[str] = []
    again = prepare(config, say=said.append)
    assert "is damaged" in said[0]
    assert again.folder == first.folder
    assert (again.folder / "tokens.bin").read_bytes() == tokens
    assert leftovers(config) == []


def test_a_build_that_fails_leaves_nothing(config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(documents(100))

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(caching, "sync_folder", fail)
        with pytest.raises(RuntimeError):
            prepare(config)
    assert leftovers(config) == []
    assert not list(cache_root(config.cache_dir).glob("test-*"))
    prepare(config)


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTBENCH_CACHE", str(tmp_path / "env"))
    assert cache_root(None) == tmp_path / "env"
    assert cache_root(str(tmp_path / "key")) == tmp_path / "key"
    monkeypatch.delenv("OPTBENCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "optbench"


def test_a_cache_that_cannot_be_written(config_for: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data.cache_dir: .* cannot be written"):
        prepare(config_for(documents(50), cache_dir=str(tmp_path / "file")))


def test_files_readable_by_others_and_without_machine_paths(config_for: MakeConfig, tmp_path: Path) -> None:
    corpus = prepare(config_for(documents(60)))
    manifest = (corpus.folder / "manifest.json").read_text()
    assert str(tmp_path) not in manifest
    assert json.loads(manifest)["source"]["files"][0]["name"] == "texts.jsonl"
    umask = os.umask(0)
    os.umask(umask)
    for path in corpus.folder.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o044 == 0o044 & ~umask, path


def test_warm_start_reads_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(DataConfig())  # in the cache of all tests
    monkeypatch.setattr("harness.data.sources.ast.parse", lambda *_: pytest.fail("parsed again"))
    corpus = prepare(DataConfig(), say=lambda line: pytest.fail(line))
    assert corpus.unigram_entropy == pytest.approx(
        6.0558, abs=1e-4
    )  # of this package's text at 4,096 entries
