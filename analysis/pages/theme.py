"""Render a template in the theme of all reports: one self-contained page that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.formatting import to_jsonable
from analysis.pages.figures import DASHES, PALETTES, Plot
from harness.visible import visible

PART_PALETTES = {
    "light": ["#9aa3ad", "#0072b2", "#d55e00", "#009e73", "#b37a00", "#b0568c", "#3d9bd6", "#7a4f2a"],
    "dark": ["#87909b", "#5cb3ec", "#ff8c4a", "#35c99c", "#f2bd48", "#eaa0cb", "#a5dbff", "#d2a679"],
}
"""Colours of the parts of a bar, distinct from those of arms."""
BASIC_KINDS = ("scatter", "bar", "pie")
BASIC = files("analysis.pages") / "bundled" / "plotly-basic.min.js"
"""As published in the npm package plotly.js-basic-dist-min 4.1.1 (MIT License, beside it)."""
DASH_PATTERNS = dict(zip(DASHES, ("", "7 4", "2 4", "7 3 2 3", "11 4", "11 3 2 3"), strict=True))


def render(
    template: str,
    package: str = "analysis.pages",
    *,
    style: str | None = None,
    has_heat_map: bool = False,
    **values: Any,
) -> str:
    """Return a page as text with plotly.js, styles and script embedded; its policy allows nothing else to run.

    Args:
        template: name of the file.
        package: contains it in its folder `templates`; styles and script come from this package.
        style: name of a further style sheet in that folder.
        has_heat_map: embed the whole plotly.js (4.8 MB), not the bundle of curves and bars (1.2 MB).
        values: passed to the template, which also receives `policy`, `css`, `script`, `plotly`, `palettes`, `dashes`,
            `colours`.
    """
    environment = _environment(package)

    def raw(name: str) -> str:
        assert environment.loader is not None
        return environment.loader.get_source(environment, name)[0]

    css = raw("report.css") + (raw(style) if style else "")
    script, plotly = raw("report.js"), _plotly(whole=has_heat_map)
    shared = {
        "policy": Markup(policy([plotly, script], [css, *_own_styles(plotly)])),
        "css": Markup(css),
        "script": Markup(script),
        "plotly": Markup(plotly),
        "palettes": embedded({"arms": PALETTES, "parts": PART_PALETTES}),
        "dashes": [DASH_PATTERNS[name] for name in DASHES],
        "colours": PALETTES["light"],
    }
    return environment.get_template(template).render(**shared, **values)


@lru_cache
def _environment(package: str) -> Environment:
    """Return the templates of a package and of this one: compiled once, however many pages are rendered."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("analysis.pages")])
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_finalized
    )


def policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Return the content security policy of a page that allows only these scripts and style sheets.

    Style attributes stay allowed: they hold heights and widths, and they cannot load anything.
    """
    # plotly adds one empty style sheet and fills it rule by rule.
    sheets = " ".join(map(_hash, [*styles, ""]))
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(map(_hash, scripts)),
        "style-src": sheets,
        "style-src-attr": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in rules.items())


def has_heat_map(plots: Iterable[Plot]) -> bool:
    """Return True if a trace is of a kind that the small bundle does not draw."""
    return any(trace["type"] not in BASIC_KINDS for plot in plots for trace in plot.figure["data"])


@lru_cache(2)
def _plotly(*, whole: bool) -> str:
    """Return plotly.js for a script element: whole as the Python package has it, or its own bundle that draws scatter,
    bar and pie alone.
    """
    text = get_plotlyjs() if whole else BASIC.read_text(encoding="utf-8")
    return text.replace("</script", "<\\/script")


@lru_cache(2)
def _own_styles(plotly: str) -> list[str]:
    """Return the style sheets for maps that plotly.js adds when it is loaded."""
    return re.findall(r"\.textContent='([^'\\]{100,})'", plotly)


@lru_cache(16)
def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _finalized(value: Any) -> Any:
    """Make control characters of texts visible; markup comes from our templates."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def plot_data(key: str, shown: Iterable[Plot]) -> Markup:
    """Return plots for a script element of class ``figures``, drawn where data-figure is ``key``-(plot's key)."""
    return embedded({f"{key}-{plot.key}": asdict(plot) for plot in shown})


def embedded(value: object) -> Markup:
    """Return JSON that is safe inside a script element, whatever text it contains."""
    text = json.dumps(_shown(to_jsonable(value)), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _shown(value: Any) -> Any:
    """Return JSON data with the control characters of its texts made visible."""
    if isinstance(value, dict):
        return {visible(key): _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return visible(value) if isinstance(value, str) else value
