"""`optbench COMMAND …`: a lazy table, command → "module:function".

Nothing but the standard library is imported until a command is chosen, so `optbench --help` is instant. A
command is a function of its words that returns the exit code: 0 done · 1 the answer is no · 2 bad input ·
3 the run failed or diverged · 75 interrupted, resume me.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130
SCHEMA_VERSION = 1


class Command(NamedTuple):
    """A line of the table.

    Attributes:
        target: "module:function"; the function takes the words after the command and returns the exit code.
        summary: one line for `optbench --help`.
        usage: words after the command.
        examples: (words, what they do).
        options: (flag, meaning) besides --json.
        takes_keys: it takes `key=value` words of a run.
        keys: "module:function" of the text about keys of the command's own; empty: none.
    """

    target: str
    summary: str
    usage: str
    examples: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...] = ()
    takes_keys: bool = False
    keys: str = ""


_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)
_NOT_WRITTEN += (errno.EIO, errno.ENOTDIR)
_PROGRESS = (
    ("--quiet, -q", "only runs that do not finish, and the result"),
    ("--verbose, -v", "also what each run prints (else only in its log.txt)"),
)


COMMANDS: dict[str, Command] = {
    "train": Command(
        "harness.jobs.train_command:main",
        "one run",
        "[FILE.yaml] [group=option …] [key=value …] [--json]",
        (
            ("", "the defaults: a tiny LLaMA on the King James Bible with AdamW"),
            ("model=llama_9m optimizer=sumo optimizer.rank=64 steps=1000 world_size=2", "two processes"),
            ("model=llama_60m optimizer=galore precision=bf16 batch_size=512 micro_batch_size=64", "GPUs"),
        ),
        (("FILE.yaml", "keys of the run, such as the config.yaml of an earlier one; other words win"),),
        takes_keys=True,
    ),
    "compare": Command(
        "analysis.compare.command:main",
        "several optimizers under one protocol, with table and report",
        "OPTIMIZER … [seeds=N] [OPTIMIZER.key=value …] [group=option …] [key=value …] [--json]",
        (
            ("adamw muon galore sumo preset=quickstart", "what `make quickstart` runs"),
            ("adamw sumo seeds=5 model=llama_9m steps=2000", "with intervals"),
            ("sumo galore sumo.rank=32 galore.rank=64", "options for one of them"),
        ),
        _PROGRESS,
        takes_keys=True,
    ),
    "sweep": Command(
        "analysis.tuning.command:main",
        "tune optimizers with equal budgets, then compare on fresh seeds",
        "OPTIMIZER … | study=NAME [trials=5] [seeds=3] [[OPTIMIZER.]option=A,B,…|LOW..HIGH] [extend=N] "
        "[OPTIMIZER.key=value …] [key=value …] [--dry-run] [--json]",
        (
            ("adamw muon galore sumo preset=quickstart", "five learning rates each, around its default"),
            (
                "adamw sumo lr=1e-3..1e-1 sumo.rank=16,32 trials=6 seeds=5 model=llama_9m",
                "spaces of your own",
            ),
            ("study=quickstart", "a study from a file: configs/study/NAME.yaml"),
            ("adamw sumo trials=3 steps=1000 --dry-run", "which trials there would be, and how many tokens"),
        ),
        (
            ("trials=N", "settings for every optimizer (5, or as many as a list has)"),
            ("seed=K, seeds=N", "the trials' seed (0); the comparison runs seeds K+1 to K+N (3 of them)"),
            (
                "extend=N",
                "while a best lies on an edge, up to N more trials for every optimizer (2; own space: 0)",
            ),
            ("--dry-run", "the trials and what they would cost; start nothing"),
            *_PROGRESS,
        ),
        takes_keys=True,
    ),
    "report": Command(
        "analysis.report.command:main",
        "compare the runs below a folder, other trainers' (CSV, JSONL) too",
        "DIR [--out DIR] [--figures png] [--wandb] [--json] | ENTITY/PROJECT[/GROUP] --export DIR [--json]",
        (
            ("runs/quickstart", "writes report.html, comparison.md and comparison.csv there"),
            ("runs/quickstart --figures png", "and each plot as a PNG, by matplotlib"),
            ("runs/quickstart --wandb", "and a workspace, a report and its files as artifacts in W&B"),
            ("team/optbench/quickstart --export runs/back", "run folders out of W&B, compared"),
        ),
        (
            ("--out DIR", "write there instead"),
            ("--wandb[=ENTITY/PROJECT]", "dashboards in W&B; without a login their definition as a file"),
            ("--export DIR", "read runs from W&B into run folders below DIR, then compare them"),
        ),
    ),
    "plan": Command(
        "harness.plan.command:main",
        "memory, traffic and FLOPs of a run, before it starts: does it fit",
        "[FILE.yaml] [group=option …] [key=value …] [--world-size N] [--device-memory SIZE] [--json]",
        (
            ("model=llama_60m optimizer=sumo engine=fsdp2 --world-size 64", "on a cluster that is not here"),
            ("optimizer=muon engine=zero3 world_size=2 --json", "one JSON document"),
        ),
        (
            ("--world-size N", "processes to plan for"),
            ("--device-memory SIZE", 'of one device, for "fits": 80GB, 24GiB (80GB)'),
        ),
        takes_keys=True,
    ),
    "paper": Command(
        "analysis.paper.command:main",
        "a published table: published, predicted, measured",
        "TABLE [runs=DIR] [--commands] [--out DIR] [--json] | [--list] [--json]",
        (
            ("", "the tables that are known"),
            ("sumo_table3", "its memory counted on our optimizers; its perplexities from runs/sumo_table3"),
            ("sumo_table3 runs=runs/mine --out runs/paper", "from finished runs elsewhere, written as files"),
            ("sumo_table9 --commands", "the runs that would fill what is not measured"),
        ),
        (
            ("--list", "the tables that are known"),
            ("--commands", "commands of the missing runs, with the paper's protocol, instead of the table"),
            ("--out DIR", "write TABLE.json, TABLE.md and TABLE.csv there"),
        ),
    ),
    "certify": Command(
        "harness.verify.command:main",
        "does an optimizer compute on an engine what its rule says",
        "[rule=… engine=… dtype=… accumulation=… clipping=… world_size=…] [--full] [--out DIR] [--json]",
        (
            ("", "every rule on every engine, every setting of each engine: a few minutes"),
            ("rule=sumo,muon engine=fsdp2,zero3", "some of them"),
            ("rule=galore dtype=bf16", "with what is named taken whole"),
            ("--include-controls", "and defects put in on purpose, which must come out red"),
        ),
        (
            ("--full", "every combination (under an hour on 2 cores)"),
            ("--include-controls", "eight defects of other implementations, each of which must be seen"),
            ("--include-peers", "torch's and DeepSpeed's own Muon beside ours; never counted"),
            ("--out DIR", "write certificates.json and certificates.md there (runs/certificates)"),
        ),
    ),
    "margin": Command(
        "analysis.margin.command:main",
        "how slowly training reaches its robustness margin",
        "[mode=toy|flow|mlp|head] [key=value …] [NAME.option=value …] [--out DIR] [--json]",
        (
            ("", "gradient descent on two neurons and two points: the gap closes as 1/ln t"),
            ("optimizer=gd,adam,muon,sumo w=1,-3 b=0.5,0 steps=100000", "which optimizers escape that"),
            ("mode=flow join_at=10000", "the same trajectory to flow time 1e300, checked against the steps"),
            ("experiment=margin_inits", "many random starts, dead ones counted"),
        ),
        (("--out DIR", "write there instead of runs/margin/<name>"),),
        keys="analysis.margin.settings:text",
    ),
    "reconstruct": Command(
        "analysis.reconstruction.command:main",
        "can training images be reconstructed from weights",
        "[mode=fixture] [experiment=NAME] [key=value …] [OPTIMIZER.option=value …] [--json]",
        (
            (
                "mode=fixture",
                "a network in closed form: alternatives that are exact, controls that must fail",
            ),
            ("optimizer=gd,muon seeds=3", "victims, certificates, alternatives, attacks, susceptibility"),
            (
                "checkpoint=weights.safetensors batch=batch.npz",
                "a network of your own, if the theory covers it",
            ),
        ),
        keys="analysis.reconstruction.config:text",
    ),
    "export": Command(
        "harness.export:main",
        "trained weights as a Hugging Face model folder",
        "CHECKPOINT FOLDER [--json]",
        (
            ("runs/default/mine model", "the newest checkpoint of a run, with its tokenizer"),
            ("runs/default/mine/checkpoints/step_00001000 model", "this one"),
        ),
    ),
    "clean": Command(
        "harness.clean:main",
        "what run folders no longer need, and remove it",
        "[DIR] [--yes] [--json]",
        (
            (
                "",
                "list rows and checkpoints of earlier attempts, half-written files, replaced runs below runs/",
            ),
            ("runs/mine --yes", "remove them"),
        ),
        (("--yes", "remove what is listed"),),
    ),
    "doctor": Command(
        "harness.doctor:main",
        "what this machine can run, and what is missing",
        "[--json]",
        (("", "packages, GPUs, engines, folders, W&B, SLURM; exit code 1 where something is broken"),),
    ),
    "completion": Command(
        "harness.completion:main",
        "a script that completes commands, keys and values on TAB",
        "bash|zsh|fish",
        (("bash >> ~/.bash_completion", "for every shell to come"),),
    ),
    "submit": Command(
        "analysis.training.submit_command:main",
        "a run, a comparison or another command as SLURM jobs",
        "[train|compare|COMMAND] [words of it] [cluster=NAME] [cluster.key=value …] [--dry-run] [--json]",
        (
            ("model=llama_60m optimizer=sumo cluster=generic_gpu --dry-run", "print the script"),
            ("model=llama_1b engine=fsdp2 cluster.nodes=4 cluster.time=12h", "one run on four nodes"),
            (
                "compare adamw sumo seeds=3 cluster.throttle=4",
                "an array, one row per run, and the report after it",
            ),
            ("margin optimizer=gd,sumo --after 12", "any other command, after job 12"),
        ),
        (
            ("--dry-run", "print the script, queue nothing"),
            ("--after JOB,…", "begin when these jobs have ended"),
            ("--then 'COMMAND …'", "one more job after it, also if it failed"),
            ("cluster.KEY", "partition, account, nodes, gpus, time, container …: optbench show generic_gpu"),
        ),
    ),
    "status": Command(
        "harness.jobs.status_command:main",
        "what the runs below a folder are doing",
        "[DIR] [--watch] [--cancel NAME] [--resubmit NAME] [--json]",
        (
            ("", "all runs below runs/"),
            ("runs/mine --watch", "again every two seconds, as long as something happens"),
            ("--cancel sumo-seed0", "end its job; the run saves and can go on later"),
            ("--resubmit sumo-seed0", "queue its script again"),
        ),
        (
            ("--watch", "keep the table up to date"),
            ("--cancel NAME", "end the job of a run"),
            ("--resubmit NAME", "queue a run again, from its last checkpoint"),
        ),
    ),
    "list": Command(
        "harness.listing:list_command",
        "models, optimizers, engines, data sets",
        "[--json]",
        (("", "everything that can be named"),),
    ),
    "show": Command(
        "harness.listing:show_command",
        "one of them: options, defaults, allowed values, source",
        "NAME [--json]",
        (("sumo", "options of an optimizer"), ("llama_60m", "a model"), ("train", "every key of a run")),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after `optbench`; None: those of this process.

    Returns:
        The exit code. Bad input leaves one line on standard error, last and alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or a name that is not UTF-8 must not end a command with a UnicodeEncodeError.
            stream.reconfigure(errors="backslashreplace")
    words = _command_first(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return _print(_overview())
    if words[0] in ("-V", "--version"):
        return _print(f"optbench {_version()}")
    name, rest = words[0], words[1:]
    is_json = "--json" in rest
    try:
        _refuse_nul(words)
        command = COMMANDS.get(name)
        if command is None:
            raise _unknown(name, rest)
        if "-h" in rest or "--help" in rest:
            return _print(_help(name, command))
        return _run(command, rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left; a second error at interpreter exit helps nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _failure(error, is_json)


def _refuse_nul(words: Sequence[str]) -> None:
    """A shell cannot type a NUL, a program that calls `main` can; no file has one in its name."""
    for word in words:
        if "\0" in word:
            from harness.config.errors import InputError

            raise InputError("command line", ascii(word)[:80], "holds a NUL character", fix="leave it out")


def _command_first(words: Sequence[str]) -> list[str]:
    """The words with the command before the flags: `optbench --json list`, `optbench help train`."""
    place = next((i for i, word in enumerate(words) if word in COMMANDS), None)
    before = list(words[:place]) if place is not None else []
    if not before or any(word not in ("-h", "--help", "help", "--json") for word in before):
        return list(words)
    flags = ["--help" if word == "help" else word for word in before]
    assert place is not None
    return [words[place], *flags, *words[place + 1 :]]


def document(**content: object) -> str:
    """The one JSON document of a command's --json, with its schema version.

    Raises:
        ValueError: a number that JSON has no word for (NaN, infinity).
    """
    text = json.dumps(
        {"schema_version": SCHEMA_VERSION, **content}, indent=2, ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # file names may hold halves of surrogate pairs


def _run(command: Command, words: list[str]) -> int:
    module, _, function = command.target.partition(":")
    return int(getattr(import_module(module), function)(words) or 0)


def _failure(error: Exception, is_json: bool) -> int:
    from harness.config.errors import InputError
    from harness.visible import visible

    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        # A promised file that could not be written: a full disk needs a line, not a traceback.
        message = f"{error.filename or 'a file'} can't be written: {error.strerror}"
        if is_json:
            print(document(error={"key": "disk", "value": str(error.filename), "message": message}))
        sys.stdout.flush()
        print(visible(message), file=sys.stderr)
        return FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        error = InputError(
            "path", str(error.filename)[:80], f"can't be used ({error.strerror})", fix="a shorter path"
        )
    if isinstance(error, UnicodeEncodeError):
        error = InputError("text", ascii(error.object)[:80], "is not UTF-8", fix="type it as UTF-8 text")
    if not isinstance(error, InputError):
        traceback.print_exception(error)
        return FAILED
    if is_json:
        print(document(error={"key": error.key, "value": str(error.value), "message": str(error)}))
    sys.stdout.flush()
    print(visible(error), file=sys.stderr)
    return BAD_INPUT


def _unknown(name: str, rest: list[str]) -> Exception:
    from harness.config.errors import InputError, closest

    words = " ".join(rest)
    if "=" in name:
        return InputError(
            "command",
            name,
            "is not a command",
            allowed=COMMANDS,
            suggestion=f"train {name}",
            fix=f"optbench train {name} {words}",
        )
    guess = closest(name, COMMANDS)
    fix = f"optbench {guess} {words}" if guess else "optbench --help"
    return InputError("command", name, "is not a command", allowed=COMMANDS, suggestion=guess, fix=fix)


def _print(text: str) -> int:
    print(text)
    return 0


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("optbench")
    except PackageNotFoundError:
        return "(not installed: running from a checkout)"


HEADINGS: dict[str, tuple[str, ...]] = {
    "train": ("train", "plan", "export", "clean"),
    "compare": ("compare", "sweep", "report", "paper"),
    "verify": ("certify", "audit", "diverge"),
    "study": ("margin", "reconstruct", "memorize"),
    "run on a cluster": ("submit", "status"),
    "look up": ("list", "show", "doctor", "completion"),
}
"""Heading of `optbench --help` → commands; those that are in no group come last."""


def _overview() -> str:
    grouped = {name for names in HEADINGS.values() for name in names}
    others = tuple(name for name in COMMANDS if name not in grouped)
    lines = ["optbench: train and compare optimizers of language models, on one process or many", ""]
    lines += ["usage: optbench COMMAND …"]
    for heading, names in [*HEADINGS.items(), ("other", others)]:
        rows = [(name, COMMANDS[name].summary) for name in names if name in COMMANDS]
        if rows:
            lines += ["", f"{heading}:", *_rows(rows, max(map(len, COMMANDS)))]
    lines += ["", "help:"]
    lines += _rows(
        [
            ("optbench COMMAND --help", "words, examples and keys of a command"),
            ("optbench COMMAND --json", "one JSON document on standard output instead of tables"),
        ]
    )
    lines += ["", "first: optbench compare adamw muon galore sumo preset=quickstart"]
    return "\n".join(line for text in lines for line in _wrapped(text))


def _help(name: str, command: Command) -> str:
    lines = [
        *_wrapped(f"optbench {name}: {command.summary}"),
        "",
        *_wrapped(f"usage: optbench {name} {command.usage}", 16),
        "",
        "examples:",
    ]
    for words, note in command.examples:
        lines += _wrapped(f"  optbench {name} {words}".rstrip(), 6)
        lines += _wrapped(f"      {note}")
    options = (*command.options, ("--json", "one JSON document on standard output, nothing else"))
    lines += ["", "options:", *_rows(options)]
    texts = []
    if command.keys:
        module, _, function = command.keys.partition(":")
        texts.append(getattr(import_module(module), function)())
    if command.takes_keys:
        from harness.listing import keys_text

        texts.append(keys_text())
    for text in texts:
        lines.append("")
        for line in text.splitlines():
            lines += _wrapped(line, len(line) - len(line.lstrip()) + 4 if line.startswith(" ") else 0)
    return "\n".join(lines)


def _width() -> int:
    """Columns of the terminal (or of COLUMNS); 80 where there is none."""
    return max(30, shutil.get_terminal_size((80, 24)).columns)


def _rows(rows: Sequence[tuple[str, str]], column: int | None = None) -> list[str]:
    """Two columns; where they do not fit next to each other, the second one below the first."""
    width = max(len(first) for first, _ in rows) if column is None else column
    if width + 4 + 20 > _width():
        return [
            line
            for first, second in rows
            for line in (*_wrapped(f"  {first}", 6), *_wrapped(f"      {second}"))
        ]
    return [line for first, second in rows for line in _wrapped(f"  {first:<{width}}  {second}", width + 4)]


def _wrapped(text: str, indent: int | None = None) -> list[str]:
    """Lines that fit the terminal, broken between words; ``indent``: of the second line and those after it."""
    own = len(text) - len(text.lstrip(" "))
    further = " " * min(own if indent is None else indent, _width() // 2)
    return textwrap.wrap(
        text,
        _width(),
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    ) or [""]


if __name__ == "__main__":
    sys.exit(main())
