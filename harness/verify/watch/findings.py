"""Compare what explains the updates with what was claimed, and give each known defect its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from harness.verify.watch.claims import SCALES, Claim
from harness.verify.watch.explain import Explanation
from harness.verify.watch.recording import ParameterRecord, StepFacts
from harness.verify.watch.spectral import SMOOTH, UNKNOWN
from harness.verify.watch.subspaces import shard_ranks
from optimizers.routing import Route

DEFECTS: Mapping[str, str] = {
    "plain SGD under Muon's name": "the update is momentum SGD: nothing was orthogonalized",
    "no matrix routed": "the optimizer is called Muon, and no hidden matrix takes a matrix rule",
    "flat parameters routed to AdamW": "weights are flat tensors, in which no rule sees a matrix",
    "offload without orthogonalization": "with CPU offload nothing is orthogonalized",
    "stale gradient of offload": "the update uses the gradient of an earlier step",
    "whole QKV orthogonalized": "a fused projection is orthogonalized as one matrix instead of by its parts",
    "fused projections differ": "some fused projections are orthogonalized whole, others by their parts",
    "padding rows change the scale": "the factor on the update is that of a larger, padded matrix",
    "shard-local Newton–Schulz": "each shard is orthogonalized on its own",
    "clipping after orthogonalization": "the update was clipped instead of the gradient",
    "micro-batch momentum": "momentum and Newton–Schulz advance with every micro-batch",
    "unsynchronized basis, replicas": "replicas hold different weights",
    "unsynchronized basis, shards": "the shards of a matrix are projected on subspaces of their own",
    "smooth cut": "singular directions near the cut are damped instead of kept or dropped",
    "clipping forgotten": "the gradient norm exceeds the clipping bound when the optimizer receives it",
    "gradients halved": "the gradient is averaged more than once",
    "gradients summed": "the gradient is summed over ranks instead of averaged",
    "gradients not reduced": "the optimizer received gradients that are not the mean over ranks",
    "another rule": "the update is that of another rule than claimed",
    "another momentum": "the momentum has another form than the group says",
    "another scale": "the factor on the update is not the documented one",
    "another orthogonalizer": "the matrix is orthogonalized by another method than the rule's",
    "another learning rate": "the update has not the learning rate of its group",
    "another weight decay": "the weight decays at another rate than the group says",
    "weight decay in the gradient": "weight decay is added to the gradient instead of acting on the weight",
    "unexplained update": "no known rule gives this update",
    "weights do not move": "there are gradients and a learning rate, but no update",
    "embedding on the matrix rule": "an embedding, output head or router is orthogonalized",
}
"""Every defect that `watch` names: name → meaning."""

NO_RULE = "no rule known"
NOTES: Mapping[str, str] = {
    NO_RULE: "neither class nor group say which rule the update should be; name one with rule=",
    "weight decay rounded away": "w·(1 - lr·λ) rounds back to w in these weights' precision",
    "hidden matrix on AdamW": "the optimizer's groups send a hidden matrix to AdamW, next to others on a matrix rule",
}
"""What does not make an optimizer wrong, but its user should know: name → meaning."""

SCALE_TOLERANCE = 0.03
"""Relative. Rounding in bf16 shortens the factor of Newton–Schulz by up to 1 % (measured)."""
RATE_TOLERANCE = 0.02
BOUND_TOLERANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        name: key of `DEFECTS` or `NOTES`.
        message: what was found, with numbers.
        parameters: where.
    """

    name: str
    message: str
    parameters: tuple[str, ...] = ()

    @property
    def is_defect(self) -> bool:
        """Return False for a note."""
        return self.name in DEFECTS

    @property
    def meaning(self) -> str:
        """Return what the name means."""
        return {**DEFECTS, **NOTES}[self.name]


