"""Encoded examples against the calls of `transformers`; what is left out is counted; bad input is one clear error."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from harness.config import compose
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.tasks import example_facts
from harness.tasks.example_store import EncodedSplit
from harness.tasks.examples import Examples, prepare_examples

from .bible import pair_rows, question_rows, similarity_rows

Rows = Sequence[dict[str, Any]]
MakeConfig = Callable[..., RunConfig]
PAIRS = ("task=classify", "task.text=[sentence1,sentence2]", "task.label=label")
QUESTIONS = ("task=answer", 'task.prompt="{question}\\n"', 'task.answer="{answer}"', "task.max_new_tokens=8")


@pytest.fixture
def config_for(tmp_path: Path) -> MakeConfig:
    """config_for(train, validation, *overrides): JSON lines of these rows, with a cache of their own."""

    def make(train: Rows, validation: Rows, *overrides: str) -> RunConfig:
        for name, rows in (("train", train), ("dev", validation)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        words = {
            "data.vocab_size": "400",
            "seq_len": "256",
            "data.cache_dir": str(tmp_path / "cache"),
            "data.files": f"[{tmp_path / 'train.jsonl'}]",
            "data.validation_files": f"[{tmp_path / 'dev.jsonl'}]",
        }
        # The last value of a key counts.
        words |= {key: value for key, _, value in (word.partition("=") for word in overrides)}
        return compose.load(["data=jsonl", *(f"{key}={value}" for key, value in words.items())])

    return make


def prepared(config: RunConfig) -> Examples:
    return prepare_examples(config, lambda line: None)


def error_of(config: RunConfig) -> str:
    with pytest.raises(InputError) as caught:
        prepared(config)
    return str(caught.value)


def bert_like(folder: Path, pad: bool = True, ends: str | None = "[SEP]") -> Path:
    """Write a word-level tokenizer with BERT's template for texts and pairs, and a beginning-of-text token."""
    words = {
        word
        for row in pair_rows(60)
        for text in (row["sentence1"], row["sentence2"])
        for word in text.split()
    }
    special = ["[UNK]", "[CLS]", *([ends] if ends else ["[X]"]), *(["[PAD]"] if pad else [])]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    end = special[2]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {end}",
        pair=f"[CLS] $A {end} $B:1 {end}:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), (end, vocabulary[end])],
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    settings |= {"sep_token": ends} if ends else {}
    settings |= {"pad_token": "[PAD]"} if pad else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_pairs_are_what_the_tokenizer_s_own_call_makes_of_them(
    config_for: MakeConfig, tmp_path: Path
) -> None:
    rows = pair_rows(60)
    folder = bert_like(tmp_path / "tokenizer")
    config = config_for(rows[:40], rows[40:], *PAIRS, f"data.tokenizer={folder}", "seq_len=40")
    examples = prepared(config)
    call = AutoTokenizer.from_pretrained(folder)
    lengths = []
    for split, part in ((examples.train, rows[:40]), (examples.validation, rows[40:])):
        assert len(split) == len(part)
        for index, row in enumerate(part):
            texts = row["sentence1"], row["sentence2"]
            expected = call(*texts, truncation="longest_first", max_length=40, return_token_type_ids=True)
            assert split.ids(index).tolist() == expected["input_ids"]
            assert split.type_ids(index).tolist() == expected["token_type_ids"]
            assert (split.label(index), split.reference(index)) == (row["label"], str(row["label"]))
            lengths.append(len(call(*texts)["input_ids"]))
    long = sum(length > 40 for length in lengths[:40])
    assert 0 < long < 40  # else nothing of the above concerns truncation
    assert examples.facts["train"]["truncated"] == long
    assert examples.facts["train"]["longest"] == max(lengths[:40])
    assert f"{long} of 40 train examples are longer than seq_len=40 and truncated" in "\n".join(
        examples.warnings
    )
    assert examples.labels == ("0", "1")
    assert (examples.pad_id, examples.eos_id) == (3, 2)
    assert examples.used_vocab_size <= examples.vocab_size


