"""Hooks of `mkdocs build`: pages from the repository's root, and formulas as MathML instead of a script.

GitHub and the site read the same Markdown. What differs between the two is handled here.
"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root, with links that start in docs/ instead of the root."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links from docs/ to the repository's root at the pages that `on_files` added."""
    return re.sub(r"\]\(\.\./((?:\.\./)?(?:CHANGELOG|CONTRIBUTING|SECURITY)\.md)", r"](\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Write every formula as MathML, which browsers draw without a script."""
    return _FORMULA.sub(_as_mathml, html)


def _as_mathml(formula: re.Match[str]) -> str:
    display = "block" if formula["tag"] == "div" else "inline"
    return convert(unescape(formula["tex"]).strip(), display=display)