@dataclass
class Parameter:
    """A parameter with everything known about it.

    Attributes:
        record, claim, explanation: what was recorded, announced and found.
        route: where the model's structure would send it; None: unknown.
        found: problems of this parameter alone, name → detail.
    """

    record: ParameterRecord
    claim: Claim
    explanation: Explanation
    route: Route | None
    found: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return its name."""
        return self.record.name

    @property
    def is_hidden(self) -> bool:
        """Return True for a hidden matrix, or a stack of them."""
        return self.route is not None and bool(self.route.blocks)


@dataclass
class Whole:
    """What concerns all parameters of one optimizer.

    Attributes:
        who: class of the optimizer.
        claims_matrix: it presents itself as a matrix optimizer.
        facts: of its updates.
        norms: received gradient norm of each update, over all optimizers of the loop.
        max_norm: clipping bound, from the user, torch's clipping or the engine.
        clips_itself: the engine clips after the gradients were recorded.
        offload: the engine keeps optimizer state on the CPU.
        world: number of ranks.
        flat: flat parameters that hide matrices.
        unequal: parameters whose copies differ between ranks.
        fused: "parts" or "whole", what the user expects of fused projections; None: no opinion.
    """

    who: str
    claims_matrix: bool
    facts: list[StepFacts]
    norms: list[float]
    max_norm: float | None
    clips_itself: bool
    offload: bool
    world: int
    flat: tuple[str, ...] = ()
    unequal: tuple[str, ...] = ()
    fused: str | None = None


def judge(parameters: Sequence[Parameter], whole: Whole) -> list[Finding]:
    """Return the findings, grouped by defect."""
    shrink = _clipped_updates(parameters)
    for parameter in parameters:
        for name, detail in _of_parameter(parameter, whole, shrink):
            parameter.found.setdefault(name, detail)
        if _is_unknown(parameter, whole):
            parameter.found = {NO_RULE: parameter.claim.who}
    findings = [*_of_all(parameters, whole, shrink), *_of_gradients(whole)]
    names = dict.fromkeys(name for p in parameters for name in p.found)
    for name in names:
        members = [p for p in parameters if name in p.found]
        details = Counter(p.found[name] for p in members)
        message = "; ".join(f"{detail} ({count}×)" for detail, count in details.most_common(3))
        findings.append(Finding(name, message, tuple(p.name for p in members)))
    return _named_once(findings)


def _named_once(findings: Iterable[Finding]) -> list[Finding]:
    """Drop consequences of a defect that has a name of its own."""
    findings = list(findings)
    names = {finding.name for finding in findings}
    consequences = {
        "offload without orthogonalization": {"plain SGD under Muon's name", "another rule"},
        "flat parameters routed to AdamW": {"no matrix routed", "another rule"},
        "no matrix routed": {"another rule"},
        "clipping after orthogonalization": {
            "another scale",
            "another learning rate",
            "another weight decay",
        },
        "fused projections differ": {"whole QKV orthogonalized"},
    }
    dropped = set().union(*(consequences.get(name, set()) for name in names))
    return [finding for finding in findings if finding.name not in dropped]


def _is_unknown(p: Parameter, whole: Whole) -> bool:
    """Return True if nothing says which rule the update should be.

    What differs from AdamW or SGD may be just what such an optimizer is for; what does not may be its failure to do
    more. Only an orthogonalized update with a documented factor says by itself what it is.
    """
    if p.claim.kind != "other" or not p.explanation.moved:
        return False
    return bool(p.found) or not (whole.claims_matrix or p.explanation.rule == "orthogonalized")


def _of_parameter(p: Parameter, whole: Whole, shrink: Sequence[float] | None) -> Iterable[tuple[str, str]]:
    """Yield (defect, detail) of one parameter."""
    e, claim = p.explanation, p.claim
    if e.rule in ("no gradient", "undecided"):
        return
    if e.rule == "still":
        # Weights in half precision may be too coarse for a small update, which is no defect of the optimizer.
        if e.rounding == 0.0 and p.record.weights[0].element_size() >= 4:
            yield "weights do not move", e.detail
        return
    if e.rule == "unexplained":
        yield _unexplained(p)
        return
    if e.gradients == "previous":
        yield "stale gradient of offload", e.detail
        return
    if e.gradients == "micro-batches":
        yield "micro-batch momentum", e.detail
        return
    if claim.kind == "matrix":
        yield from _of_matrix(p, whole)
        if e.rule != "orthogonalized" or not e.fits:
            return
    elif claim.kind in ("adamw", "sgd", "lion"):
        if claim.kind == "adamw" and p.is_hidden and whole.claims_matrix and not p.claim.preset:
            yield "hidden matrix on AdamW", p.route.reason if p.route else ""
        expected = {"adamw": "adamw", "sgd": "sgd", "lion": "sign"}[claim.kind]
        if e.rule != expected and not (claim.kind == "adamw" and e.rule == "sign" and e.runner_up[1] < 0.05):
            yield "another rule", f"{claim.who} says {claim.kind}, found {e.detail}"
            return
    if e.rule == "preset":
        return
    yield from _of_decay(p)
    yield from _of_rate(p, shrink)


def _unexplained(p: Parameter) -> tuple[str, str]:
    """Return the name of an update that no known rule gives."""
    e = p.explanation
    ranks = shard_ranks(_first_update(p), p.record.shards, e.rounding)
    if ranks is not None and ranks.has_own_subspaces:
        slices = ", ".join(str(rank) for rank in ranks.slices)
        return (
            "unsynchronized basis, shards",
            f"the slices of the first update have rank {slices}, the whole update has rank {ranks.whole}",
        )
    return (
        "unexplained update",
        f"nearest: {e.detail.removeprefix('no known rule (nearest: ').removesuffix(')')}, {e.residual:.0%} left over",
    )


def _first_update(p: Parameter) -> torch.Tensor:
    """Return the first change that is not zero, without the weight decay that the group claims; in fp64."""
    decoupled = p.claim.decay if p.claim.is_decoupled is not False else 0.0
    for before, after, settings in zip(p.record.weights, p.record.weights[1:], p.record.settings):
        decay = (settings.number("lr", default=0.0) or 0.0) * decoupled
        if not torch.equal(before, after):
            return after.double() - before.double() * (1.0 - decay)
    return torch.zeros(p.record.shape, dtype=torch.float64)


def _of_matrix(p: Parameter, whole: Whole) -> Iterable[tuple[str, str]]:
    """Yield what is wrong with a parameter that should take a matrix rule."""
    e, claim = p.explanation, p.claim
    if e.rule != "orthogonalized":
        if e.rule == "sgd":
            name = "offload without orthogonalization" if whole.offload else "plain SGD under Muon's name"
            yield name, f"found {e.detail}"
        else:
            yield "another rule", f"{claim.who} says Muon, found {e.detail}"
        return
    assert e.partition is not None
    if e.partition.kind == "shards":
        yield "shard-local Newton–Schulz", f"found {e.partition.label}"
    is_fused = p.route is not None and len(p.route.blocks) > 1 and len(p.record.shape) == 2
    expected = whole.fused or claim.parts
    if is_fused and expected == "parts" and e.partition.kind == "whole":
        yield "whole QKV orthogonalized", f"found whole, expected {p.route.reason if p.route else 'parts'}"
    if e.factor == SMOOTH:
        yield "smooth cut", e.detail
    elif e.factor == UNKNOWN:
        yield "another orthogonalizer", e.detail
    elif claim.orthogonalizer is not None and e.factor != claim.orthogonalizer:
        yield "another orthogonalizer", f"{claim.orthogonalizer} expected, found {e.factor}"
    if p.route is not None and p.route.reason.startswith(("embedding", "output head", "router")):
        yield "embedding on the matrix rule", p.route.reason
    yield from _of_momentum(e, claim)


def _of_momentum(e: Explanation, claim: Claim) -> Iterable[tuple[str, str]]:
    """Yield a momentum other than the group's, if more than one update shows it."""
    if e.momentum is None or claim.momentum is None or not e.fits or len(e.fits[0].scales) < 2:
        return
    wrong_rate = abs(e.momentum.mu - claim.momentum) > 1e-9
    wrong_form = claim.nesterov is not None and e.momentum.mu > 0 and e.momentum.nesterov != claim.nesterov
    if wrong_rate or wrong_form:
        form = "" if claim.nesterov is None else ", nesterov" if claim.nesterov else ", no nesterov"
        yield "another momentum", f"momentum {claim.momentum:g}{form} expected, found {e.momentum.describe()}"