def test_a_trained_tokenizer_separates_pairs_and_its_folder_encodes_the_same(config_for: MakeConfig) -> None:
    rows = [
        {"sentence1": "a b", "sentence2": "c", "label": "same"},
        {"sentence1": "a", "sentence2": " bc", "label": "other"},
        *({**row, "label": "other"} for row in pair_rows(30)),
    ]
    examples = prepared(config_for(rows, rows[:4], *PAIRS))
    first, second = examples.train.ids(0).tolist(), examples.train.ids(1).tolist()
    assert first.count(examples.eos_id) == second.count(examples.eos_id) == 1
    # Without the separator the two would be one text.
    assert [i for i in first if i != examples.eos_id] == [i for i in second if i != examples.eos_id]
    assert first != second
    call = AutoTokenizer.from_pretrained(examples.tokenizer_folder)
    for index, row in enumerate(rows[:10]):
        assert call(row["sentence1"], row["sentence2"])["input_ids"] == examples.train.ids(index).tolist()
    assert call("a b")["input_ids"] == first[: first.index(examples.eos_id)]
    assert examples.facts["pairs_joined_by_eos"]


def test_answers_are_prompt_answer_and_eos_with_rows_of_the_source(config_for: MakeConfig) -> None:
    rows = question_rows(40)
    rows[3]["answer"] = None
    rows[5]["question"] = " \n "
    examples = prepared(config_for(rows, rows[20:], *QUESTIONS, 'task.prompt="{question}"'))
    call = AutoTokenizer.from_pretrained(examples.tokenizer_folder)
    kept = [index for index in range(40) if index not in (3, 5)]
    assert examples.train.rows.tolist() == kept
    for index in (0, 4, 30):
        row = rows[examples.train.row(index)]
        prompt = call(row["question"])["input_ids"]
        answer = call(row["answer"])["input_ids"]
        assert examples.train.ids(index).tolist() == [*prompt, *answer, examples.eos_id]
        assert examples.train.prompt_length(index) == len(prompt)
        assert examples.train.reference(index) == row["answer"]
    counts = examples.facts["train"]
    assert (counts["read"], counts["kept"], counts["null"], counts["blank"]) == (40, 38, 1, 1)
    assert any("2 of 40 train rows are left out: 1 with null, 1 blank" in line for line in examples.warnings)
    assert counts["tokens"] == sum(examples.train.lengths)


def test_examples_are_built_once_and_identified_by_their_contents(
    config_for: MakeConfig, tmp_path: Path
) -> None:
    rows = pair_rows(40)
    config = config_for(rows[:30], rows[30:], *PAIRS)
    said: list[str] = []
    first = prepare_examples(config, said.append)
    assert said[-1].startswith("30 training examples of ")
    second = prepare_examples(config, lambda line: pytest.fail(line))
    assert (second.sha256, second.facts, second.warnings) == (first.sha256, first.facts, first.warnings)
    # The order of the classes is part of what is learned; seed and metric are not.
    turned = prepared(config_for(rows[:30], rows[30:], *PAIRS, "task.labels=[1,0]"))
    assert turned.sha256 != first.sha256
    assert turned.train.label(0) == 1 - first.train.label(0)
    assert (
        prepared(config_for(rows[:30], rows[30:], *PAIRS, "seed=3", "task.metric=f1")).folder == first.folder
    )
    # A damaged file is not read but built again.
    path = first.folder / "train.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said.clear()
    again = prepare_examples(config, said.append)
    assert "is damaged (train.arrow has another checksum)" in said[0]
    assert again.sha256 == first.sha256
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(OSError, match=r"train\.arrow had \d+ bytes when the run began and has 100 now"):
        again.train.ids(0)


