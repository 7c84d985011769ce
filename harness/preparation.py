"""All that can be known before a process starts or torch is imported: configuration, data, the folder to write to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import checks, compose, evaluation_budget
from harness.config.identity import comparison_key, identity
from harness.config.model_facts import facts
from harness.config.schema import RunConfig
from harness.record import extending
from harness.record import folder as run_folder
from harness.record.extending import ShorterRun

if TYPE_CHECKING:
    from harness.data import Corpus


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    overrides: tuple[str, ...]
    config: RunConfig
    corpus: Corpus
    identity: str
    comparison_key: str
    folder: Path
    shorter_runs: tuple[ShorterRun, ...] = ()
    """What the folder held before this run asked for more steps, the shortest first."""


def prepare(
    overrides: Sequence[str], *, say: Callable[[str], None], worker: bool = False, writes_folder: bool = True
) -> Prepared:
    """Compose and check the configuration, tokenize the corpus if that was not done yet, check the run folder.

    Safe in many processes at once: the corpus is built by the first, the others wait for it.

    Args:
        overrides: ``key=value`` words.
        say: where messages go.
        worker: this is one of the run's own processes, not the command that starts them.
        writes_folder: whether this process will write the run folder (rank 0), so that it must be free.

    Raises:
        InputError: anything about the input that is wrong; nothing has been written to the run folder then.
    """
    config = checks.check(compose.load(overrides), worker=worker)
    # Only now: a mistyped key must not wait for numpy and the tokenizers.
    from harness import data

    vocabulary = facts(config.model).vocab_size
    evaluated = evaluation_budget.tokens(config)
    corpus = data.check(
        config.data,
        config.seq_len,
        config.batch_size,
        evaluated,
        vocabulary,
        say=say,
        trust_remote_code=config.trust_remote_code,
    )

    def identity_of(config: RunConfig) -> str:
        return identity(config, corpus.sha256, corpus.tokenizer_sha256)

    folder = run_folder.path_of(config, identity_of(config))
    config, shorter_runs = extending.plan(folder, config, identity_of)
    run_identity = identity_of(config)
    is_new = config.name is None and writes_folder and not worker and not folder.exists()
    if is_new and (neighbour := extending.shorter_neighbour(folder, config, identity_of)):
        path, steps = neighbour
        say(f"{path} has {steps} steps of the same run: name={path.name} goes on from there")
    key = comparison_key(config, corpus.sha256, corpus.tokenizer_sha256)
    if writes_folder:
        run_folder.check(folder, config, run_identity, shorter_runs)
    return Prepared(tuple(overrides), config, corpus, run_identity, key, folder, shorter_runs)
