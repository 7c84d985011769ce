"""A cache that others write to as well: damaged neighbours, kills, full and read-only disks, other users."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import Timeout

from harness.config.schema import DataConfig
from harness.data import open_corpus, prepare
from harness.data.cache import tokenizer_folder
from harness.errors import InputError
from harness.files import locks
from harness.files.cache import cache_root

from .conftest import MakeConfig, documents, write_jsonl

BOMB = "[" * 200_000


def edited(change: Callable[[dict], object]) -> Callable[[Path], object]:  # type: ignore[type-arg]
    """Damage that leaves valid JSON: ``change`` edits the manifest."""

    def damage(path: Path) -> None:
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def flipped(path: Path) -> None:
    """Another digit in a count, which no parser can notice."""
    text = path.read_text()
    place = text.index('"train_tokens": ') + len('"train_tokens": ')
    path.write_text(text[:place] + str((int(text[place]) % 9) + 1) + text[place + 1 :])


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "half": lambda path: path.write_text(path.read_text()[: path.stat().st_size // 2]),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "deep": lambda path: path.write_text(BOMB),
    "digits": lambda path: path.write_text('{"format": ' + "9" * 5000 + "}"),
    "list": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "nan": lambda path: path.write_text(
        path.read_text().replace('"train_tokens": ', '"train_tokens": NaN, "x": ')
    ),
    "flipped": flipped,
    "pipe": a_pipe,
    "folder": a_folder,
    "no files": edited(lambda m: m.pop("files")),
    "files as a list": edited(lambda m: m.update(files=["tokens.bin"])),
    "no listed file": edited(lambda m: m.update(files={})),
    "count as a word": edited(lambda m: m.update(train_tokens="many")),
    "dtype object": edited(lambda m: m.update(dtype="|O8")),
    "sha of another type": edited(lambda m: m.update(sha256={"a": 1})),
    "tokenizer null": edited(lambda m: m.update(tokenizer=None)),
    "files outside": edited(lambda m: m.update(files={"../../x": {"bytes": 0, "sha256": "0"}})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_manifest_is_built_again_or_skipped(
    config_for: MakeConfig, tmp_path: Path, name: str
) -> None:
    config = config_for(documents(60))
    corpus = prepare(config)
    tokens = (corpus.folder / "tokens.bin").read_bytes()
    other = config.model_copy(update={"vocab_size": 300})
    neighbour = prepare(other)
    assert tokenizer_folder(config, corpus.sha256) == corpus.tokenizer_folder
    DAMAGES[name](corpus.folder / "manifest.json")
    # For others it is not there …
    assert prepare(other, say=lambda line: pytest.fail(line)).sha256 == neighbour.sha256
    assert tokenizer_folder(config, neighbour.sha256) == neighbour.tokenizer_folder
    with pytest.raises(InputError, match="holds no complete corpus"):
        open_corpus(corpus.folder)
    # … and for its own runs it is built again.
    lines: list[str] = []
    again = prepare(config, say=lines.append)
    assert "is damaged" in lines[0]
    assert (again.folder / "tokens.bin").read_bytes() == tokens
    assert not [p for p in cache_root(config.cache_dir).iterdir() if p.name.startswith(".")]
    assert tokenizer_folder(config, corpus.sha256) == corpus.tokenizer_folder


def test_a_damaged_tokenizer_is_not_exported(config_for: MakeConfig) -> None:
    config = config_for(documents(60))
    corpus = prepare(config)
    copy = corpus.folder.with_name("a-copy")  # by name before the original
    shutil.copytree(corpus.folder, copy)
    assert tokenizer_folder(config, corpus.sha256) == copy / "tokenizer"
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert tokenizer_folder(config, corpus.sha256) == corpus.tokenizer_folder
    (corpus.folder / "tokenizer" / "tokenizer.json").unlink()
    assert tokenizer_folder(config, corpus.sha256) is None
    assert tokenizer_folder(config, "0" * 64) is None


def test_damaged_memos_of_tokenizers_and_hashes_are_not_used(
    config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.files.cache.ALWAYS_HASHED_BYTES", 0)
    config = config_for(documents(60))
    corpus = prepare(config)
    for folder in ("tokenizers", "fingerprints"):
        memos = list((cache_root(config.cache_dir) / folder).iterdir())
        assert memos
        for memo in memos:
            memo.write_text(BOMB)
    shutil.rmtree(corpus.folder)
    assert prepare(config).sha256 == corpus.sha256


# Kills itself when it is about to do the n-th thing to a path in the cache; prints how many there are.
MORTAL = """
import os, signal, sys
from harness.config.schema import DataConfig
from harness.data import prepare
config, last = DataConfig.model_validate_json(sys.argv[1]), int(sys.argv[2])
prepare(config.model_copy(update={"files": [sys.argv[3]], "cache_dir": config.cache_dir + "-warm"}))
done = 0
def watch(event, arguments):
    global done
    if event.startswith(("open", "os.", "shutil.")) and config.cache_dir in str(arguments):
        done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
