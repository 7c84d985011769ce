"""apollo-torch's own classes, without its package's `__init__`, which wants bitsandbytes.

The package is not free for commercial use, so it is no dependency: tests compare numbers where somebody installed it
(``pip install --no-deps apollo-torch``).
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest


def apollo_modules() -> tuple[Any, Any]:
    """`apollo_torch.apollo` and `apollo_torch.random_projector`; skips the test where they are not installed."""
    if "apollo_torch" not in sys.modules:
        spec = find_spec("apollo_torch")
        if spec is None:
            pytest.skip("apollo-torch is not installed")
        sys.modules["apollo_torch"] = module_from_spec(spec)
    return import_module("apollo_torch.apollo"), import_module("apollo_torch.random_projector")