@pytest.mark.parametrize(
    ("values", "words", "classes"),
    [
        ([10, 9, 9], (), ("9", "10")),
        (["b", " a ", "a"], (), ("a", "b")),
        ([True, False, True], (), ("false", "true")),
        ([1.0, 0.0, 1], (), ("0", "1")),
        (["1.5", "2", "3"], (), None),
        (["1.5", "2", "x"], (), ("1.5", "2", "x")),
        ([1, 2, 3], ("task.target=number",), None),
        ([0.5, 0.5, 1.0], ("task.target=class",), ("0.5", "1")),
        (["b", "a", "a"], ("task.labels=[b,a]",), ("b", "a")),
    ],
)
def test_labels_are_classes_or_numbers(
    values: list[Any], words: tuple[str, ...], classes: tuple[str, ...] | None, config_for: MakeConfig
) -> None:
    rows = [{"text": f"text {index}", "label": value} for index, value in enumerate(values)]
    examples = prepared(
        config_for(rows, rows, "task=classify", "task.text=[text]", "task.label=label", *words)
    )
    assert examples.labels == classes
    references = [examples.train.reference(index) for index in range(3)]
    if classes is None:
        assert references == [repr(float(value)) for value in values]
        assert examples.train.labels.dtype == np.float64
    else:
        assert references == [classes[examples.train.label(index)] for index in range(3)]  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert examples.train.labels.dtype == np.int64


