"""Exports that state only how a run ended, as exports with a history of one row.

* ``config`` and ``summary`` of a W&B run without its history, as `wandb.Api().run(…)` has them and as marin writes them
  into ``tracker_metrics.jsonl``.
* marin's ``speedrun_results.json``: ``runs``, each with a ``run_info`` of model, data, training and last evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = "the export has only the last evaluation: there is no curve"
_ENDS = {
    "eval/paloma/c4_en/bpb": "eval/paloma/c4_en/bpb",
    "eval/paloma/c4_en/loss": "eval/paloma/c4_en/loss",
    "total_tokens": "tokens",
    "training_time": "total_training_time",
}
"""Figure of a run_info → column of a history."""
_MODEL = ("model_config", "model_size")
_TRAIN = "train_config"


def with_history(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the runs of a document that has no history as documents with one; any other document as it is."""
    runs = document.get("runs")
    if isinstance(runs, list) and any(isinstance(run, Mapping) and "run_info" in run for run in runs):
        infos = [run["run_info"] for run in runs if isinstance(run, Mapping) and _is_table(run, "run_info")]
        return [_speedrun(number, info) for number, info in enumerate(infos, 1)]
    is_summary = _is_table(document, "summary") and not any(
        key in document for key in ("history", "eval_history")
    )
    if is_summary and _is_table(document, "config"):
        return [{**document, "history": [document["summary"]], "notes": [NOTE]}]
    return [document]


def _is_table(document: Mapping[str, Any], key: str) -> bool:
    return isinstance(document.get(key), Mapping)


def _speedrun(number: int, info: Mapping[str, Any]) -> Mapping[str, Any]:
    train = info[_TRAIN] if _is_table(info, _TRAIN) else {}
    row = {column: info[key] for key, column in _ENDS.items() if info.get(key) is not None}
    row |= {"step": train.get("num_train_steps"), "learning_rate": train.get("learning_rate")}
    # Without a name, a later run of a file would replace the earlier ones.
    row["run"] = str(info.get("wandb_run_link") or number).rstrip("/").rpartition("/")[2]
    config: dict[str, Any] = {key: info[key] for key in _MODEL if key in info}
    config |= {
        key: value for key, value in train.items() if not isinstance(value, Mapping) and value is not None
    }
    if _is_table(train, "optimizer_config"):
        config["optimizer"] = {
            key: value for key, value in train["optimizer_config"].items() if value is not None
        }
    if isinstance(info.get("tokenized_dataset"), str):
        # The same data are in several places; the last part names them with a hash of how they were tokenized.
        config["dataset"] = info["tokenized_dataset"].rstrip("/").rpartition("/")[2]
    return {"config": config, "history": [row], "notes": [NOTE]}
