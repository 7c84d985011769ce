"""Tokenizers: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.

Both end in an `Encoder`, which knows what the tokenizer puts around a document, and both are saved as a
folder that `transformers.AutoTokenizer.from_pretrained` loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from harness.data.hub import quiet
from harness.errors import InputError
from harness.files import atomic, paths
from harness.files.atomic import sync_folder
from harness.files.cache import file_sha256

EOS, PAD = "<eos>", "<pad>"
# Enters the keys of caches: raise it when the same text and vocabulary size would give another tokenizer.
BPE_VERSION = "byte-level-bpe-1"
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
# Files that a tokenizer may be made of (its folder may hold a model as well).
_SUFFIXES = (".json", ".txt", ".model", ".vocab", ".py")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


class EncodedInput(NamedTuple):
    """Token ids of a text or a pair.

    Attributes:
        ids: (tokens,) int64, special tokens included, cut to the limit.
        type_ids: (tokens,) int64: 1 for the second text of a pair, in tokenizers that tell the two apart.
        length: tokens before the cut.
    """

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    length: int


class Encoder:
    """A tokenizer and what it puts around a document.

    Args:
        tokenizer: from `train_bpe` or `load`.
        eos: text of the token that ends a document.
        pad: text of the token that fills a row; None: the eos token (pads carry no loss either way).

    Attributes:
        eos_id, pad_id: token ids.
        vocab_size: largest id of the vocabulary + 1.
        prefix_length: tokens that the tokenizer puts before a text (LLaMA: one).
        appends_eos: the tokenizer itself ends a text with eos (T5 does, also after truncation).
    """

    def __init__(self, tokenizer: Tokenizer, eos: str, pad: str | None) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A document that happens to contain "<eos>" is text, not a document's end.
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.eos, self.pad = eos, pad
        self.eos_id = vocabulary[eos]
        self.pad_id = vocabulary[pad] if pad else self.eos_id
        self.vocab_size = max(vocabulary.values()) + 1
        self._prefix, self._suffix = self._surroundings()
        self.appends_eos = self._suffix[-1:] == [self.eos_id]
        if not self.appends_eos:
            self._suffix.append(self.eos_id)
        self.prefix_length = len(self._prefix)
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        alternatives = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
        self._spelled = re.compile(alternatives) if alternatives else None

    def encode(self, documents: list[list[str]]) -> list[NDArray[np.int64]]:
        """Return the token ids of documents, each given in pieces, with the tokenizer's special tokens and
        eos. The result is a list of 1-D int64 arrays; a document of which the tokenizer leaves nothing is an
        empty array."""
        pieces = [piece for document in documents for piece in document]
        # "fast" leaves out character offsets, which nobody here reads.
        encodings = iter(self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        result = []
        for document in documents:
            ids = list(chain.from_iterable(next(encodings).ids for _ in document))
            result.append(np.array([*self._prefix, *ids, *self._suffix] if ids else [], dtype=np.int64))
        return result

    @property
    def prefix(self) -> NDArray[np.int64]:
        """Return the ids that the tokenizer puts before a text: 1-D int64."""
        return np.array(self._prefix, dtype=np.int64)

    def encode_bare(self, texts: list[str], *, spelled: bool = False) -> list[NDArray[np.int64]]:
        """Return the token ids of texts with nothing put around them: 1-D int64 arrays.

        Args:
            spelled: a special token that a text spells is that token; otherwise it is text.
        """
        self.tokenizer.encode_special_tokens = not spelled
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            self.tokenizer.encode_special_tokens = True
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def spelled_tokens(self, text: str) -> list[str]:
        """Return the special tokens that a text spells, in its order; of two at one place the longer."""
        return self._spelled.findall(text) if self._spelled is not None else []

    def without_special_tokens(self, text: str) -> str:
        """Return a text without the special tokens that it spells."""
        return self._spelled.sub("", text) if self._spelled is not None else text

    def encode_inputs(self, inputs: list[tuple[str, ...]], limit: int) -> list[EncodedInput]:
        """Encode texts and pairs of texts as the tokenizer's own template has them.

        Args:
            inputs: (text,) or (first, second) each.
            limit: tokens that are kept at most, special ones included; of a pair the longer text is cut first.

        Raises:
            ValueError: ``limit`` leaves no token of the text.
        """
        texts: Any = [texts[0] if len(texts) == 1 else texts for texts in inputs]
        encodings = self.tokenizer.encode_batch_fast(texts)
        lengths = [len(encoding.ids) for encoding in encodings]
        long = [index for index, length in enumerate(lengths) if length > limit]
        if long:
            pairs = len(inputs[0]) == 2
            if limit <= self.tokenizer.num_special_tokens_to_add(pairs) + pairs:
                raise ValueError(f"{limit} tokens leave no room for text")
            self.tokenizer.enable_truncation(limit, strategy="longest_first")
            try:
                for index, encoding in zip(long, self.tokenizer.encode_batch_fast([texts[i] for i in long])):
                    encodings[index] = encoding
            finally:
                self.tokenizer.no_truncation()
        return [
            EncodedInput(
                np.array(encoding.ids, dtype=np.int64), np.array(encoding.type_ids, dtype=np.int64), length
            )
            for encoding, length in zip(encodings, lengths)
        ]

    def separate_pairs(self) -> bool:
        """Put eos between the texts of a pair if the tokenizer puts nothing there; return True if it does now.

        Without a separator, as GPT-2's and the trained tokenizers are, "a b" and "c" would read as "a" and "b c".
        """
        around = self.tokenizer.encode("a", "a").sequence_ids
        second = around.index(1)
        if around[second - 1] is None:
            return False
        tokens = self.tokenizer.get_vocab(with_added_tokens=True)
        names = {index: token for token, index in tokens.items()}
        before = [names[index] for index in self._prefix]
        after = [names[index] for index in self._suffix[: -1 if not self.appends_eos else None]]
        special = sorted({self.eos, *before, *after})
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", self.eos, "$B", *after],
            special_tokens=[(token, tokens[token]) for token in special],
        )
        return True

    def _surroundings(self) -> tuple[list[int], list[int]]:
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        full = self.tokenizer.encode("a", add_special_tokens=True).ids
        if not bare:
            return [], []
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:start], full[start + len(bare) :]

    def save(self, folder: Path) -> str:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; returns the SHA-256 of the first."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        }
        if self.pad:
            settings["pad_token"] = self.pad
        atomic.write_text(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        atomic.write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, sort_keys=True))
        sync_folder(folder)
        return file_sha256(folder / "tokenizer.json")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Encoder:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes and splitting as in GPT-2), lossless on any text.

    The same texts in the same order give the same bytes. Ids 0 and 1 are ``<eos>`` and ``<pad>``. A small
    corpus may give fewer than ``vocab_size`` entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return Encoder(tokenizer, EOS, PAD)


def cached_bpe(texts: Iterator[str], again: Iterator[str], vocab_size: int, cache: Path) -> Encoder:
    """Run `train_bpe` once per (text, vocabulary size, algorithm), kept in ``cache`` under the hash of the
    three.

    ``texts`` and ``again`` yield the same texts: the first is hashed, the second trained on if it must be.
    """
    digest = hashlib.sha256(f"{BPE_VERSION}|{vocab_size}|".encode())
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text.encode("utf-8"))
    path = cache / f"{digest.hexdigest()}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if hashlib.sha256(content["tokenizer"].encode()).hexdigest() == content["sha256"]:
            return Encoder(Tokenizer.from_str(content["tokenizer"]), EOS, PAD)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    encoder = train_bpe(again, vocab_size)
    text = encoder.tokenizer.to_str()
    cache.mkdir(parents=True, exist_ok=True)
    atomic.write_text(
        path, json.dumps({"tokenizer": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    )
    return encoder


def identity(config_tokenizer: str, vocab_size: int) -> dict[str, Any]:
    """Return what determines the tokenizer, for a cache key, without network.

    A local tokenizer counts by content.

    Raises:
        InputError: a path that does not exist.
    """
    if config_tokenizer == "bpe":
        return {"algorithm": BPE_VERSION, "vocab_size": vocab_size}
    path = _local(config_tokenizer)
    if path is None:
        return {"name": config_tokenizer}
    try:
        parts = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES) if path.is_dir() else [path]
        return {"files": [(part.name, file_sha256(_regular(part))) for part in parts]}
    except OSError as error:
        raise InputError(
            "data.tokenizer", error.filename, f"cannot be read ({error.strerror or error})"
        ) from error


def load(name: str, trust_remote_code: bool = False) -> Encoder:
    """Load a Hugging Face tokenizer: a ``tokenizer.json``, a folder, or a name on the hub.

    `tokenizers` reads it; `transformers.AutoTokenizer` converts one that has no ``tokenizer.json``.

    Args:
        name: file, folder, or name on the hub.
        trust_remote_code: run the Python code that the tokenizer brings along (``auto_map``), where it has no
            ``tokenizer.json``.

    Raises:
        InputError: not found, not reachable, needs code that is not trusted, or has no token that ends a document.
    """
    path = _local(name)
    if path is not None:
        identity(name, 0)  # refuses what is not a file
    try:
        if path is not None and path.is_file():
            return _encoder(Tokenizer.from_file(str(path)), _settings(path.parent), name)
        with quiet():
            folder = path if path is not None else _download(name)
        if folder is not None and (folder / "tokenizer.json").is_file():
            return _encoder(Tokenizer.from_file(str(folder / "tokenizer.json")), _settings(folder), name)
        return _converted(name if path is None else str(path), trust_remote_code)
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    # `tokenizers` raises bare Exception, and for some damaged files a PanicException that is none; the hub and
    # `transformers` a dozen classes of their own.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                "data.tokenizer",
                name,
                "contains its own Python code (auto_map), which is not executed unless you trust it",
                allowed="a tokenizer with a tokenizer.json, which needs no code",
                fix="trust_remote_code=true if you have read that code",
            ) from error
        lines = str(error).splitlines()
        raise InputError(
            "data.tokenizer",
            name,
            f"could not be loaded ({type(error).__name__}: {lines[0][:200] if lines else ''})",
            allowed="bpe, a folder, a tokenizer.json, a name on the hub",
            fix="without a network copy the tokenizer's folder here, data.tokenizer=FOLDER",
        ) from error


def _local(name: str) -> Path | None:
    path = os.path.expanduser(name)
    if not name.strip():
        raise InputError(
            "data.tokenizer", "''", "is empty", allowed="bpe, a folder, a tokenizer.json, a name"
        )
    if os.path.lexists(path):
        return _regular(Path(path), folder=True)
    if name.startswith(("/", ".", "~")) or name.endswith(".json"):
        raise InputError(
            "data.tokenizer", name, "does not exist", allowed="bpe, a folder, a tokenizer.json, a name"
        )
    return None


def _regular(path: Path, folder: bool = False) -> Path:
    kind = paths.kind(path)
    if kind is None or (folder and kind == "is a folder"):
        return path
    raise InputError("data.tokenizer", path, kind, allowed="bpe, a folder, a tokenizer.json, a name")


def _download(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
        for extra in ("tokenizer_config.json", "special_tokens_map.json"):
            try:
                hf_hub_download(name, extra)
            except EntryNotFoundError:
                continue
    except LocalEntryNotFoundError:
        # The hub did not answer. Converting would only wait for it again, unless the user works offline
        # (HF_HUB_OFFLINE); then the files of a tokenizer in its older form may still be available.
        if HF_HUB_OFFLINE:
            return None
        raise
    except EntryNotFoundError:
        return None
    return path.parent


def _settings(folder: Path) -> dict[str, Any]:
    """Return the names of the special tokens in the files next to a ``tokenizer.json``."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            found.update(json.loads(path.read_text(encoding="utf-8")))
    return {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}


def _encoder(tokenizer: Tokenizer, settings: dict[str, Any], name: str) -> Encoder:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)

    def pick(key: str, usual: tuple[str, ...]) -> str | None:
        return next((token for token in (settings.get(key), *usual) if token in vocabulary), None)

    eos = pick("eos_token", _EOS_NAMES)
    if eos is None:
        raise InputError(
            "data.tokenizer",
            name,
            "has no token that ends a document",
            allowed=f"eos_token in tokenizer_config.json, or one of {', '.join(_EOS_NAMES)}",
        )
    return Encoder(tokenizer, eos, pick("pad_token", _PAD_NAMES))


def _converted(name: str, trust_remote_code: bool) -> Encoder:
    from transformers import AutoTokenizer

    # Said in both cases: left open, `transformers` asks at the terminal.
    slow = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            "data.tokenizer", name, "has no fast form (tokenizer.json)", allowed="a fast tokenizer"
        )
    settings = {"eos_token": slow.eos_token, "pad_token": slow.pad_token}
    return _encoder(Tokenizer.from_str(backend.to_str()), settings, name)
