"""Where configuration files are: the user's ./configs first, then the ones that the package ships."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from copy import deepcopy
from functools import cache, lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from harness.config import yaml_files
from harness.errors import InputError

GROUPS = ("model", "data", "task", "optimizer", "engine", "schedule", "experiment")
OTHER_GROUPS = ("cluster", "paper", "study")
"""Groups that describe something else than the run: no part of a `RunConfig`."""
COMPANIONS = ("margin", "reconstruct")
"""Commands with keys of their own; the names of their experiments begin with the command's."""
PRIMARY = "optbench"
RULES_ENTRY_POINT = "optbench.optimizers"


class Composed(NamedTuple):
    """Group files merged: the values (interpolations not filled in), and the files in the order of merging."""

    values: dict[str, Any]
    files: list[Path]


def package_root() -> Path:
    """Return the folder of the shipped configurations: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def search_path(folder: Path | None = None) -> list[Path]:
    """Return the configuration roots; the first one that holds a file wins.

    Args:
        folder: where the user is; default: the current folder. Its ./configs counts only if it holds one of
            our group names: a folder of that name that serves another program is left alone.
    """
    own = (folder or Path.cwd()) / "configs"
    shipped = package_root()
    is_ours = own.resolve() != shipped and any((own / group).is_dir() for group in (*GROUPS, *OTHER_GROUPS))
    return [own, shipped] if is_ours else [shipped]


def find(group: str, option: str) -> Path | None:
    """Return the file of one option, or None."""
    if ".." in option.split("/") or option.startswith("/"):
        return None
    candidates = (root / group / f"{option}.yaml" for root in search_path())
    try:
        return next((path for path in candidates if path.is_file()), None)
    except OSError:  # a name that is too long for a file
        return None


def plugin_rules() -> list[str]:
    """Return the names of the optimizer rules that installed packages offer."""
    return sorted(entry.name for entry in entry_points(group=RULES_ENTRY_POINT))


def options(group: str) -> list[str]:
    """Return what can be chosen in a group: its files, and for optimizers also presets and plug-in rules."""
    names = {path.stem for root in search_path() for path in (root / group).glob("*.yaml")}
    if group == "optimizer":
        from optimizers.presets import PRESETS

        names |= set(PRESETS) | set(plugin_rules())
    return sorted(names)


def command_of(experiment: str) -> str:
    """Return the command that an experiment is for: one of `COMPANIONS`, or "train"."""
    named = next((command for command in COMPANIONS if experiment.startswith(command)), None)
    path = find("experiment", experiment)
    if named is None or path is None:
        return "train"
    return named if _has_keys_of_its_own(path, path.stat().st_mtime_ns) else "train"


@lru_cache(maxsize=256)
def _has_keys_of_its_own(path: Path, changed_ns: int) -> bool:
    """Return True if an experiment holds keys that no training run has; read again when the file changes."""
    from harness.config.schema import RunConfig

    content = yaml_files.read("experiment", path)
    return isinstance(content, dict) and not set(content) <= {"defaults", *RunConfig.model_fields}


def experiments(command: str) -> list[str]:
    """Return the names of the experiments that a command can run."""
    return [name for name in options("experiment") if command_of(name) == command]


def options_of_runs(group: str) -> list[str]:
    """Return what a training run can choose in a group."""
    return experiments("train") if group == "experiment" else options(group)


def compose(selections: dict[str, str]) -> Composed:
    """Merge the chosen group files with Hydra (its defaults lists, packages and overrides of defaults hold).

    Args:
        selections: group → option; every option has a file.

    Raises:
        InputError: a file that is not YAML, or asks for a file that does not exist.
    """
    values, chosen = _merged(PRIMARY, selections)
    final = {group: option for group in GROUPS if isinstance(option := chosen.get(group), str)}
    return Composed(values, list(_files_of(final)))


def compose_one(group: str, option: str) -> dict[str, Any]:
    """Return the values of one file of a group, merged with the files in its defaults list.

    Raises:
        InputError: as `compose`.
    """
    from harness.config.yaml_files import resolve_interpolations

    values, _ = _merged(f"{group}/{option}", {group: option}, choose=False)
    inside = resolve_interpolations(values, {}, lambda key: str(find(group, option))).get(group, {})
    return inside if isinstance(inside, dict) else {}


def _merged(
    name: str, selections: dict[str, str], *, choose: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge a file with Hydra; return its values and the option that every group has in the end.

    Hydra takes some 60 ms, so what it made of shipped files alone is kept until one of them changes.
    """
    root = package_root()
    if search_path() != [root]:
        return _merge(name, selections, choose)
    state = tuple((str(path), path.stat().st_mtime_ns) for path in sorted(root.rglob("*.yaml")))
    return deepcopy(_merged_shipped(name, tuple(selections.items()), choose, state))


@lru_cache(maxsize=128)
def _merged_shipped(
    name: str, selections: tuple[tuple[str, str], ...], choose: bool, state: Hashable
) -> tuple[dict[str, Any], dict[str, Any]]:
    del state
    return _merge(name, dict(selections), choose)


def _merge(name: str, selections: dict[str, str], choose: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from harness.config.yaml_files import only_allowed_variables

    _register_own_configs()
    for path in _files_of(selections):
        yaml_files.read("configs", path)
    # Hydra's own logging settings are not used, and loading them takes half of the time.
    overrides = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    overrides += [f"{group}={option}" for group, option in selections.items()] if choose else []
    GlobalHydra.instance().clear()
    try:
        with only_allowed_variables(), initialize_config_dir(str(package_root()), version_base="1.3"):
            config = hydra_compose(name, overrides, return_hydra_config=True)
        chosen = {str(key): value for key, value in dict(config.hydra.runtime.choices).items()}
        body = DictConfig({key: value for key, value in config.items_ex(resolve=False) if key != "hydra"})
        values = OmegaConf.to_container(body, resolve=False)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise _file_error(error, selections) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, chosen


@cache
def _register_own_configs() -> None:
    """Tell Hydra, once per process, to search the user's folder before the shipped one."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class OwnConfigsFirst(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for root in reversed(_own_roots()):
                search_path.prepend("optbench", f"file://{root}")

    Plugins.instance().register(OwnConfigsFirst)


def _own_roots() -> list[Path]:
    return search_path()[:-1]


def _files_of(selections: dict[str, str]) -> Iterable[Path]:
    """Return the primary file, and for each selection the first file of that name in the search path."""
    primary = next(path for root in search_path() if (path := root / f"{PRIMARY}.yaml").is_file())
    chosen = (find(group, option) for group, option in selections.items())
    return [primary, *(path for path in chosen if path is not None)]


def _file_error(error: Exception, selections: dict[str, str]) -> InputError:
    """Return Hydra's error as a one-line error."""
    text = " ".join(str(error).split())
    chosen = " ".join(f"{group}={option}" for group, option in selections.items())
    return InputError(
        "configs", chosen or PRIMARY, f"cannot be composed ({text})", fix="correct the file named"
    )
