"""`watch`: record the first updates of a training script, compare them with the rules that they claim, and report."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from harness.errors import InputError
from harness.verify.watch.claims import claim_of
from harness.verify.watch.clip_listener import ClipListener
from harness.verify.watch.evidence import Evidence
from harness.verify.watch.explain import Explanation, GradientForms, explain
from harness.verify.watch.findings import Parameter, Whole, judge
from harness.verify.watch.partitions import partitions
from harness.verify.watch.recording import PartRecording, choose, unequal_copies
from harness.verify.watch.replay_preset import replayed
from harness.verify.watch.report import Report, merged
from harness.verify.watch.targets import Target, target_of
from optimizers.routing import Route, route

_active = False


@contextmanager
def watch(
    model: Any,
    optimizer: Any = None,
    *,
    steps: int = 3,
    rule: str | None = None,
    max_norm: float | None = None,
    fused: str | None = None,
    max_bytes: int = 4 * 2**30,
    quiet: bool = False,
) -> Iterator[Report]:
    """Record the next updates of a training loop and say whether each parameter took the rule that it should.

    The training is not changed: the same bits of weights come out with and without. After ``steps`` updates the hooks
    are removed, rank 0 compares and prints, and the loop goes on at its own speed. With several ranks, all of them
    enter this block and take the same steps.

    Args:
        model: the module as the loop calls it (wrapped by DDP, FSDP2, accelerate or not), a DeepSpeed engine, or a
            transformers Trainer, whose optimizer is found when it trains.
        optimizer: the optimizer that the loop steps, or a list of optimizers; None with an engine or a Trainer.
        steps: updates to record. Warm-up from a learning rate of 0 shows nothing in its first update.
        rule: name of `optimizers.names()` that hidden matrices should take ("adamw": every parameter); None: what
            optimizer and groups claim.
        max_norm: gradient norm that the loop clips to; None: what torch's clipping or the engine says.
        fused: "parts" or "whole", what should happen to fused projections (QKV, gate-up); None: as claimed.
        max_bytes: bound on the recorded weights and gradients, on the CPU of rank 0; above it, parameters are sampled
            from every group and shape. Recording takes (2·steps + 1) times the bytes of the weights.
        quiet: print nothing.

    Yields:
        The report; it is filled after the last recorded update, or when the block ends before that.

    Raises:
        InputError: bad arguments, or two watches at once.
    """
    global _active
    _check(steps, rule, fused)
    if _active:
        raise InputError("watch", "a second watch", "one is active already", allowed="one watch at a time")
    session = _Session(steps, rule, max_norm, fused, max_bytes, quiet)
    _active = True
    try:
        if hasattr(model, "callback_handler") and hasattr(model, "add_callback"):
            session.attach_to_trainer(model)
        else:
            session.attach(target_of(model, optimizer))
        yield session.report
        session.finish()
    finally:
        session.stop()
        _active = False


def _check(steps: int, rule: str | None, fused: str | None) -> None:
    from optimizers import presets

    if steps < 1:
        raise InputError("steps", steps, allowed="1 or more", fix="steps=3")
    if rule is not None and rule not in presets.names():
        raise InputError("rule", rule, "is not a known rule", allowed=presets.names())
    if fused not in (None, "parts", "whole"):
        raise InputError("fused", fused, allowed=("parts", "whole"))


class _Session:
    """One watch: recorders of each optimizer, and the comparison after the last update."""

    def __init__(
        self,
        steps: int,
        rule: str | None,
        max_norm: float | None,
        fused: str | None,
        max_bytes: int,
        quiet: bool,
    ) -> None:
        self.report = Report(is_reporter=not dist.is_initialized() or dist.get_rank() == 0)
        self._steps, self._rule, self._max_norm, self._fused = steps, rule, max_norm, fused
        self._max_bytes, self._quiet = max_bytes, quiet
        self._clip = ClipListener()
        self._target: Target | None = None
        self._recordings: list[PartRecording] = []
        self._unequal: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def attach(self, target: Target) -> None:
        """Begin to record (a collective)."""
        self._target = target
        _require_equal_names(target)
        groups = [group for part in target.parts for group in part.groups()]
        self._clip.start([target.named[name] for _, members in groups for name in members])
        self._undo.append(self._clip.stop)
        for part in target.parts:
            names = choose(target, part, self._steps, self._max_bytes)
            members = [name for _, group in part.groups() for name in group]
            self.report.left_out += [name for name in members if name not in set(names)]
            recording = PartRecording(
                target, part, names, self._steps, self._clip, self.report.is_reporter, self._done
            )
            self._recordings.append(recording)
            self._undo.append(recording.stop)

    def attach_to_trainer(self, trainer: Any) -> None:
        """Begin to record when a transformers Trainer has built its optimizer."""
        from transformers import TrainerCallback

        session = self

        class Watcher(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                if session._target is None:
                    engine = getattr(trainer, "deepspeed", None)
                    session._max_norm = session._max_norm or args.max_grad_norm or None
                    session.attach(target_of(engine or trainer.model_wrapped, given["optimizer"]))

        watcher = Watcher()
        trainer.add_callback(watcher)
        self._undo.append(lambda: trainer.remove_callback(watcher))

    def _done(self) -> None:
        """Compare once every optimizer has all its updates (a collective)."""
        if all(recording.is_complete for recording in self._recordings):
            assert self._target is not None
            self._unequal = unequal_copies(self._target)
            self.finish()

    def stop(self) -> None:
        """Remove every hook."""
        while self._undo:
            self._undo.pop()()

    def finish(self) -> None:
        """Compare what was recorded and print, once."""
        if self.report.is_finished:
            return
        self.stop()
        self.report.is_finished = True
        if not self.report.is_reporter or self._target is None:
            return
        self.report.steps = min((len(r.facts) for r in self._recordings), default=0)
        try:
            found = [self._compare(self._target, recording) for recording in self._recordings]
            self.report.findings = merged(found)
        except Exception as error:
            # This runs inside the user's `optimizer.step()`: the training must not fail with the comparison.
            self.report.error = f"{type(error).__name__}: {error}"
            warnings.warn(f"watch: comparing failed\n{traceback.format_exc()}", stacklevel=2)
        self._recordings = []
        if not self._quiet:
            print(self.report.table(), file=sys.stdout, flush=True)

    def _compare(self, target: Target, recording: PartRecording) -> list[Any]:
        optimizer = recording.part.optimizer
        routes = {r.name: r for r in _routes(target)}
        heads = _heads(target.module)
        world = dist.get_world_size() if dist.is_initialized() else 1
        bounds = [f.max_norm for f in recording.facts if f.max_norm]
        max_norm = self._max_norm or (bounds[0] if bounds else None)
        parameters = []
        for record in recording.records.values():
            if not record.settings:
                continue
            parameter = target.named[record.name]
            hidden = routes.get(record.name)
            takes_rule = self._rule == "adamw" or (hidden is not None and hidden.blocks)
            rule = self._rule if takes_rule else None
            claim = claim_of(optimizer, record.settings[0], parameter, len(record.shape), rule)
            if any(g is not None and g.is_sparse for g in record.gradients):
                explanation = Explanation("undecided", "sparse gradients are not compared")
                parameters.append(Parameter(record, claim, explanation, hidden))
                continue
            evidence = Evidence(record, parameter.device)
            tiers = partitions(record.shape, hidden, record.shards, heads, world)
            forms = _gradient_forms(evidence, recording, max_norm)
            explanation = explain(evidence, claim, forms, tiers, partial(replayed, evidence, claim, hidden))
            parameters.append(Parameter(record, claim, explanation, hidden))
        whole = Whole(
            type(optimizer).__name__,
            self._rule not in (None, "adamw") or _claims_matrix(optimizer, parameters),
            recording.facts,
            [
                sum(r.facts[t].received_norm ** 2 for r in self._recordings) ** 0.5
                for t in range(self.report.steps)
            ],
            max_norm,
            bool(recording.part.engine),
            bool(recording.part.engine.get("offload")),
            world,
            _flat(target, recording),
            tuple(self._unequal),
            self._fused,
        )
        findings = judge(parameters, whole)
        for p in parameters:
            # The tensors have done their work.
            p.record.weights, p.record.gradients, p.record.micro, p.record.state = (
                p.record.weights[:1],
                [],
                [],
                {},
            )
        self.report.parameters += parameters
        self.report.optimizers.append(whole)
        return findings


def _require_equal_names(target: Target) -> None:
    """Refuse ranks that hold different parameters: their collectives would not match."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    mine = [(name, target.shape(name)) for name in target.named]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if any(each != mine for each in gathered):
        raise InputError(
            "watch", "this model", "has other parameters on other ranks", allowed="data-parallel training"
        )


