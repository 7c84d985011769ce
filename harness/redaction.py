"""Keep secrets, by name and by form, and paths of this machine out of files and uploads. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

REDACTED = "<redacted>"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ANYWHERE = _words(
    "password passwd passphrase passcode secret credential apikey privatekey accesskey authkey signingkey "
    "encryptionkey sshkey bearer authorization webhook connectionstring"
)
"""Letters that make a name secret wherever they occur, whatever separates its parts (``api-key``, ``API_KEY``)."""
_AT_END = _words("key keys pass pwd pw pat auth jwt cookie cookies dsn hmac sas")
"""Last parts of a secret name of several parts (``DB_PASS``, ``OPENAI_KEY``)."""
_HARMLESS_BEFORE = {
    "key": _words("comparison public primary foreign cache sort group config partition row"),
    "pass": _words("forward backward first second single one two"),
    "pwd": _words("old"),
}
_COUNTS = _words(
    "max min num n count total per eval train val validation batch new available skipped seen unk bos eos pad "
    "cls sep mask image audio video special vocab added prefix suffix start end"
)
"""Parts before ``token`` that make it a word of a text, or a number of them."""
_COUNTED_AFTER = _words("id ids per count counts index type types embeddings available")

_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NAME = r"[A-Za-z_][\w.-]*"
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|[^\s'\"]+")
_BY_NAME = (
    (re.compile(rf"(?P<name>{_NAME})(?:['\"]?\s*=\s*|['\"]?:\s+|['\"]\s*:\s*)"), _VALUE),
    (re.compile(rf"(?P<name>--{_NAME})\s+(?!-)"), _VALUE),
)
"""(name with what separates it from its value, value): assignments, mappings; flags of a command."""
_BY_PLACE = (
    (re.compile(r"(?P<name>\b(?:Bearer|Authorization:\s*\w+))\s+"), re.compile(r"[\w+/=.~-]{8,}")),
    (re.compile(r"(?P<name>[A-Za-z][\w+.-]*://[^\s/:@'\"]*):"), re.compile(r"[^\s/@'\"]+(?=@)")),
)
"""The same where the value is secret under any name: headers of HTTP; passwords in URLs."""
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
"""Secrets that show by themselves: of Hugging Face, GitHub, GitLab, OpenAI, AWS, Slack, Google, JWT and PEM."""
# An absolute path inside a text: it begins after no letter, so that val/loss, and/or and https://… are none.
_PATH = re.compile(r"(?<![\w./~-])~?(?:/[^\s/'\",;:()\[\]{}<>|=]+)+/?")


def is_secret_name(name: str) -> bool:
    """Return True if a variable, key or flag of this name holds a secret.

    Upper and lower case, ``_``, ``-``, ``.`` and camel case make no difference: AWS_SECRET_ACCESS_KEY, wandb_api_key,
    dbPasswd, HF_TOKENS. Counts and words of texts do not match: eval.tokens, eos_token, TOKENIZERS_PARALLELISM.

    Args:
        name: an environment variable, a configuration key (dotted) or a flag.
    """
    parts = [part.lower() for part in _PART.findall(name)]  # without digits: OPENAI_KEY2
    joined = "".join(parts)
    if any(word in joined for word in _ANYWHERE):
        return True
    if any(_is_secret_token(parts, place) for place in range(len(parts))):
        return True
    if len(parts) < 2 or parts[-1] not in _AT_END:
        return False
    last = parts[-1] if parts[-1] in _HARMLESS_BEFORE else parts[-1].removesuffix("s")
    return parts[-2] not in _HARMLESS_BEFORE.get(last, ())


def secret_in(value: str) -> str | None:
    """Return what in a text is a secret: its name, or a word for its form; None if there is none.

    A reference that the shell resolves later (``HF_TOKEN=$HF_TOKEN``, ``$(cat file)``) is not a secret.
    """
    for name, _, _ in _secrets(value):
        return name
    return "a secret" if _KNOWN_FORMS.search(value) else None


def redact_text(text: str) -> str:
    """Return ``text`` with the values of secrets replaced: assignments, flags, URLs, known forms of tokens."""
    pieces, done = [], 0
    for _, start, end in sorted(_secrets(text), key=lambda secret: secret[1:]):
        if start < done:
            continue
        quote = text[start] if text[start] in "'\"" else ""
        pieces += [text[done:start], quote, REDACTED, quote]
        done = end
    text = "".join([*pieces, text[done:]])
    return _KNOWN_FORMS.sub(REDACTED, text)


def redact_argv(words: Iterable[str]) -> list[str]:
    """Return the words of a command line without secrets; a word ``name=value`` loses its whole value."""
    redacted: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        is_secret = bool(value) and not _is_reference(value) and is_secret_name(name)
        redacted.append(f"{name}{equals}{REDACTED}" if is_secret else redact_text(word))
    return redacted


def redact_secrets(value: Any) -> Any:
    """Return nested dicts and lists without secrets: by the name of a key, and inside of each text.

    Args:
        value: dicts, lists, tuples (returned as lists) and scalars. Numbers and None stay under any name.
    """
    if isinstance(value, dict):
        return {
            redact_text(key) if isinstance(key, str) else key: _redact_below(str(key), inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_secrets(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def _redact_below(name: str, value: Any) -> Any:
    if isinstance(value, str) and value and not _is_reference(value) and is_secret_name(name):
        return REDACTED
    return redact_secrets(value)


def _secrets(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, start, end) of each secret value in a text."""
    for patterns, is_always_secret in ((_BY_PLACE, True), (_BY_NAME, False)):
        for pattern, value_pattern in patterns:
            for match in pattern.finditer(text):
                name = match["name"].lstrip("-")
                value = value_pattern.match(text, match.end())
                if value is None or not (is_always_secret or is_secret_name(name)):
                    continue
                bare = value[0].strip("'\"")
                if bare and not bare.startswith(REDACTED) and not _is_reference(bare):
                    yield name, value.start(), value.end()


def _is_reference(value: str) -> bool:
    return value.strip("'\"").startswith(("$", "`"))


def _is_secret_token(parts: list[str], place: int) -> bool:
    part = parts[place]
    if not part.endswith(("token", "tokens")):
        return False
    before = parts[place - 1] if place else ""
    after = parts[place + 1] if place + 1 < len(parts) else ""
    if before in _COUNTS or after in _COUNTED_AFTER:
        return False
    return len(parts) > 1 or part != "tokens"


def redact_paths(value: Any) -> Any:
    """Return nested dicts and lists without secrets, and with absolute paths in texts cut to their last part."""
    return _cut_paths(redact_secrets(value))


def _cut_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() and "\n" not in value:
        return Path(value).name
    return _PATH.sub(lambda match: Path(match[0]).name, value)