def _of_decay(p: Parameter) -> Iterable[tuple[str, str]]:
    """Yield a weight decay other than the group's."""
    e, claim = p.explanation, p.claim
    if e.coupled and claim.is_decoupled is not False:
        yield "weight decay in the gradient", f"rate {e.coupled:g}"
        return
    expected = claim.decay if not e.coupled and claim.is_decoupled is not False else 0.0
    found, error = e.decay
    # The rounding of weights is no white noise: five standard errors, and a floor for what they do not know.
    if abs(found - expected) <= max(5 * error, RATE_TOLERANCE * expected, 1e-3):
        return
    name = "another weight decay"
    lr = p.record.settings[0].number("lr", default=0.0) or 0.0
    is_lost = lr * expected < torch.finfo(p.record.weights[0].dtype).eps
    if is_lost and -5 * error <= found < expected:
        name = "weight decay rounded away"
    yield name, f"{expected:g} expected, found {found:.3g} ± {error:.1g}"


def scale_names(scale: float, shape: tuple[int, int], tolerance: float = SCALE_TOLERANCE) -> list[str]:
    """Return the documented factors that a measured one is, within the tolerance."""
    m, n = shape
    return [name for name, (_, of) in SCALES.items() if abs(scale / of(m, n) - 1) <= tolerance]


