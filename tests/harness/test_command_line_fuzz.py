"""Whatever is typed, a command ends with 0, 1, 2 or 75 and without a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness import cli
from harness.commands import COMMANDS, Command
from harness.config import checks, compose, sources
from harness.config.schema import run_keys
from harness.errors import InputError
from harness.record.folder import path_of

ACCEPTED = (0, 1, 2, 75)
LIMIT_S = 20

NASTY = [
    "", " ", "9" * 5000, "-" + "9" * 5000, "1e400", "-1", "0", "nan", "inf", "1.5", "0x10", "1_000",
    "x" * 300, "x" * 30000,
    "${", "${}", "${x", "${oc.env:HOME}", "${oc.env:X_API_KEY}", "${oc.decode:1}", "${seed}", "\\${x}", "$(x)", "`x`",
    "\udcff", "a\ud800b", "😀", "e\u0301", "\u202ex", "\x00", "\x1b[2J", "a\nb", "a\tb", "\r",
    "[", "]", "[1,2", "[1,2]", "{a:1}", "{", "{a:{b:{c:1}}}", "[" * 500, "'", '"', "'a", "\\", "a\\", "a,b",
    "a..b", "1..2",
    "../x", "../../../x", "/", "/dev/null", "/proc/self/mem", ".", "..", "~", "~/x", "~nobody/x", "a/b", "*", "a*b?[c]",
    "null", "true", "false", "None", "no", "???", "=", "a=b", "==", "--", "-", "+a", "a@b", "%s", "{0}", "#",
    ";", "&", "|",
    "1e-3,1e-2", "range(1,3)", "choice(1,2)", "glob(*)", "int(3)", "run.yaml", "dump.jsonl", "folder",
    "10k", "5%", "2^99",
]  # fmt: skip
"""Values that broke a command once, or are of their kind."""
SAFE = ("list", "show", "completion", "report", "export", "status", "clean")
"""Commands that may run to their end here: there is nothing in the folder for them to do."""
FLAGS = [
    "--json",
    "--help",
    "-h",
    "--out",
    "--world-size",
    "--device-memory",
    "--dry-run",
    "--list",
    "--wandb",
    "--export",
]
FLAGS += [
    "--full",
    "--after",
    "--then",
    "--cancel",
    "--resubmit",
    "--commands",
    "--zzqx",
    "--out=x",
    "-x",
    "--",
    "--json=1",
]
NAMES = [
    *run_keys(),
    *sources.GROUPS,
    "cluster",
    "cluster.env",
    "cluster.nodes",
    "cluster.setup",
    "study",
    "trials",
]
NAMES += [
    "lr",
    "seeds",
    "preset",
    "model.config",
    "model.config.hidden_size",
    "model.config.num_hidden_layers",
]
NAMES += [
    "optimizer.rank",
    "optimizer.betas",
    "optimizer.momentum",
    "sumo.rank",
    "mode",
    "w",
    "checkpoints",
    "runs",
    "rule",
]
NAMES += [
    "model.config.intermediate_size",
    "model.config.rope_scaling",
    "",
    " ",
    "a b",
    "x.y.z",
    "+seed",
    "~seed",
    "😀",
    "\udcff",
]
STRAYS = [
    "adamw",
    "sumo",
    "adamw sumo",
    "train",
    "sumo_table3",
    "bash",
    ".",
    "runs",
    "/",
    "x" * 300,
    "run.yaml",
    "folder",
]

values = st.one_of(
    st.sampled_from(NASTY), st.sampled_from(NASTY), st.text(max_size=12), st.integers().map(str)
)
assignments = st.builds(lambda name, value: f"{name}={value}", st.sampled_from(NAMES), values)
words = st.one_of(assignments, assignments, st.sampled_from(FLAGS), st.sampled_from(STRAYS), values)
lines = st.tuples(st.sampled_from(sorted(COMMANDS)), st.lists(words, max_size=4), st.integers(0, 4))


@contextlib.contextmanager
def empty_folder() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("run.yaml").write_text("steps: 3\n")
        Path("dump.jsonl").write_text('{"text": "a"}\n')
        Path("folder").mkdir()
        try:
            yield
        finally:
            os.chdir(before)


def ends_well(argv: list[str]) -> None:
    """Run a command in this process and judge its end."""
    out, err = io.StringIO(), io.StringIO()
    started = time.process_time()
    with empty_folder(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    assert code in ACCEPTED, f"{argv!r} ended with {code}:\n{err.getvalue()[-2000:]}"
    assert "Traceback" not in err.getvalue(), argv
    assert time.process_time() - started < LIMIT_S, argv
    if code == 2:
        assert len(err.getvalue().strip().splitlines()) >= 1
    out.getvalue().encode("utf-8", "backslashreplace")


def harmless(command: str, given_words: list[str], place: int) -> list[str]:
    """A command line that cannot start anything: where a command would work, one of its words is wrong."""
    if command in SAFE and "--watch" not in given_words:
        return [command, *given_words]
    rest = list(given_words)
    rest.insert(place, "zzqx=1")
    return [command, *rest]


def composes(argv: list[str]) -> None:
    """All that `train` does before it looks at data, and what it would write."""
    with empty_folder():
        try:
            config = checks.check(compose.load(argv), environ={}, devices=0)
            path_of(config, "0123456789abcdef")
            Path("config.yaml").write_text(compose.to_yaml(config), encoding="utf-8")
            assert compose.load_file("config.yaml") == config
            assert checks.check(compose.load(["config.yaml"]), environ={}, devices=0) == config
            compose.difference(config)
        except InputError as error:
            problem = str(error)
        else:
            problem = ""
    assert "\n" not in problem


BOUNDED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
)
LONG = settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
)


@BOUNDED
@given(lines)
@example(("show", ["x" * 300], 0))
@example(("report", ["\udcff"], 0))
@example(("export", ["x" * 300, "y" * 300], 0))
@example(("plan", ["--world-size", "9" * 5000], 0))
def test_any_command_line(line: tuple[str, list[str], int]) -> None:
    ends_well(harmless(*line))


@BOUNDED
@given(st.lists(assignments, max_size=3))
@example(["name=" + "x" * 300])
@example(["model.name=../../../x"])
@example(["wandb.project=${"])
@example(["model.config.intermediate_size=x"])
@example(["group=😀"])
def test_any_keys_of_a_run(given_words: list[str]) -> None:
    composes(given_words)


@pytest.mark.parametrize("value", NASTY[::5], ids=lambda text: ascii(text)[:20])
def test_nasty_values(value: str) -> None:
    composes([f"name={value}", f"steps={value}"])
    composes([f"name={value}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["name", "steps", "optimizer.lr", "data.files", "model.name"])
def test_each_nasty_value(name: str) -> None:
    for value in NASTY:
        composes([f"{name}={value}"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(lines)
def test_any_command_line_for_long(line: tuple[str, list[str], int]) -> None:
    ends_well(harmless(*line))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(st.lists(assignments, max_size=4))
def test_any_keys_of_a_run_for_long(given_words: list[str]) -> None:
    composes(given_words)


def test_control_a_traceback_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: Command, argv: list[str]) -> int:
        raise RuntimeError("boom")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(AssertionError, match="ended with 3"):
        ends_well(["list"])
