"""Canaries: sentences with random secrets, inserted into the training documents so that memorization can be measured.

After Carlini et al., "The Secret Sharer" (USENIX Security 2019, arXiv 1802.08232). Names, secrets and places follow
from `CanaryConfig` and the training tokens alone. The tokenizer is trained without the canaries, so that it splits the
digits of an inserted secret like those of any other.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import count, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import CanaryConfig
from harness.data.tokenizer import Encoder
from harness.errors import InputError

Tokens = NDArray[np.int64]
Document = tuple[Tokens, int]
"""Token ids of a training document, and the UTF-8 bytes of its text."""

SENTENCE = " The number of {name} is {secret}."
HELD_OUT = 128
"""Canaries of the same form that are in no document; 127 secrets are the alternatives of each canary."""
DIGITS = 6
LARGEST_SHARE = 0.25
"""Of the training tokens that canaries may add; with more of them, the corpus would be one of canaries."""
_CONSONANTS, _VOWELS, _SYLLABLES = "bdfgklmnprstvz", "aeiou", 4
_WORD_STARTS = ("Ġ", "Ċ", "▁", " ", "\n")
"""First characters of tokens that begin with white space, in byte-level and SentencePiece vocabularies."""


class Canary(NamedTuple):
    """One sentence and how often the training documents hold it (0: held out)."""

    name: str
    secret: str
    copies: int

    @property
    def text(self) -> str:
        """Return the sentence as it is inserted, with the space in front of it."""
        return sentence(self.name, self.secret)


def sentence(name: str, secret: str) -> str:
    """Return a canary's text."""
    return SENTENCE.format(name=name, secret=secret)


def inserted(config: CanaryConfig) -> list[Canary]:
    """Return the canaries of the training documents; canary i has ``copies[i % len(copies)]`` copies."""
    return _all(config)[: config.count]


def held_out(config: CanaryConfig) -> list[Canary]:
    """Return the `HELD_OUT` canaries that are in no document; names and secrets differ from those of `inserted`."""
    return _all(config)[config.count :]


def _all(config: CanaryConfig) -> list[Canary]:
    total = config.count + HELD_OUT
    names = _distinct(total, config.seed, "name", _name)
    secrets = _distinct(total, config.seed, "secret", lambda number: f"{number % 10**DIGITS:0{DIGITS}d}")
    copies = [config.copies[i % len(config.copies)] for i in range(config.count)] + [0] * HELD_OUT
    return [Canary(*parts) for parts in zip(names, secrets, copies)]


def _distinct(total: int, seed: int, purpose: str, spell: Callable[[int], str]) -> list[str]:
    words: dict[str, None] = {}
    numbers = (_number(seed, purpose, index) for index in count())
    while len(words) < total:
        words.setdefault(spell(next(numbers)))
    return list(words)


def _name(number: int) -> str:
    letters = ""
    for _ in range(_SYLLABLES):
        number, consonant = divmod(number, len(_CONSONANTS))
        number, vowel = divmod(number, len(_VOWELS))
        letters += _CONSONANTS[consonant] + _VOWELS[vowel]
    return letters.capitalize()