def test_classes_have_the_order_that_a_data_set_declares(tmp_path: Path) -> None:
    """MRPC's: F1 is that of the second class, and sorted names would make it that of the first."""
    import datasets

    names = ["not_equivalent", "equivalent", "unused"]
    features = datasets.Features(
        {"sentence1": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        rows = {"sentence1": [row["sentence1"] for row in PAIR], "label": [int(row["label"]) for row in PAIR]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    words = ["task=classify", "task.text=[sentence1]", "task.label=label", "data.source=datasets"]
    words += [f"data.dataset={tmp_path / 'set'}", "data.validation_split=validation", "data.vocab_size=400"]
    config = compose.load([*words, f"data.cache_dir={tmp_path / 'cache'}", "seq_len=256"])
    examples = prepared(config)
    assert examples.labels == ("not_equivalent", "equivalent")
    assert examples.train.reference(0) == names[int(PAIR[0]["label"])]
    sorted_on_wish = compose.load(
        [
            *words,
            f"data.cache_dir={tmp_path / 'cache'}",
            "seq_len=256",
            "task.labels=[equivalent,not_equivalent]",
        ]
    )
    assert prepared(sorted_on_wish).labels == ("equivalent", "not_equivalent")


def test_training_texts_that_are_also_in_validation_are_counted(config_for: MakeConfig) -> None:
    rows = similarity_rows(50)
    words = ("task=classify", "task.text=[sentence1,sentence2]", "task.label=score")
    examples = prepared(config_for(rows[:40], [*rows[37:50], rows[39]], *words))
    assert examples.facts["train"]["in_validation"] == 3
    assert "3 of 40 training examples have the text of a validation example" in examples.warnings[0]
    assert prepared(config_for(rows[:40], rows[40:], *words)).warnings == ()


def test_worked_examples_depend_on_the_data_alone_and_give_no_answer_away(config_for: MakeConfig) -> None:
    rows = question_rows(60)
    words = (*QUESTIONS, "task.shots=3", "seq_len=1024")
    examples = prepared(config_for(rows[:40], rows[38:], *words))
    shots = [rows[row] for row in examples.facts["shots"]]
    assert len(shots) == 3
    assert not set(examples.facts["shots"]) & {38, 39}
    call = AutoTokenizer.from_pretrained(examples.tokenizer_folder)
    worked = "".join(f"{row['question']}\n{row['answer']}\n\n" for row in shots)
    prompt = examples.validation.ids(0)[: examples.validation.prompt_length(0)]
    assert call.decode(prompt) == f"{worked}{rows[38]['question']}\n"
    # Training prompts have none, and the order of the rows and the seed change nothing.
    assert call.decode(examples.train.ids(0)[: examples.train.prompt_length(0)]) == f"{rows[0]['question']}\n"
    shuffled = random.Random(0).sample(rows[:40], 40)
    other = prepared(config_for(shuffled, rows[38:], *words, "seed=5"))
    assert [shuffled[row] for row in other.facts["shots"]] == shots
    message = error_of(config_for(rows[:5], rows[3:9], *QUESTIONS, "task.shots=4"))
    assert "task.shots: 4 is more than the training data have (3 prompts" in message


def test_a_prompt_longer_than_the_context_is_an_error_or_loses_its_start(config_for: MakeConfig) -> None:
    rows = question_rows(20)
    rows[4]["question"] = " ".join(str(7919 * n) for n in range(100)) + " the end"
    words = (*QUESTIONS, "model.config.max_position_embeddings=256")
    message = error_of(config_for(rows, rows[:2], *words))
    assert message.startswith("seq_len: 256 leaves ")
    assert "train.jsonl, line 5 has " in message
    assert "1 of 20 train examples are too long" in message
    enough = message.partition("fix: seq_len=")[2].split()[0]
    assert prepared(config_for(rows, rows[:2], *words, f"seq_len={enough}")).facts["train"]["truncated"] == 0
    examples = prepared(config_for(rows, rows[3:6], *words, "task.truncate=left"))
    call = AutoTokenizer.from_pretrained(examples.tokenizer_folder)
    length = examples.train.prompt_length(4)
    assert len(examples.train.ids(4)) == 256
    assert call.decode(examples.train.ids(4)[:length]).endswith("the end\n")
    assert call.decode(examples.train.ids(4)[length:-1]) == rows[4]["answer"]
    assert examples.facts["train"]["truncated"] == examples.facts["validation"]["truncated"] == 1
    # Validation leaves room for the longest answer that may be generated.
    assert examples.validation.prompt_length(1) <= 256 - 8


def test_prompts_begin_as_the_tokenizer_begins_a_text(config_for: MakeConfig, tmp_path: Path) -> None:
    rows = question_rows(10)
    rows[1]["question"] = "word " * 400
    folder = bert_like(tmp_path / "tokenizer")
    words = (*QUESTIONS, f"data.tokenizer={folder}", "task.truncate=left", "seq_len=64")
    examples = prepared(config_for(rows, rows[:1], *words))
    starts = {examples.train.ids(index)[0].item() for index in range(10)}
    assert starts == {1}  # [CLS], also where the start of the prompt was cut off
    assert {examples.train.ids(index)[-1].item() for index in range(10)} == {examples.eos_id} == {2}


CHAT = ("<|begin|>", "<|user|>", "<|assistant|>", "<|end|>")
DIALOGUE = (
    "task=answer",
    r'task.prompt="<|begin|><|user|>\n{question}<|end|>\n<|assistant|>\n"',
    'task.answer="{answer}<|end|>"',
    "task.max_new_tokens=8",
)


def chat_like(folder: Path, pieces: str) -> Path:
    """Write a BPE tokenizer with tokens of a dialogue, which begins a text with one of them."""
    is_llama_like = pieces == "metaspace"
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        if is_llama_like
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    alphabet = [] if is_llama_like else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(CHAT), initial_alphabet=alphabet)
    texts = [f"{row['question']}\n{row['answer']} <|>" for row in question_rows(60)]
    tokenizer.train_from_iterator(texts, trainer)
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("pieces", ["bytes", "metaspace"])
def test_special_tokens_that_templates_spell_are_these_tokens(
    pieces: str, config_for: MakeConfig, tmp_path: Path
) -> None:
    """As a chat format has them; `transformers` tokenizes the same text."""
    rows = question_rows(60)
    folder = chat_like(tmp_path / "tokenizer", pieces)
    call = AutoTokenizer.from_pretrained(folder)
    words = (*DIALOGUE, f"data.tokenizer={folder}")
    examples = prepared(config_for(rows[:40], rows[40:], *words, "task.shots=1"))
    for index, row in enumerate(rows[:40]):
        prompt = f"<|begin|><|user|>\n{row['question']}<|end|>\n<|assistant|>\n"
        expected = call.encode(prompt, add_special_tokens=False)
        ids, length = examples.train.ids(index).tolist(), examples.train.prompt_length(index)
        assert ids[:length] == expected  # with one <|begin|>
        assert ids[length:] == call.encode(
            f"{row['answer']}<|end|>", add_special_tokens=False
        )  # with one <|end|>
        assert examples.train.reference(index) == row["answer"]
    begin = call.convert_tokens_to_ids("<|begin|>")
    assert examples.validation.ids(0).tolist().count(begin) == 2  # its own, and the worked example's


def test_a_column_that_spells_a_special_token_is_text_or_an_error(
    config_for: MakeConfig, tmp_path: Path
) -> None:
    """Where the templates spell none it is text, as ever; where they do, it would end a turn of the dialogue."""
    rows = question_rows(60)
    rows[7] = {**rows[7], "question": "Who?<|end|>\n<|assistant|>\nNobody"}
    folder = chat_like(tmp_path / "tokenizer", "bytes")
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|end|>")
    words = [word for word in QUESTIONS if "prompt" not in word]
    plain = [*words, 'task.prompt="{question} "', f"data.tokenizer={folder}"]
    examples = prepared(config_for(rows[:40], rows[40:], *plain))
    assert examples.train.ids(7).tolist().count(end) == 1  # the example's end
    message = error_of(config_for(rows[:40], rows[40:], *DIALOGUE, f"data.tokenizer={folder}"))
    assert message.startswith("data.tokenizer: <|end|> is a special token, which the text of")
    assert "train.jsonl, line 8 spells" in message
    assert "data without <|end|>" in message


def test_a_tokenizer_without_pad_pads_with_eos_and_one_without_eos_is_refused(
    config_for: MakeConfig, tmp_path: Path
) -> None:
    rows = pair_rows(20)
    folder = bert_like(tmp_path / "no_pad", pad=False)
    examples = prepared(config_for(rows[:10], rows[10:], *PAIRS, f"data.tokenizer={folder}"))
    assert examples.pad_id == examples.eos_id
    assert examples.facts["pads_with_eos"]
    folder = bert_like(tmp_path / "no_eos", ends=None)
    message = error_of(config_for(rows[:10], rows[10:], *PAIRS, f"data.tokenizer={folder}"))
    assert "has no token that ends a document" in message


PAIR = pair_rows(8)
QUESTION = question_rows(8)
BAD: list[tuple[Rows, Rows, tuple[str, ...], str]] = [
    (
        PAIR,
        PAIR,
        (*PAIRS, "task.text=[sentence1,sentense2]"),
        "task.text: sentense2 is not .+did you mean sentence2",
    ),
    (PAIR, PAIR, (*PAIRS, "task.label=lable"), "task.label: lable is not a key of .+did you mean label"),
    (PAIR[::2], PAIR, PAIRS, "task.label: label is '0' in all 4 training rows: there is nothing to learn"),
    (
        PAIR,
        [{**PAIR[0], "label": "2"}],
        PAIRS,
        r"label is '2' in .+dev\.jsonl, line 1, a class that no training",
    ),
    (
        PAIR,
        PAIR,
        (*PAIRS, "task.labels=[0,2]"),
        r"label is '1' in .+train\.jsonl, line 2, which",
    ),
    (PAIR, PAIR, (*PAIRS, "task.labels=[0,1,2]"), r"task\.labels: 2 is a class that no training row has"),
    (
        PAIR,
        [{**PAIR[0], "label": "x"}],
        (*PAIRS, "task.target=number"),
        r"'x' in .+dev\.jsonl, line 1, not a finite",
    ),
    (
        [{**row, "label": f"id{index}"} for index, row in enumerate(pair_rows(30))],
        PAIR,
        PAIRS,
        "label has 30 different values in 30 rows, which are no classes",
    ),
    (
        [{**row, "label": None} for row in PAIR],
        PAIR,
        PAIRS,
        r"data\.files: .+ holds no example: of 8 rows 8 are null",
    ),
    (QUESTION, QUESTION, (*QUESTIONS, 'task.prompt="{q}"'), "task.prompt: q is not a key of"),
    (QUESTION, QUESTION, (*QUESTIONS, 'task.prompt="Say:"'), "task.prompt: Say: names no column"),
    (
        QUESTION,
        [{**QUESTION[0], "answer": ""}],
        QUESTIONS,
        r"task\.answer: .+ is empty in .+dev\.jsonl, line 1",
    ),
    (
        QUESTION,
        [{**QUESTION[0], "answer": "It is 7."}],
        QUESTIONS,
        r"hashes finds no number after #### in the answer of .+line 1: 'It is 7\.'; fix: task",
    ),
    (
        [{**row, "answer": "seven"} for row in QUESTION],
        QUESTION,
        QUESTIONS,
        r"train\.jsonl, line 1: 'seven'; fix",
    ),
    (
        QUESTION,
        QUESTION,
        (*QUESTIONS, "model.config.vocab_size=300"),
        r"data\.vocab_size: 400 is larger than",
    ),
    (PAIR, PAIR, (*PAIRS, "data.source=package"), "data.source: package holds text, not examples"),
]


@pytest.mark.parametrize(("train", "validation", "words", "message"), BAD)
def test_bad_input_is_one_clear_error(
    train: Rows, validation: Rows, words: tuple[str, ...], message: str, config_for: MakeConfig
) -> None:
    with pytest.raises(InputError, match=message):
        prepared(config_for(train, validation, *words))


def test_attention_is_counted_over_the_example_that_a_token_is_in(config_for: MakeConfig) -> None:
    examples = prepared(config_for(PAIR, PAIR, *PAIRS))
    of_tokens = [len(examples.train.ids(index)) for index in range(8) for _ in examples.train.ids(index)]
    assert example_facts.context_length(examples) == pytest.approx(np.mean(of_tokens))
    assert len(set(of_tokens)) > 1


def test_missing_numbers_are_null_and_no_class(config_for: MakeConfig) -> None:
    """Tables of numbers spell a missing value as NaN, and 1.0 is the class 1."""
    rows = [{**row, "label": float(row["label"])} for row in PAIR]
    examples = prepared(
        config_for([*rows, {**rows[0], "label": math.nan}], rows, *PAIRS, "task.labels=[1.0,0.0]")
    )
    assert examples.labels == ("1", "0")
    assert (examples.facts["train"]["null"], len(examples.train)) == (1, len(rows))


def test_a_file_of_both_splits_is_refused(config_for: MakeConfig, tmp_path: Path) -> None:
    config = config_for(PAIR, PAIR, *PAIRS, f"data.validation_files=[{tmp_path}/./tr*.jsonl]")
    assert "train.jsonl is one of data.files, too; allowed: files that are not trained on" in error_of(config)


def test_training_answers_without_a_number_are_counted(config_for: MakeConfig) -> None:
    rows = [*question_rows(9), {"question": "Which?", "answer": "none"}]
    examples = prepared(config_for(rows, rows[:5], *QUESTIONS))
    assert any(
        "1 of 10 training answers hold nothing that task.extract=hashes finds" in w for w in examples.warnings
    )


def test_the_hash_covers_each_part_of_an_example() -> None:
    """A control of `EncodedSplit.sha256`: any change of any part, boundaries included, is another hash."""

    def hash_of(**changes: Any) -> str:
        parts: dict[str, Any] = {
            "ids": [[1, 2], [3]],
            "type_ids": [[0, 1], [0]],
            "prompt_lengths": [1, 1],
            "labels": [0, 1],
            "references": ["ab", "c"],
            "rows": [0, 2],
            **changes,
        }
        return EncodedSplit(
            [np.array(ids, dtype=np.int32) for ids in parts["ids"]],
            parts["type_ids"] and [np.array(types, dtype=np.int8) for types in parts["type_ids"]],
            parts["prompt_lengths"],
            np.array(parts["labels"]),
            parts["references"],
            parts["rows"],
        ).sha256()

    others = [
        hash_of(ids=[[1], [2, 3]], type_ids=None),
        hash_of(ids=[[1, 2], [4]]),
        hash_of(type_ids=[[0, 0], [0]]),
        hash_of(prompt_lengths=[1, 0]),
        hash_of(labels=[1, 0]),
        hash_of(labels=[0.0, 1.0]),
        hash_of(references=["a", "bc"]),
        hash_of(rows=[0, 1]),
    ]
    assert hash_of() == hash_of()
    assert len({hash_of(), *others}) == 1 + len(others)
    assert hash_of(type_ids=None) == hash_of(type_ids=[[0, 0], [0]])
