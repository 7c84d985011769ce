"""Damage done to real run folders: flipped bits, cuts, swapped types, files that are not files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

JUNK = [
    None,
    True,
    -1,
    10**400,
    1e308,
    "x",
    "",
    "\x1b[2J",
    "‮abc",
    "\ud800",
    [],
    [1],
    {},
    {"a": [{}]},
    "NaN",
    2**63,
]
WORDS = [
    "attempts",
    "step",
    "state",
    "reason",
    "steps",
    "job",
    "where",
    "seed",
    "val/loss",
    "train/loss",
    "optimizer",
]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = [b"", b"{", b"[" * 100_000, b"null", b"7", b"[]", b"\x00" * 500, b"\xff\xfe{", BOMB.encode()]
HOSTILE += [b"a: &a {b: *a}", b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"step": ' + b"9" * 5000 + b"}"]
HOSTILE += [b"step,val/loss\n1,=1+1\n", b"\n" * 999]


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file below a run folder (or below a group); returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = rng.choice([f for f in files if "checkpoints" not in f.parts and "wandb" not in f.parts] or files)
    kinds = [flip, flip, cut, splice, swap, swap, swap, replace, special]
    kind = rng.choice(kinds)
    kind(path, rng)
    return f"{kind.__name__} {path.relative_to(folder)}"


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 50])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def splice(path: Path, rng: random.Random) -> None:
    """Move a piece of the file to another place in it."""
    content = path.read_bytes()
    a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    place = rng.randrange(len(content) + 1)
    path.write_bytes(content[:place] + content[a:b] + content[place:])


def swap(path: Path, rng: random.Random) -> None:
    """Replace values of a JSON file or of JSON lines by others of any type; other files get a word replaced."""
    text = path.read_text(errors="replace")
    lines = text.split("\n") if path.suffix == ".jsonl" else [text]
    try:
        values = [json.loads(line) if line.strip() else line for line in lines]
    except ValueError:
        word = rng.choice(text.split() or ["x"])
        path.write_text(text.replace(word, str(rng.choice(JUNK)).encode("utf-8", "replace").decode()))
        return
    share = rng.choice([0.02, 0.2])
    values = [value if isinstance(value, str) else _swapped(value, rng, share) for value in values]
    path.write_text("\n".join(value if value == "" else json.dumps(value) for value in values))


def _swapped(value: object, rng: random.Random, share: float) -> object:
    if rng.random() < share:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        kept = {key: _swapped(inner, rng, share) for key, inner in value.items() if rng.random() > share / 4}
        return kept | ({rng.choice(WORDS): rng.choice(JUNK)} if rng.random() < share else {})
    if isinstance(value, list):
        return [_swapped(inner, rng, share) for inner in value]
    return value


def replace(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice(HOSTILE))


def special(path: Path, rng: random.Random) -> None:
    path.unlink()
    kind = rng.choice(["fifo", "folder", "device", "dangling", "gone"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
