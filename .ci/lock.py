"""Print requirements.lock: every package that is installed, exactly. Run inside the project's virtual environment."""

from __future__ import annotations

import subprocess
import sys

HEADER = """\
# Exact versions of everything that `make setup` installs, development tools and test oracles included.
# Written by `make lock`. torch has no local version here: GPU machines take a CUDA build of the same release."""


def main() -> None:
    """Write the lock file to standard output."""
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    print(HEADER)
    for line in sorted(frozen, key=str.lower):
        name, version = line.split("==")
        if name not in ("optbench", "pip", "setuptools"):
            print(f"{name}=={version.split('+')[0]}")


if __name__ == "__main__":
    main()
