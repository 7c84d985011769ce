"""Interpolations of configuration files: ``${key}``, and ``${oc.env:NAME}`` of variables on an allow list.

A configuration is written to the run folder, to W&B and into batch scripts, so what a file may take from the
environment is listed here. Every other resolver of OmegaConf, Hydra and plug-ins is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.errors import InputError
from harness.redaction import is_secret_name, secret_in

ENVIRONMENT = ("HOME", "USER", "LOGNAME", "TMPDIR", "SCRATCH", "WORK", "PROJECT", "HF_HOME", "XDG_CACHE_HOME")
"""Variables that ``${oc.env:NAME}`` may name, besides those that begin with one of `PREFIXES`."""
PREFIXES = ("OPTBENCH_", "SLURM_")
ALLOWED = f"{', '.join(ENVIRONMENT)}, and names that begin with {' or '.join(PREFIXES)}"

_START = re.compile(r"(?<!\\)(?:\\\\)*(?=\$\{)")
"""Up to an interpolation that no backslash makes literal."""
_KEY = re.compile(r"\$\{[\w.\[\]\s/-]+\}")
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*(?P<name>\w+)\s*(?:,[^${}]*)?\}")
_RESOLVER = re.compile(r"\$\{\s*(?P<name>[^:${}]*)")


def is_allowed(variable: str) -> bool:
    """Return True if a file may read this environment variable: it is listed and its name is no secret's."""
    listed = variable in ENVIRONMENT or variable.startswith(PREFIXES)
    return listed and not is_secret_name(variable)


def resolve(
    values: dict[str, Any], defaults: dict[str, Any], origin: Callable[[str], str | None]
) -> dict[str, Any]:
    """Return the values with their interpolations filled in.

    Args:
        values: nested, as composed.
        defaults: nested; what an interpolation may name besides the values.
        origin: dotted key → the file that holds it, or None for the command line.

    Raises:
        InputError: a resolver or a variable that is not allowed, or an interpolation that cannot be filled in.
    """
    texts = {key: text for key, text in _texts(values, "") if "${" in text}
    if not texts:
        return values
    for key, text in texts.items():
        _check(key, text, origin(key))
    try:
        with only_allowed_variables():
            merged = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.create(values))
            resolved = _part(OmegaConf.to_container(merged, resolve=True), values)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or next(iter(texts)))
        first = next(iter(str(error).splitlines()), type(error).__name__)
        reason = _where(f"cannot be filled in ({first})", origin(key))
        raise InputError(key, texts.get(key, ""), reason, fix=_ESCAPE) from None
    for key, text in _texts(resolved, ""):
        if key in texts and (secret := secret_in(text)):
            raise InputError(key, texts[key], _where(f"holds {secret}", origin(key)), fix=f"leave {key} out")
    return resolved


def _part(resolved: Any, values: Any) -> Any:
    """What `values` has, as resolved: without the defaults that were below it."""
    if isinstance(values, dict) and isinstance(resolved, dict):
        return {str(key): _part(resolved[key], value) for key, value in values.items()}
    return resolved


@contextmanager
def only_allowed_variables() -> Iterator[None]:
    """Let OmegaConf read only allowed environment variables, also from inside other resolvers."""
    from omegaconf.resolvers import oc

    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _environment(name: str, *default: Any) -> Any:
    if not is_allowed(name):
        raise ValueError(f"the environment variable {name} is not on the list of those that a file may read")
    if name in os.environ:
        return os.environ[name]
    if default:
        return default[0]
    raise ValueError(f"the environment variable {name} is not set")


def _check(key: str, text: str, source: str | None) -> None:
    for match in _START.finditer(text):
        if _KEY.match(text, match.end()):
            continue
        variable = _VARIABLE.match(text, match.end())
        if variable is None:
            named = _RESOLVER.match(text, match.end())
            name = named["name"].strip() if named else ""
            reason = _where(f"uses {name or 'an interpolation'}, which is not allowed here", source)
            allowed = "${key} and ${oc.env:NAME}, not nested"
            raise InputError(key, text, reason, allowed=allowed, fix=_ESCAPE)
        if not is_allowed(name := variable["name"]):
            fix = f"type {key}=… on the command line, or export OPTBENCH_{name}"
            if is_secret_name(name):
                fix = f"leave {key} out: a configuration is kept and uploaded; programs read {name} by themselves"
            reason = _where(f"reads {name}, which a file may not", source)
            raise InputError(key, text, reason, allowed=ALLOWED, fix=fix)


_ESCAPE = "type the value itself; in a file, a literal ${ is written \\${"


def _where(reason: str, source: str | None) -> str:
    return f"in {source} {reason}" if source else reason


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{place}]")
