"""The documentation is true: its commands are accepted, its links lead somewhere, its pictures are there."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from analysis.margin import config as margin_config
from analysis.memorization import config as memorization_config
from analysis.reconstruction import config
from analysis.tuning import arguments as study_arguments
from harness.commands import COMMANDS
from harness.config import checks, cluster, compose
from harness.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(optbench [a-z][^`]*)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PLACES = ("files", "path", "config_file", "model", "runs_dir")
"""Keys that name files and folders of the reader's, which are not here."""
_ELLIPSIS = ("…", "...", "[", "|", "NAME", "DIR", "N ", "PATH", "<", "FILE")


def commands(page: Path) -> list[str]:
    """Every command line of a page that stands whole, comments taken off, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"\s+#.*$", "", line).strip() for line in lines] + _INLINE.findall(text)
    return [line.removeprefix("$ ") for line in found if line and not line.startswith("#")]


ALL = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)})
OURS = [
    (page, line)
    for page, line in ALL
    if line.startswith("optbench ") and not any(e in line for e in _ELLIPSIS)
]


COMPANIONS: dict[str, Callable[[list[str]], object]] = {
    "margin": margin_config.load,
    "reconstruct": config.load,
    "memorize": memorization_config.load,
}
"""Commands with keys of their own → what reads those keys."""


@pytest.mark.parametrize(("page", "line"), OURS, ids=[f"{page}: {line}"[:90] for page, line in OURS])
def test_a_command_of_ours_is_one(page: str, line: str) -> None:
    """The command exists; the keys of a run compose, and pass all checks that need no data and no GPU; those of a
    companion job are read by it."""
    words = shlex.split(re.split(r"\s(?:>>?|2>|\||&&|;)\s?", line)[0])[1:]
    if not words or words[0].startswith("-"):
        return
    command, keys = words[0], [word for word in words[1:] if "=" in word and not word.startswith("-")]
    if command in COMPANIONS:
        COMPANIONS[command](keys)
    elif COMMANDS[command].takes_keys and command in ("train", "plan"):
        try:
            checks.check(compose.load(keys), environ={}, devices=8)
        except InputError as error:
            if not any(place in error.key for place in _PLACES):
                raise


_YAML = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)
YAML_BLOCKS = [
    (page.relative_to(ROOT).as_posix(), block)
    for page in PAGES
    for block in _YAML.findall(page.read_text(encoding="utf-8"))
]


def use_as_written(block: str, folder: Path) -> None:
    """Put a YAML block where its comment says (or where its keys belong), and read it as its command would."""
    named = re.search(r"configs/([a-z]+)/(\w+)\.yaml", block)
    group, name = named.groups() if named else ("study", "mine") if "space:" in block else ("", "run")
    path = folder / f"configs/{group}/{name}.yaml" if group else folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block, encoding="utf-8")
    if group == "cluster":
        cluster.load([f"cluster={name}"])
    elif group == "study":
        assert study_arguments.read_study_file(name, [])
    else:
        words = [str(path)] if not group else [f"{group}={name}"]
        checks.check(compose.load(words), environ={}, devices=0)


@pytest.mark.parametrize(
    ("page", "block"), YAML_BLOCKS, ids=[f"{page}: {block[:40]}" for page, block in YAML_BLOCKS]
)
def test_a_yaml_block_works_as_written(
    page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use_as_written(block, tmp_path)


@pytest.mark.parametrize(
    "block",
    [
        "# configs/model/mine.yaml\nname: mine\nmodel_type: qwen3\nconfig: {num_attention_heads: 4}\n",
        "# run.yaml\nstepz: 3\n",
        "# configs/cluster/mine.yaml\ndefaults: [generic_gpu, _self_]\npartitio: gpu\n",
    ],
)
def test_control_a_wrong_block_would_be_seen(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        use_as_written(block, tmp_path)


@pytest.mark.parametrize("command", COMPANIONS)
def test_examples_of_a_companion_are_words_of_it(command: str) -> None:
    for words, _ in COMMANDS[command].examples:
        test_a_command_of_ours_is_one("--help", f"optbench {command} {words}")


@pytest.mark.parametrize(
    "target",
    sorted({t for _, line in ALL for t in re.findall(r"\bmake (?:[A-Z_]+=\S+ )*([a-z][a-z-]+)", line)}),
)
def test_a_make_target_exists(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


_MODULE = re.compile(r"python -m ((?:benchmarks|analysis|harness)[\w.]+)")


@pytest.mark.parametrize(
    "module", sorted({m for page in PAGES for m in _MODULE.findall(page.read_text(encoding="utf-8"))})
)
def test_a_module_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link or link.startswith(("#", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve()
        assert path.exists(), f"{link} in {page.name}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+\s+(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{link} in {page.name}"


_PATH = re.compile(r"`((?:\.ci|analysis|benchmarks|configs|docs|harness|optimizers|slurm|tests)/[\w./-]+)`")
_OF_THE_READER = {
    "configs/cluster/spot.yaml",
    "configs/paper/NAME.yaml",
    "configs/study/NAME.yaml",
    "optimizers/reference/row_muon.py",
    "optimizers/rules/row_muon.py",
    "slurm/events.tsv",
    "tests/optimizers/test_row_muon.py",
}
"""Paths that look like the project's, but are a reader's own, a run's, or those of an example."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_path_of_the_project_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # Its entries are about the past.
        return
    paths = set(_PATH.findall(page.read_text(encoding="utf-8"))) - _OF_THE_READER
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


_NAME = re.compile(r"`((?:analysis|benchmarks|harness|optimizers)(?:\.\w+)+)(?:\([^`]*\))?`")


@pytest.mark.parametrize(
    "name",
    sorted(
        {name for page in PAGES for name in _NAME.findall(page.read_text(encoding="utf-8"))}
        - {"analysis.sbatch"}
    ),
)
def test_a_dotted_name_in_the_docs_exists(name: str) -> None:
    assert pkgutil.resolve_name(name) is not None


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in _LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / link.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.exists():
                todo.append(path)
    assert {*PAGES} <= seen


def navigation() -> list[str]:
    """Return the pages that mkdocs.yml lists, in order."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    # What precedes `nav` has tags of Python objects, which the safe loader refuses.
    sections = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    return [
        page
        for section in sections
        for entries in section.values()
        for entry in entries
        for page in entry.values()
    ]


def test_the_site_lists_every_page_once_and_no_other() -> None:
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(navigation()) == sorted(pages | {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"})


@pytest.mark.parametrize(
    "name", re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
)
def test_an_entry_of_the_api_reference_exists(name: str) -> None:
    assert pkgutil.resolve_name(name).__doc__


def test_every_command_is_documented() -> None:
    text = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in COMMANDS if f"optbench {name}" not in text]
    assert missing == []


@pytest.mark.parametrize("words", ["train optimizer=sumo stepz=3", "margin stepz=3", "reconstruct stepz=3"])
def test_control_a_wrong_key_in_the_docs_would_be_seen(words: str) -> None:
    with pytest.raises(InputError, match="unknown key"):
        test_a_command_of_ours_is_one("page", f"optbench {words}")
