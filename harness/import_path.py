"""Keep the working folder from hiding modules of Python and of libraries. Imports nothing but `os` and `sys`.

`python -m` puts the working folder first on `sys.path`, so a user's `profile.py` or `json.py` there would be imported
in the place of Python's own. Programs of this package move it to the end, where plug-ins are still found.
"""

import os
import sys

_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SITE = ("site-packages", "dist-packages")


def isolate() -> None:
    """Move the working folder to the end of `sys.path`, in this process and those that it starts.

    Only in a program of this package: who imports it keeps a path of their own.

    Raises:
        SystemExit: a module of the working folder was already imported in the place of one of Python's own.
    """
    if not _is_own_program():
        return
    os.environ.update(environment())
    try:
        folder = os.getcwd()
    except OSError:
        return  # it was removed
    entries = [entry for entry in sys.path if not _is_folder(entry, folder)]
    site = [place for place, entry in enumerate(entries) if os.path.basename(entry) in _SITE]
    # In a checkout of this package it still comes before another one that is installed.
    end = site[-1] + 1 if site and _is_folder(_HOME, folder) else len(entries)
    sys.path[:] = [*entries[:end], folder, *entries[end:]]
    _refuse_shadows(folder)


def environment() -> dict[str, str]:
    """Return the environment variables with which other Python processes import safely, and find this package."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # An empty or relative entry is the working folder.
    kept = [entry for entry in inherited if os.path.isabs(entry) and entry != _HOME]
    kept = [*filter(None, [checkout()]), *kept]
    return {
        "PYTHONSAFEPATH": "1",
        **({"PYTHONPATH": os.pathsep.join(kept)} if kept or any(inherited) else {}),
    }


def checkout() -> str | None:
    """Return the folder of the checkout that this package is in; None where it is installed."""
    return None if os.path.basename(_HOME) in _SITE else _HOME


def _is_own_program() -> bool:
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word in ("-X", "-W"):
            next(words, "")
        elif word.startswith("-") and not word.startswith("--") and word.endswith("m"):
            return next(words, "").split(".")[0] in ("harness", "analysis")
        elif word == "-c":
            return False
        elif not word.startswith("-"):
            return os.path.basename(word) in ("optbench", "optbench.exe")
    return False


def _refuse_shadows(folder: str) -> None:
    if _is_folder(os.path.dirname(os.__file__), folder):
        return
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name in sys.stdlib_module_names and _is_folder(os.path.dirname(file), folder):
            # Before the command existed to say so: `python -m` itself imports some.
            print(
                f"{file} hides Python's own module {name}; fix: rename it, or python -P -m …", file=sys.stderr
            )
            raise SystemExit(2)


def _is_folder(entry: str, folder: str) -> bool:
    return entry in ("", ".") or os.path.realpath(entry) == os.path.realpath(folder)