prepare(config)
print(done)
"""


def killed_rounds(config_for: MakeConfig, tmp_path: Path, rounds: int) -> None:
    config = config_for(documents(120))
    write_jsonl(tmp_path / "other.jsonl", documents(60, seed=1))
    neighbour_config = config.model_copy(update={"files": [str(tmp_path / "other.jsonl")]})
    neighbour = prepare(neighbour_config)

    def start(last: int) -> subprocess.CompletedProcess[str]:
        words = [
            sys.executable,
            "-c",
            MORTAL,
            config.model_dump_json(),
            str(last),
            str(tmp_path / "other.jsonl"),
        ]
        return subprocess.run(words, capture_output=True, text=True)

    steps = int(start(0).stdout)
    corpus = prepare(config)
    assert steps > 20
    for i in range(rounds):
        shutil.rmtree(corpus.folder)
        shutil.rmtree(cache_root(config.cache_dir) / "tokenizers")
        victim = start(1 + (2 * i + 1) * (steps - 1) // (2 * rounds))
        assert victim.returncode == -signal.SIGKILL, victim.stderr
        # There whole or not at all, and nobody else's is touched.
        if corpus.folder.exists():
            assert open_corpus(corpus.folder).sha256 == corpus.sha256
        assert prepare(neighbour_config, say=lambda line: pytest.fail(line)).sha256 == neighbour.sha256
        assert prepare(config).sha256 == corpus.sha256
        assert not [p for p in cache_root(config.cache_dir).iterdir() if p.name.startswith(".")]


def test_kills_while_building_lose_nothing(config_for: MakeConfig, tmp_path: Path) -> None:
    killed_rounds(config_for, tmp_path, 3)


@pytest.mark.slow
def test_fifteen_kills_while_building_lose_nothing(config_for: MakeConfig, tmp_path: Path) -> None:
    killed_rounds(config_for, tmp_path, 15)


def test_the_next_build_of_any_corpus_removes_what_a_dead_one_left(config_for: MakeConfig) -> None:
    config = config_for(documents(60))
    root = cache_root(config.cache_dir)
    dead, alive = (root / f".building-other-{digit * 24}-123" for digit in "01")
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "text.spool").write_text("text")
    (root / "locks").mkdir()
    lock = locks.acquire(root / "locks" / f"{'1' * 24}.lock", key="data.cache_dir")
    prepare(config)
    assert not dead.exists()
    assert alive.exists()
    lock.release()


FULL = """
import resource, shutil, sys
from pathlib import Path
from harness.errors import InputError
from harness.config.schema import DataConfig
from harness.data import prepare
config = DataConfig.model_validate_json(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for size in (0, 1, 200, 1000, 2000, 5000, 10_000, 15_000, 20_000, 30_000, 50_000):
    shutil.rmtree(config.cache_dir, ignore_errors=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        prepare(config)
        line = "built"
    except InputError as error:
        line = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    left = [p.name for p in Path(config.cache_dir).iterdir() if p.name.startswith(".")]
    print(size, left, line)
"""


def test_a_disk_that_fills_up_at_any_point_is_one_line(config_for: MakeConfig) -> None:
    config = config_for(documents(200))
    words = [sys.executable, "-c", FULL, config.model_dump_json()]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 11
    for line in lines[:-1]:
        assert "[] data.cache_dir: " in line or line.endswith("[] built"), line
    assert sum("cannot be written (File too large)" in line for line in lines) >= 6
    assert prepare(config).documents == 200


AS_ANOTHER_USER = """
import importlib.metadata, os, sys
from harness.errors import InputError
from harness.config.schema import DataConfig
from harness.data import prepare
importlib.metadata.version("numpy")
# Only now: the interpreter may be in a folder that is root's alone.
os.setgroups([]); os.setgid(65534); os.setuid(65534); os.umask(int(sys.argv[2], 8))
try: print(prepare(DataConfig.model_validate_json(sys.argv[1])).sha256)
except InputError as error: print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_second_user_reads_a_shared_cache_and_builds_where_that_is_allowed(
    config_for: MakeConfig, open_folder: Path
) -> None:
    def as_another_user(config: DataConfig) -> str:
        words = [sys.executable, "-c", AS_ANOTHER_USER, config.model_dump_json(), "002"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    write_jsonl(open_folder / "texts.jsonl", documents(60))
    fields = {"files": [str(open_folder / "texts.jsonl")], "cache_dir": str(open_folder / "cache")}
    config = config_for([], **fields)
    theirs = config.model_copy(update={"vocab_size": 300})
    before = os.umask(0o002)
    try:
        corpus = prepare(config)
        # A cache that the second user cannot write is read …
        assert as_another_user(config) == corpus.sha256
        cache = cache_root(config.cache_dir)
        assert f"data.cache_dir: {cache} cannot be written (Permission denied)" in as_another_user(theirs)
        # … and one that both may write is built by either, also where the other has left lock files.
        for folder in cache_root(config.cache_dir).iterdir():
            folder.chmod(0o777)
        cache_root(config.cache_dir).chmod(0o777)
        sha = as_another_user(theirs)
        assert prepare(theirs, say=lambda line: pytest.fail(line)).sha256 == sha
    finally:
        os.umask(before)


NO_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int fd, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_disk_without_locks_is_named_with_the_way_out(config_for: MakeConfig, tmp_path: Path) -> None:
    """A library whose `flock` answers as an NFS client without a lock daemon does stands in for that disk."""
    (tmp_path / "locks.c").write_text(NO_LOCKS)
    library = tmp_path / "locks.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "locks.c"], check=True)
    config = config_for(documents(60))
    code = (
        "import sys; from harness.config.schema import DataConfig; from harness.data import prepare\n"
        "from harness.errors import InputError\n"
        "try: prepare(DataConfig.model_validate_json(sys.argv[1]))\n"
        "except InputError as error: print(error)\n"
    )
    import errno

    for number in (errno.ENOLCK, errno.ENOSYS):
        done = subprocess.run(
            [sys.executable, "-c", code, config.model_dump_json()],
            env={**os.environ, "LD_PRELOAD": str(library), "FLOCK_ERRNO": str(number)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert "which gives no file locks" in done.stdout, done.stderr
        assert locks.file_system(tmp_path) in done.stdout
        assert "fix: data.cache_dir=FOLDER_ON_ANOTHER_DISK" in done.stdout


def test_a_lock_that_is_held_and_the_names_of_disks(tmp_path: Path) -> None:
    lock = locks.acquire(tmp_path / "a.lock", key="runs_dir", timeout=0)
    with pytest.raises(Timeout):
        locks.acquire(tmp_path / "a.lock", key="runs_dir", timeout=0)
    lock.release()
    locks.acquire(tmp_path / "a.lock", key="runs_dir", timeout=0).release()
    assert locks.file_system(Path("/proc/self")) == "proc (mounted at /proc)"
    assert locks.file_system(Path("/")).endswith("(mounted at /)")


@pytest.mark.parametrize("name", ["~nobody_of_this_name/cache", "x" * 300])
def test_odd_names_of_cache_folders(config_for: MakeConfig, tmp_path: Path, name: str) -> None:
    folder = name if name.startswith("~") else str(tmp_path / name)
    with pytest.raises(InputError, match=r"data\.cache_dir"):
        prepare(config_for(documents(60), cache_dir=folder))


def test_a_cache_in_a_folder_with_brackets(config_for: MakeConfig, tmp_path: Path) -> None:
    config = config_for(documents(60), cache_dir=str(tmp_path / "c[1] *"))
    corpus = prepare(config)
    assert tokenizer_folder(config, corpus.sha256) == corpus.tokenizer_folder