def _tolerance(e: Explanation) -> float:
    """Return the relative tolerance of measured scales."""
    return SCALE_TOLERANCE + (0.0 if e.residual < 0.02 else 0.3 * e.residual)


def _of_rate(p: Parameter, shrink: Sequence[float] | None) -> Iterable[tuple[str, str]]:
    """Yield a factor or a learning rate that is not the documented one."""
    e, claim = p.explanation, p.claim
    if shrink is not None:
        return
    fits = [fit for fit in e.fits if fit.scales]
    if fits and max(fit.spread for fit in fits) > 3 * _tolerance(e):
        rates = ", ".join(f"{s:.3g}" for s in max(fits, key=lambda fit: fit.spread).scales)
        yield "another learning rate", f"factor on lr changes from update to update: {rates}"
        return
    if e.rule in ("adamw", "sign", "sgd"):
        if e.momentum is not None and (e.rule != "sgd" or e.momentum.ema):
            return
        if abs(e.fits[0].scale - 1.0) > SCALE_TOLERANCE:
            yield "another learning rate", f"{e.fits[0].scale:.3g} times the lr of the group"
        return
    if e.rule != "orthogonalized" or e.partition is None or e.partition.kind == "shards":
        return
    for shape, fit in zip(e.shapes, e.fits):
        if not fit.scales:
            continue
        scale = fit.scale / claim.alpha
        known = scale_names(scale, shape, _tolerance(e))
        if claim.scale in (None, "rms_rank") and known:
            continue
        if claim.scale is not None and claim.scale in known:
            continue
        padded = _padding(scale, p.record.shape, shape, claim.scale)
        if padded:
            yield "padding rows change the scale", padded
            return
        if claim.scale is None and fit.scale > 0:
            yield "another scale", f"{scale:.4g} on {shape[0]}×{shape[1]} is no documented factor"
            return
        if claim.scale is not None and claim.scale in SCALES:
            formula, of = SCALES[claim.scale]
            also = f" ({SCALES[known[0]][0]})" if known else ""
            yield "another scale", f"{of(*shape):.4g} expected ({formula}), found {scale:.4g}{also}"
            return


