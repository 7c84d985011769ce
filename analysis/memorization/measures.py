"""Everything that is measured on one checkpoint, kept in a file so that an interrupted job goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.comparison.statistics import interval
from analysis.formatting import to_jsonable
from analysis.memorization import chance, exposure, extraction, membership, robustness
from analysis.memorization.config import MemorizeConfig
from analysis.memorization.membership import Separation
from analysis.memorization.runs import MeasuredRun
from analysis.memorization.windows import CorpusView, Rows, occurrences, spread, token_log_probs
from harness import export
from harness.checkpoint import store
from harness.errors import InputError
from harness.files import atomic

Floats = NDArray[np.float64]
Result = dict[str, Any]
VERSION = 3
"""Raised when the same checkpoint would give other numbers: kept results of another version are measured again."""
FEWEST_HELD_OUT = 32
"""Controls, of which a check in either direction is possible: the mean of eight can hardly be too low."""


class TooFewRows(ValueError):
    """A checkpoint has seen fewer than two rows without canaries."""


class Measurer:
    """Measure checkpoints of runs on one corpus.

    Args:
        view: the corpus.
        config: what to measure.
        cache: folder for the result of each checkpoint.

    Raises:
        InputError: ``reference`` holds no checkpoint, or one of another tokenizer.
    """

    def __init__(self, view: CorpusView, config: MemorizeConfig, cache: Path) -> None:
        self._view, self._config, self._cache = view, config, cache
        if config.prefix + config.continuation > view.seq_len + 1:
            value, room = config.prefix + config.continuation, view.seq_len + 1
            reason = f"with continuation is {value} tokens, and rows of these runs hold {room}"
            raise InputError(
                "prefix", config.prefix, reason, fix=f"prefix={room // 2} continuation={room // 2}"
            )
        self._reference = None if config.reference is None else _Reference(config.reference, view)
        self._validation = view.validation_rows(config.windows)
        groups = len({canary.copies for canary in view.inserted}) or 1
        # As many as a number of copies has, from canaries in no document: they show the level of chance.
        self._controls = view.held_out[: max(FEWEST_HELD_OUT, len(view.inserted) // groups)]

    def measure(self, run: MeasuredRun, step: int, checkpoint: Path) -> Result:
        """Return the result of one checkpoint, its numbers from its file if it has one.

        The file holds what follows from the checkpoint alone. Label and place of the run depend on the other runs.
        """
        passes = step * run.config.batch_size * run.config.seq_len / self._view.corpus.train_tokens
        return {
            "optimizer": run.arm,
            "preset": run.optimizer,
            "rank": run.rank,
            "seed": run.seed,
            "step": step,
            "epochs": passes,
            "run": run.run.where,
            **self._numbers(run, step, checkpoint),
        }

    def _numbers(self, run: MeasuredRun, step: int, checkpoint: Path) -> Result:
        kept = self._cache / f"{run.run.folder.name}-step{step}-{self._key(checkpoint)}.json"
        try:
            return json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        began = time.process_time()
        torch.manual_seed(0)
        training = self._view.training_rows(run.config, step, self._config.windows)
        model = export.load(checkpoint, run.config, export.choice(checkpoint, None))
        try:
            numbers = self.of_model(model, training)
        except exposure.NotFinite as error:
            reason = f"cannot be measured: {error}"
            fix = "leave out the run, or delete the checkpoint"
            raise InputError("memorize", checkpoint, reason, fix=fix) from error
        result = to_jsonable(numbers) | {"cpu_s": time.process_time() - began}
        self._cache.mkdir(parents=True, exist_ok=True)
        atomic.write_json(kept, result)
        return result

    def of_model(self, model: nn.Module, training: Rows) -> Result:
        """Return all measures of a model.

        Args:
            model: in evaluation mode.
            training: rows that it was trained on.

        Raises:
            TooFewRows: fewer than two training rows.
            NotFinite: a loss is not finite.
        """
        if len(training.ids) < 2:
            raise TooFewRows
        seen, unseen = token_log_probs(model, training), token_log_probs(model, self._validation)
        if not (np.isfinite(seen).all() and np.isfinite(unseen).all()):
            raise exposure.NotFinite("losses of rows are not finite")
        return {
            "val_loss": float(-unseen.mean()),
            "train_loss": float(-seen.mean()),
            **self._canaries(model),
            "extraction": self._extraction(model, training),
            "membership": self._membership(seen, unseen, training),
            "robustness": robustness.describe(model, self._validation),
        }

    def _canaries(self, model: nn.Module) -> Result:
        view = self._view
        if not view.inserted:
            return {"exposure": [], "canaries": []}
        chosen = [*self._controls, *view.inserted]
        scores = exposure.secret_scores(model, view.encoder, chosen, view.held_out)
        bits = exposure.exposures(scores.own, scores.others)
        canaries = [
            {"name": c.name, "copies": c.copies, "exposure": float(b), "extracted": bool(e)}
            for c, b, e in zip(chosen, bits, scores.is_extracted)
        ]
        groups = []
        for copies in sorted({canary.copies for canary in chosen}):
            of_group = np.array([canary.copies == copies for canary in chosen])
            found = interval(bits[of_group])
            groups.append(
                {
                    "copies": copies,
                    "mean": found.mean,
                    "low": _bound(found.mean - found.half_width),
                    "high": _bound(found.mean + found.half_width),
                    "canaries": int(of_group.sum()),
                    "extracted": float(scores.is_extracted[of_group].mean()),
                }
            )
        return {"exposure": groups, "canaries": canaries}

    def _extraction(self, model: nn.Module, training: Rows) -> Result:
        shape = (self._config.prefix, self._config.continuation)
        most = self._config.extracted
        # Training rows are in random order, validation rows in that of the split.
        few = training.some(slice(most)), self._validation.some(spread(len(self._validation.ids), most))
        seen, unseen = ((extraction.extract(model, rows, *shape), rows.documents) for rows in few)
        return extraction.describe(seen, unseen, *shape)

    def _membership(self, seen: Floats, unseen: Floats, training: Rows) -> Result:
        share = self._config.min_k
        scores = {
            "loss": (seen.mean(1), unseen.mean(1)),
            "min_k": (membership.min_k_scores(seen, share), membership.min_k_scores(unseen, share)),
        }
        if self._reference is not None:
            losses = self._reference.losses(training), self._reference.losses(self._validation)
            scores["reference"] = (seen.mean(1) + losses[0], unseen.mean(1) + losses[1])
        documents = training.documents, self._validation.documents
        found = {
            name: _describe(membership.separation(members, others, *documents))
            for name, (members, others) in scores.items()
        }
        by_chance = chance.separation_by_chance(self._view, training, self._validation)
        return {
            **found.pop("loss"),
            **found,
            "chance": None if by_chance is None else _describe(by_chance),
            "members": len(seen),
            "others": len(unseen),
            "member_documents": len(np.unique(documents[0])),
            "other_documents": len(np.unique(documents[1])),
        }

    def _key(self, checkpoint: Path) -> str:
        manifest = (checkpoint / store.MANIFEST).read_bytes()
        keys = self._config.model_dump(exclude={"val_loss", "checkpoints"})
        reference = None if self._reference is None else self._reference.checksum
        text = json.dumps([VERSION, keys, reference], sort_keys=True).encode()
        return hashlib.sha256(text + manifest).hexdigest()[:12]


class _Reference:
    """The losses of a reference model, computed once per row."""

    def __init__(self, place: str, view: CorpusView) -> None:
        from harness import data
        from harness.config import compose

        source = export.find(Path(place))
        config = compose.load_file(source.folder / store.CONFIG)
        if config.task.name != "pretrain":
            raise InputError(
                "reference", place, f"has task={config.task.name}", allowed="a run with task=pretrain"
            )
        corpus = data.prepare(config.data)
        self._place = place
        if corpus.sha256 == view.corpus.sha256:
            self._refuse("was trained on the same corpus: it saw the training rows")
        if corpus.tokenizer_sha256 != view.corpus.tokenizer_sha256:
            reason = "has another tokenizer, so that its losses are those of other tokens"
            raise InputError(
                "reference", place, reason, fix="data.tokenizer=FOLDER of the measured runs, and train"
            )
        self._model = export.load(source.folder, config, export.choice(source.folder, None))
        self._tokens = np.asarray(corpus.tokens())[: corpus.train_tokens]
        self._known: dict[bytes, float] = {}
        self.checksum = hashlib.sha256((source.folder / store.MANIFEST).read_bytes()).hexdigest()

    def _refuse(self, reason: str) -> NoReturn:
        fix = "a run on other text, with data.tokenizer=FOLDER of the measured runs"
        raise InputError("reference", self._place, reason, fix=fix)

    def losses(self, rows: Rows) -> Floats:
        """Return the mean loss of each row, nats/token: (rows,) float64.

        Raises:
            InputError: the reference model was trained on one of the rows.
        """
        names = [row.tobytes() for row in rows.labels]
        new = np.array([name not in self._known for name in names])
        if new.any():
            found = sum(len(occurrences(self._tokens, row)) > 0 for row in rows.labels[new])
            if found:
                self._refuse(f"was trained on {found} of {int(new.sum())} rows that are measured")
            losses = -token_log_probs(self._model, rows.some(new)).mean(1)
            self._known |= dict(zip((name for name, is_new in zip(names, new) if is_new), losses.tolist()))
        return np.array([self._known[name] for name in names])


def _describe(found: Separation) -> dict[str, float]:
    return {"auc": found.auc, "low": found.low, "high": found.high, "tpr_at_1_fpr": found.tpr}


def _bound(value: float) -> float | None:
    """Return the end of an interval within the possible exposures; None without an interval."""
    most = exposure.largest(exposure.ALTERNATIVES)
    return min(max(value, 0.0), most) if math.isfinite(value) else None


def measure_all(measured: list[MeasuredRun], measurer: Measurer, say: Callable[[str], None]) -> list[Result]:
    """Return a result per checkpoint that can be measured, in the order of the runs and steps.

    Raises:
        InputError: none can be, or a loss is not finite.
    """
    results: list[Result] = []
    total = sum(len(run.checkpoints) for run in measured)
    places = [(run, step, folder) for run in measured for step, folder in run.checkpoints]
    for number, (run, step, folder) in enumerate(places, 1):
        where = f"{number}/{total}: {run.run.where}, step {step}"
        try:
            results.append(measurer.measure(run, step, folder))
        except TooFewRows:
            say(f"{where}: left out: it has seen fewer than two rows without canaries")
            continue
        say(f"{where}: val/loss {results[-1]['val_loss']:.4f}")
    if not results:
        reason = "holds no checkpoint that has seen two rows without canaries"
        raise InputError("memorize", measured[0].run.folder, reason, fix="more steps")
    return results
