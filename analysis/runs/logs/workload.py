"""What a public log states about its workload: model, data and batch, by which runs may be compared.

Settings are recognized by the names that published projects give them. What a log does not state cannot be compared:
`missing` says so, and no verdict is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MODEL = re.compile(
    r"^model\.|(^|[._])(model|model_name|model_type|model_size|architecture|n_layers?|num_layers|num_hidden_layers|depth"
    r"|n_embd|d_model|model_dim|hidden_size|hidden_dim|n_heads?|num_heads|n_params|num_params|vocab_size)$"
)
_DATA = re.compile(
    r"(^|[._])(dataset|datasets|dataset_name|corpus|data)$|^(data|datasets?)\.(name|id|dataset|source|config|subset)$"
)
_BATCH = re.compile(
    r"(^|[._])((train_|global_|total_)?batch_size|batch_tokens|acc_steps|(gradient|grad)_accumulation_steps"
    r"|grad_accum_steps|sequence_length|seq_len|seq_length|max_seq_len|train_seq_len|block_size|context_length|tokenizer)$"
)
_NOT = re.compile(
    r"^(optimizer|optim|wandb)\.|(^|[._])(seed|data_seed|path|dir|folder|device|group|tags?)$|path|dir\b"
)
"""Settings of an optimizer, or of a place or a machine."""


def names_workload(key: str) -> bool:
    """Return True for the dotted key of a setting of model, data or batch."""
    return not _NOT.search(key) and any(kind.search(key) for kind in (_MODEL, _DATA, _BATCH))


def settings_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that define the workload, by name."""
    return {key: settings[key] for key in sorted(settings) if names_workload(key)}


def missing(settings: Mapping[str, Any]) -> str:
    """Return ``model``, ``data`` or ``model and data`` where the settings do not state them; empty if they do."""
    known = settings_of(settings)
    kinds = {"model": _MODEL, "data": _DATA}
    return " and ".join(name for name, kind in kinds.items() if not any(map(kind.search, known)))


def titles(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return short names of model and data in the form of a run's configuration, for titles."""
    found: dict[str, dict[str, str]] = {}
    for part, kind in (("model", _MODEL), ("data", _DATA)):
        stated = {key: value for key, value in settings_of(settings).items() if kind.search(key)}
        names = [value for value in stated.values() if isinstance(value, str)]
        # Without a name, the numbers tell models apart.
        shown = names or [f"{key.rpartition('.')[2]}={value}" for key, value in stated.items()]
        if shown:
            found[part] = {"name": ", ".join(shown[:3])}
    return found
