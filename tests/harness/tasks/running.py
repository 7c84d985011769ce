"""Small runs that fine-tune a model of a few thousand parameters on labelled verses."""

from __future__ import annotations

from pathlib import Path

from tests.harness.running import SMALL_MODEL
from tests.harness.tasks import bible

ENCODER = """
model:
  name: bert
  model_type: bert
  config:
    hidden_size: 32
    intermediate_size: 48
    num_hidden_layers: 2
    num_attention_heads: 2
    vocab_size: 512
    max_position_embeddings: 128
    # Dropout draws other numbers on each process: with it, no two cuts of a batch are equal.
    hidden_dropout_prob: 0.0
    attention_probs_dropout_prob: 0.0
"""
PAIRS = ("task.text=[sentence1,sentence2]", "task.label=label")
SIMILARITIES = ("task.text=[sentence1,sentence2]", "task.label=score")


def classifier(folder: Path, *overrides: str, encoder: bool = True, numbers: bool = False) -> list[str]:
    """Overrides of a run that takes a second, with ``overrides`` winning.

    Args:
        folder: where the data are written, and the run.
        overrides: of the run.
        encoder: BERT instead of LLaMA.
        numbers: similarities instead of classes.
    """
    write = bible.write_similarities if numbers else bible.write_pairs
    train, validation = write(folder, 64, 30)
    base = [
        *(() if encoder else SMALL_MODEL),
        "task=classify",
        *(SIMILARITIES if numbers else PAIRS),
        "data=jsonl",
        f"data.files=[{train}]",
        f"data.validation_files=[{validation}]",
        "data.vocab_size=512",
        "steps=4",
        "batch_size=8",
        "seq_len=128",
        "eval.every=2",
        "log_every=1",
        "wandb.mode=disabled",
        "moments.every=null",
        f"runs_dir={folder}",
        "world_size=1",
    ]
    keys = {word.split("=")[0].lstrip("+") for word in overrides}
    words = [word for word in base if word.split("=")[0] not in keys] + list(overrides)
    if encoder:
        path = folder / "encoder.yaml"
        path.write_text(ENCODER)
        words.insert(0, str(path))
    return words
