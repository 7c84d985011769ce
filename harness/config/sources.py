"""Where configuration files are: the user's ./configs first, then the ones that the package ships."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from harness.config.errors import InputError

GROUPS = ("model", "data", "optimizer", "engine", "schedule", "experiment")
OTHER_GROUPS = ("cluster", "paper", "study")
"""Groups that describe something else than the run: no part of a `RunConfig`."""
PRIMARY = "optbench"
RULES_ENTRY_POINT = "optbench.optimizers"


class Composed(NamedTuple):
    """Group files merged: the values, and the files that they came from in the order of merging."""

    values: dict[str, Any]
    files: list[Path]


def package_root() -> Path:
    """Folder of the shipped configurations: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def search_path(folder: Path | None = None) -> list[Path]:
    """Configuration roots, first match wins.

    Args:
        folder: where the user is; default: the current folder. Its ./configs counts only if it holds one of
            our group names: a folder of that name that serves another program is left alone.
    """
    own = (folder or Path.cwd()) / "configs"
    shipped = package_root()
    is_ours = own.resolve() != shipped and any((own / group).is_dir() for group in (*GROUPS, *OTHER_GROUPS))
    return [own, shipped] if is_ours else [shipped]


def find(group: str, option: str) -> Path | None:
    """The file of one option, or None."""
    candidates = (root / group / f"{option}.yaml" for root in search_path())
    return next((path for path in candidates if path.is_file()), None)


def plugin_rules() -> list[str]:
    """Names of the optimizer rules that installed packages offer."""
    return sorted(entry.name for entry in entry_points(group=RULES_ENTRY_POINT))


def options(group: str) -> list[str]:
    """What can be chosen in a group: its files, and for optimizers the presets and plug-in rules too."""
    names = {path.stem for root in search_path() for path in (root / group).glob("*.yaml")}
    if group == "optimizer":
        from optimizers.presets import PRESETS

        names |= set(PRESETS) | set(plugin_rules())
    return sorted(names)


def compose(selections: dict[str, str]) -> Composed:
    """Merge the chosen group files with Hydra (its defaults lists, packages and overrides of defaults hold).

    Args:
        selections: group → option; every option has a file.

    Raises:
        InputError: a file that is not YAML, or asks for a file that does not exist.
    """
    values, chosen = _merged(PRIMARY, selections)
    files = [next(path for root in search_path() if (path := root / f"{PRIMARY}.yaml").is_file())]
    for group in GROUPS:
        if isinstance(option := chosen.get(group), str) and (path := find(group, option)):
            files.append(path)
    return Composed(values, files)


def compose_one(group: str, option: str) -> dict[str, Any]:
    """The values of one file of a group, with what its defaults list names.

    Raises:
        InputError: as `compose`.
    """
    values, _ = _merged(f"{group}/{option}", {group: option}, choose=False)
    inside = values.get(group, {})
    return inside if isinstance(inside, dict) else {}


def _merged(
    name: str, selections: dict[str, str], *, choose: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file merged by Hydra: its values, and which option every group has in the end."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _register_own_configs()
    # Hydra's own logging settings are not used, and loading them takes half of the time.
    overrides = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    overrides += [f"{group}={option}" for group, option in selections.items()] if choose else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(package_root()), version_base="1.3"):
            config = hydra_compose(name, overrides, return_hydra_config=True)
        chosen = {str(key): value for key, value in dict(config.hydra.runtime.choices).items()}
        body = DictConfig({key: value for key, value in config.items_ex(resolve=False) if key != "hydra"})
        values = OmegaConf.to_container(body, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise _file_error(error, selections) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, chosen


@cache
def _register_own_configs() -> None:
    """Tell Hydra, once per process, to look into the user's folder before ours."""
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


def _file_error(error: Exception, selections: dict[str, str]) -> InputError:
    """Name the file that does not parse; else say what Hydra said, in one line."""
    import yaml

    primary = [root / f"{PRIMARY}.yaml" for root in search_path()]
    for path in [*primary, *(find(group, option) for group, option in selections.items())]:
        try:
            if path is not None and path.is_file():
                yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as broken:
            mark = getattr(broken, "problem_mark", None)
            line = f"line {mark.line + 1}" if mark else "this file"
            problem = getattr(broken, "problem", None) or str(broken)
            return InputError(f"{path}", line, f"is not YAML ({problem})", fix=f"correct {path}")
    text = " ".join(str(error).split())
    chosen = " ".join(f"{group}={option}" for group, option in selections.items())
    return InputError(
        "configs", chosen or PRIMARY, f"cannot be composed ({text})", fix="correct the file named"
    )