def _routes(target: Target) -> list[Route]:
    """Return where the model's structure would send each parameter."""
    if all(tuple(p.shape) == target.shape(name) for name, p in target.named.items()):
        return route(list(target.named.items()), "muon", target.module)
    # ZeRO-3 hides the shapes: names decide.
    return route([(name, torch.empty(target.shape(name), device="meta")) for name in target.named], "muon")


def _heads(module: nn.Module) -> list[int]:
    """Return the numbers of attention heads in the model's configuration."""
    config = getattr(module, "config", None)
    values = [
        getattr(config, key, None)
        for key in ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads")
    ]
    return list(dict.fromkeys(value for value in values if isinstance(value, int)))


def _claims_matrix(optimizer: Any, parameters: list[Parameter]) -> bool:
    """Return True if an optimizer presents itself as a matrix optimizer, by its class or its groups."""
    return "muon" in type(optimizer).__name__.lower() or any(
        p.claim.kind == "matrix" or (p.claim.kind == "preset" and p.is_hidden) for p in parameters
    )


def _flat(target: Target, recording: PartRecording) -> tuple[str, ...]:
    """Return the parameters of an optimizer in which matrices are flattened, as FSDP1 does."""
    mine = {name for _, members in recording.part.groups() for name in members}
    weights = {id(m._parameters["weight"]) for m in target.module.modules() if isinstance(m, nn.Linear)}
    return tuple(
        name
        for name, p in target.named.items()
        if name in mine
        and len(target.shape(name)) == 1
        and (type(p).__name__ == "FlatParameter" or hasattr(p, "_fqns") or id(p) in weights)
    )


def _gradient_forms(evidence: Evidence, recording: PartRecording, max_norm: float | None) -> GradientForms:
    """Return the gradients that a rule may have used, by name."""
    received = evidence.gradients
    if not recording.part.engine:
        return {"received": received}
    forms = {"raw": received}
    norms = [f.raw_norm for f in recording.facts]
    if max_norm and all(norm is not None for norm in norms):
        factors = [min(1.0, max_norm / (norm + 1e-6)) for norm in norms if norm is not None]
        if min(factors) < 1.0:
            forms["clipped"] = [g * factor for g, factor in zip(received, factors)]
    return forms
