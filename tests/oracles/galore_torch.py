"""galore-torch's own classes, without its package's `__init__`, which wants bitsandbytes."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest


def galore_adamw() -> Any:
    """`galore_torch.adamw.AdamW`; skips the test where the package is not installed."""
    if "galore_torch" not in sys.modules:
        spec = find_spec("galore_torch")
        if spec is None:
            pytest.skip("galore-torch is not installed (extra: oracles)")
        sys.modules["galore_torch"] = module_from_spec(spec)
    return import_module("galore_torch.adamw").AdamW