def _padding(scale: float, whole: Sequence[int], shape: tuple[int, int], claimed: str | None) -> str | None:
    """Return a sentence if the factor is that of a matrix with more rows or columns, a multiple of a power of two."""
    m, n = shape
    for name in [claimed] if claimed in SCALES else ["rows_cols", "rms_max", "fans"]:
        of = SCALES[str(name)][1]
        for multiple in (2, 3, 4, 6, 8, 16, 32, 64, 128, 256):
            rows, columns = -(-m // multiple) * multiple, -(-n // multiple) * multiple
            for padded in ((rows, n), (m, columns), (rows, columns)):
                differs = abs(of(*padded) / of(m, n) - 1) > 0.5 * SCALE_TOLERANCE
                if padded != (m, n) and differs and abs(scale / of(*padded) - 1) < 0.01:
                    return f"{scale:.4g} is the factor of {padded[0]}×{padded[1]}, not of {m}×{n}"
    return None


def _clipped_updates(parameters: Sequence[Parameter]) -> list[float] | None:
    """Return by which factor each update was shrunk, if all matrices were shrunk alike; None if they were not."""
    ratios: list[list[float]] = []
    for p in parameters:
        e = p.explanation
        if e.rule != "orthogonalized" or e.partition is None or p.claim.kind != "matrix":
            continue
        scale = p.claim.scale if p.claim.scale in SCALES else None
        for shape, fit in zip(e.shapes, e.fits):
            if fit.scales and scale is not None:
                ratios.append([s / (p.claim.alpha * SCALES[scale][1](*shape)) for s in fit.scales])
    if len(ratios) < 2:
        return None
    count = min(len(each) for each in ratios)
    means = [sum(each[t] for each in ratios) / len(ratios) for t in range(count)]
    if not means or min(means) <= 0:
        return None
    alike = all(abs(each[t] / means[t] - 1) < 2 * SCALE_TOLERANCE for each in ratios for t in range(count))
    return means if alike and max(means) < 1 - 2 * SCALE_TOLERANCE else None


def _of_all(
    parameters: Sequence[Parameter], whole: Whole, shrink: Sequence[float] | None
) -> Iterable[Finding]:
    """Yield what only the parameters together show."""
    matrices = [p for p in parameters if p.is_hidden]
    on_rule = [p for p in parameters if p.explanation.rule in ("orthogonalized", "preset")]
    decided = [p for p in matrices if p.explanation.rule not in ("no gradient", "undecided", "still")]
    if whole.claims_matrix and whole.flat:
        flat = f"{len(whole.flat)} flat parameters, 0 matrices"
        yield Finding("flat parameters routed to AdamW", flat, whole.flat)
    elif whole.claims_matrix and decided and all(p.explanation.rule in ("adamw", "sign") for p in decided):
        rules = Counter(p.explanation.detail for p in decided)
        yield Finding(
            "no matrix routed",
            f"0 of {len(decided)} hidden matrices; they took {rules.most_common(1)[0][0]}",
            tuple(p.name for p in decided),
        )
    if shrink is not None:
        factors = ", ".join(f"{value:.3g}" for value in shrink)
        yield Finding(
            "clipping after orthogonalization",
            f"all orthogonalized updates are shrunk alike, by {factors}",
            tuple(p.name for p in on_rule),
        )
    if whole.unequal:
        yield Finding(
            "unsynchronized basis, replicas",
            f"{len(whole.unequal)} parameters differ between ranks, first {whole.unequal[0]}",
            whole.unequal,
        )
    kinds: dict[str, list[str]] = {}
    for p in matrices:
        partition = p.explanation.partition
        if (
            partition is not None
            and p.explanation.rule == "orthogonalized"
            and p.route is not None
            and len(p.route.blocks) > 1
            and len(p.record.shape) == 2
        ):
            kinds.setdefault("whole" if partition.kind == "whole" else "parts", []).append(p.name)
    if len(kinds) > 1:
        yield Finding(
            "fused projections differ",
            f"{len(kinds['whole'])} whole, {len(kinds['parts'])} by parts",
            tuple(kinds["whole"]),
        )


def _of_gradients(whole: Whole) -> Iterable[Finding]:
    """Yield what is wrong with the gradients before any rule sees them."""
    bound = whole.max_norm
    over = [norm for norm in whole.norms if bound and norm > bound * (1 + BOUND_TOLERANCE)]
    if over and not whole.clips_itself:
        yield Finding("clipping forgotten", f"received a norm of {max(over):.3g}, bound {bound:g}")
    ratios: list[float] = []
    unlike: dict[str, float] = {}
    for facts in whole.facts:
        # Clipping shrinks all gradients alike, by what it reports.
        clip = 1.0
        if facts.raw_norm and facts.max_norm:
            clip = min(1.0, facts.max_norm / (facts.raw_norm + 1e-6))
        ratios += [ratio / clip for ratio in facts.ratio.values()]
        unlike.update({name: value for name, value in facts.unlike.items() if value > 0.05})
    if unlike:
        worst = max(unlike, key=lambda name: unlike[name])
        yield Finding(
            "gradients not reduced",
            f"{worst} differs by {unlike[worst]:.0%} from the mean over ranks",
            tuple(unlike),
        )
    elif ratios:
        middle = sorted(ratios)[len(ratios) // 2]
        if middle < 1 - 0.05 and any(abs(middle * k - 1) < 0.05 for k in (2, whole.world, whole.world**2)):
            yield Finding("gradients halved", f"{middle:.3g} times the mean over ranks")
        elif middle > 1 + 0.05 and abs(middle / whole.world - 1) < 0.05:
            yield Finding("gradients summed", f"{middle:.3g} times the mean over ranks")
