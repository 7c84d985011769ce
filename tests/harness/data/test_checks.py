"""All that can be wrong between the data and the run: one line each, naming the key and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.schema import DataConfig
from harness.data import check, prepare
from harness.errors import InputError
from harness.files.cache import cache_root

from .conftest import MakeConfig, documents, t5_like

GOOD: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "eval_tokens": 320, "model_vocab_size": 400}


def test_a_good_run_gets_its_corpus(config_for: MakeConfig) -> None:
    config = config_for(documents(200))
    assert check(config, **GOOD).sha256 == prepare(config).sha256
    check(config, **{**GOOD, "model_vocab_size": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seq_len": 600},
            r"seq_len: 600 is longer than the validation split \(\d+ tokens\); allowed: 2 to \d+$",
        ),
        ({"seq_len": 10**6}, r"seq_len: 1000000 is longer than the train split"),
        (
            {"batch_size": 10_000},
            r"batch_size: 10000 is larger than the data \(\d+ sequences .*fix: batch_size=\d+$",
        ),
        (
            {"eval_tokens": 9_000},
            r"eval.tokens: 9000 is larger than the validation split .*fix: eval.tokens=\d+ or",
        ),
        (
            {"model_vocab_size": 256},
            r"data.vocab_size: 400 is larger than the model's vocabulary \(256\); fix: ",
        ),
    ],
)
def test_what_does_not_fit(config_for: MakeConfig, change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(config_for(documents(200)), **{**GOOD, **change})


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_the_fixes_that_are_offered_work(config_for: MakeConfig, mode: str) -> None:
    config = config_for(documents(400), mode=mode)
    with pytest.raises(InputError) as error:
        check(config, **{**GOOD, "eval_tokens": 900})
    tokens, validation = (
        int(word.split("=")[1]) for word in str(error.value).split("fix: ")[1].split(" or ")
    )
    check(config, **{**GOOD, "eval_tokens": tokens})
    check(config.model_copy(update={"validation_tokens": validation}), **{**GOOD, "eval_tokens": 900})
    with pytest.raises(InputError) as error:
        check(config, **{**GOOD, "batch_size": 10**6, "eval_tokens": 100})
    check(config, **{**GOOD, "eval_tokens": 100, "batch_size": int(str(error.value).rsplit("=", 1)[1])})


def test_a_vocabulary_that_is_too_large_is_told_before_tokenizing(config_for: MakeConfig) -> None:
    config = config_for(documents(50))
    with pytest.raises(InputError):
        check(config, **{**GOOD, "model_vocab_size": 300}, say=lambda line: pytest.fail(line))
    assert not cache_root(config.cache_dir).exists()


def test_ids_that_never_occur_do_not_count(config_for: MakeConfig, tmp_path: Path) -> None:
    """T5's tokenizer has 32,100 entries, the papers' models 32,000: the last are in no text."""
    corpus = prepare(config_for(documents(60), tokenizer=str(t5_like(tmp_path / "t5"))))
    config = config_for(documents(60), tokenizer=str(tmp_path / "t5"))
    used = corpus.used_vocab_size
    assert used <= corpus.vocab_size
    check(config, 8, 2, 100, used)
    with pytest.raises(
        InputError, match=rf"\(ids up to {used - 1} occur\) is larger than the model's vocabulary"
    ):
        check(config, 8, 2, 100, used - 1)


def test_shipped_presets_are_data_configurations() -> None:
    folder = Path(__file__).parents[3] / "configs" / "data"
    presets = {path.stem: DataConfig(**yaml.safe_load(path.read_text())) for path in folder.glob("*.yaml")}
    assert {"kjv", "c4", "fineweb", "text", "jsonl", "parquet"} <= presets.keys()
    # The name of GLUE's tasks chooses one.
    assert {name for name, preset in presets.items() if name != preset.name} == {"glue"}
    assert presets["kjv"] == DataConfig()
    papers = presets["c4"]
    assert (papers.tokenizer, papers.mode, papers.dataset) == ("t5-base", "padded", "allenai/c4")
