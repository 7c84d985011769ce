"""Take a screenshot of a page with an installed Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--force-device-scale-factor=2",
    "--virtual-time-budget=4000",
)
TIME_LIMIT = 60


def browser() -> str | None:
    """Return the path of an installed Chromium, or of the program in CHROMIUM; None if there is none."""
    configured = os.environ.get("CHROMIUM")
    paths = (shutil.which(name) for name in ([configured] if configured else BROWSERS))
    return next((path for path in paths if path), None)


def sandbox_flags() -> list[str]:
    """Return the flag that Chromium requires to run as root; for other users its sandbox stays on."""
    return ["--no-sandbox"] if os.geteuid() == 0 else []


def take_screenshot(page: str, target: Path, *, width: int, height: int) -> str | None:
    """Render an HTML page and write it as a PNG of twice ``width`` × ``height`` pixels.

    Returns:
        None if the file was written, else the reason why it was not.
    """
    chromium = browser()
    if chromium is None:
        return f"{target.name} is not written: it needs Chromium (apt-get install chromium, or set CHROMIUM)"
    with tempfile.TemporaryDirectory(prefix="optbench-") as scratch:
        source, shot = Path(scratch, "page.html"), Path(scratch, "shot.png")
        source.write_text(page, encoding="utf-8")
        command = [
            chromium,
            *FLAGS,
            *sandbox_flags(),
            f"--user-data-dir={scratch}/profile",
            f"--window-size={width},{height}",
        ]
        try:
            subprocess.run(
                [*command, f"--screenshot={shot}", source.as_uri()],
                check=False,
                capture_output=True,
                timeout=TIME_LIMIT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{target.name} is not written: {chromium} failed ({type(error).__name__})"
        if not shot.is_file():
            return f"{target.name} is not written: {chromium} took no screenshot"
        shutil.copyfile(shot, target)
    return None