def _number(seed: int, purpose: str, index: int) -> int:
    """Return 64 random bits that no version of a library changes."""
    digest = hashlib.blake2b(f"optbench-canary|{seed}|{purpose}|{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def insert(
    documents: Iterable[Document], config: CanaryConfig, encoder: Encoder, spool: Path
) -> Iterator[Document]:
    """Yield the training documents with the canaries in them.

    Every copy goes to a token that is drawn uniformly from all training tokens, and from there to the next token that
    begins a word, or to the end of the document.

    Args:
        documents: (token ids that end with eos, bytes of text) each.
        config: with a ``count`` above 0.
        encoder: that made the tokens.
        spool: file for the tokens, as their number must be known first; created and removed.

    Raises:
        InputError: the canaries would be more than a quarter of the training tokens, or the tokenizer does not tell
            them apart.
    """
    sizes, ends = array("q"), array("q")
    with spool.open("w+b") as file:
        for tokens, size in documents:
            file.write(tokens.astype("<u4").tobytes())
            sizes.append(size)
            ends.append((ends[-1] if ends else 0) + len(tokens))
        file.flush()
        canaries = inserted(config)
        texts = [canary.text for canary in canaries]
        encoded = encoder.encode_bare(texts)
        _check_digits(config, encoder)
        total = ends[-1] if ends else 0
        _check_size(config, canaries, [len(ids) for ids in encoded], total)
        placed = _places(canaries, config.seed, total)
        by_document = groupby(
            placed, lambda place: int(np.searchsorted(np.asarray(ends), place[0], side="right"))
        )
        word_starts = _word_starts(encoder)
        due, places = next(by_document, (-1, iter(())))
        file.seek(0)
        start = 0
        for document, (size, stop) in enumerate(zip(sizes, ends)):
            tokens = np.frombuffer(file.read(4 * (stop - start)), dtype="<u4").astype(np.int64)
            if document == due:
                chosen = [(position - start, index) for position, index in places]
                tokens = _with_canaries(tokens, chosen, encoded, word_starts)
                size += sum(len(texts[index].encode()) for _, index in chosen)
                due, places = next(by_document, (-1, iter(())))
            yield tokens, size
            start = stop
    spool.unlink()


def manifest(config: CanaryConfig) -> dict[str, Any]:
    """Return what the manifest of a corpus says about its canaries; JSON."""
    return {
        "sentence": SENTENCE,
        "seed": config.seed,
        "inserted": [canary._asdict() for canary in inserted(config)],
        "held_out": HELD_OUT,
    }


def _check_digits(config: CanaryConfig, encoder: Encoder) -> None:
    """Refuse a tokenizer that has no digits: every secret would be the same unknown token."""
    name = inserted(config)[0].name
    same_name = encoder.encode_bare([sentence(name, canary.secret) for canary in _all(config)])
    if len({tuple(ids.tolist()) for ids in same_name}) < len(same_name):
        raise InputError(
            "data.tokenizer",
            "the tokenizer of this run",
            "has the same tokens for several canaries' secrets",
            allowed="a tokenizer with digits",
            fix="data.tokenizer=bpe",
        )


def _check_size(config: CanaryConfig, canaries: list[Canary], lengths: list[int], available: int) -> None:
    needed = sum(canary.copies * length for canary, length in zip(canaries, lengths))
    if needed > LARGEST_SHARE * available:
        fewer = (
            int(config.count * LARGEST_SHARE * available / needed) // len(config.copies) * len(config.copies)
        )
        reason = f"adds {needed:,} tokens to {available:,} training tokens, more than {LARGEST_SHARE:.0%}"
        fix = f"data.canaries.count={fewer}" if fewer else "smaller data.canaries.copies, or more text"
        raise InputError("data.canaries.count", config.count, reason, fix=fix)


def _places(canaries: list[Canary], seed: int, tokens: int) -> list[tuple[int, int]]:
    """Return (position in the training tokens, canary) of every copy, by position."""
    numbered = ((canary, copy) for canary, (_, _, copies) in enumerate(canaries) for copy in range(copies))
    return sorted((_number(seed, f"place|{canary}", copy) % tokens, canary) for canary, copy in numbered)


def _word_starts(encoder: Encoder) -> NDArray[np.bool_]:
    """Return by token id whether a sentence can be put in front of the token: (vocab_size,)."""
    tokens = (encoder.tokenizer.id_to_token(index) or "" for index in range(encoder.vocab_size))
    return np.array([token.startswith(_WORD_STARTS) for token in tokens])


def _with_canaries(
    tokens: Tokens, places: list[tuple[int, int]], encoded: list[Tokens], word_starts: NDArray[np.bool_]
) -> Tokens:
    # The last token is eos: where no word begins, a sentence ends the document.
    allowed = np.append(np.flatnonzero(word_starts[tokens[:-1]]), len(tokens) - 1)
    parts, done = [], 0
    for position, canary in places:
        at = int(allowed[min(np.searchsorted(allowed, position), len(allowed) - 1)])
        parts += [tokens[done:at], encoded[canary]]
        done = at
    return np.concatenate([*parts, tokens[done:]])
