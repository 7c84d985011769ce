"""Find the rule that explains the recorded updates of one parameter.

Every hypothesis (momentum form × function of the matrix × how the matrix is cut) gives a direction for each update. The
one with the smallest unexplained part wins, and is accepted if that part is within what rounding may cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.verify.watch import directions, spectral
from harness.verify.watch.claims import Claim
from harness.verify.watch.directions import Adam, Factor, Momentum
from harness.verify.watch.evidence import Evidence
from harness.verify.watch.fit import FLOOR, Fit, fit
from harness.verify.watch.partitions import Partition

MARGIN = 3.0
"""A residual is rounding if it is within so many times its measured standard deviation."""
NEARLY = 1.2
"""The claimed rule is preferred to a better one if its residual is at most so many times larger."""
SURE = 0.5
"""Above this tolerance, no residual tells two rules apart."""


@dataclass(frozen=True)
class Explanation:
    """The rule that explains a parameter's updates best.

    Attributes:
        rule: "orthogonalized", "adamw", "sgd", "sign", "preset", "still" (did not move), "no gradient", "unexplained"
            or "undecided" (rounding hides the rule).
        detail: the rule in words.
        fits: one for each matrix that the parameter was cut into.
        shapes: of these matrices, as (out, in).
        partition: how it was cut; None for a rule of elements.
        momentum: form of the momentum, where the rule has one.
        factor: the orthogonalizer.
        gradients: which gradients the rule used: "received", "raw", "clipped" or "micro-batches".
        coupled: weight decay that went through the gradient.
        residual, tolerance: unexplained part of the updates, and what rounding may cause.
        runner_up: the next best rule and its residual.
        rounding: relative rounding of the weights in these updates.
    """

    rule: str
    detail: str
    fits: tuple[Fit, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    partition: Partition | None = None
    momentum: Momentum | None = None
    factor: str | None = None
    gradients: str = "received"
    coupled: float = 0.0
    residual: float = float("nan")
    tolerance: float = float("nan")
    runner_up: tuple[str, float] = ("", float("inf"))
    rounding: float = 0.0

    @property
    def moved(self) -> bool:
        """Return True if the updates show anything about a rule."""
        return self.rule not in ("still", "no gradient", "undecided")

    @property
    def is_accepted(self) -> bool:
        """Return True if rounding explains what the rule leaves over."""
        return self.residual <= self.tolerance

    @property
    def decay(self) -> tuple[float, float]:
        """Return the decoupled decay rate over all matrices, and its standard error."""
        weights = [1.0 / max(f.decay_error, 1e-12) ** 2 for f in self.fits]
        total = sum(weights)
        if not total:
            return 0.0, float("inf")
        return sum(w * f.decay for w, f in zip(weights, self.fits)) / total, total**-0.5


GradientForms = dict[str, list[Tensor]]
Replay = Callable[[str | None], list[Tensor] | None]


def explain(
    evidence: Evidence,
    claim: Claim,
    forms: GradientForms,
    tiers: Sequence[Sequence[Partition]],
    replay: Replay,
) -> Explanation:
    """Return the best explanation of a parameter's updates.

    Args:
        evidence: of the parameter.
        claim: what its group announces; its settings are tried first.
        forms: name → gradient of each update; which of them the rule used is part of the answer.
        tiers: ways to cut the parameter into matrices; a later list is tried if the earlier ones do not explain it.
        replay: gives the change of each update by the claimed preset, or None. Its argument is the dtype in which the
            preset iterates; None: the one that is claimed.
    """
    if not evidence.changes:
        if not evidence.has_rate:
            return Explanation("undecided", "learning rate 0 in every recorded update")
        reason = (
            "no update reached the weights" if evidence.had_gradient else "no gradient in any recorded update"
        )
        return Explanation("still" if evidence.had_gradient else "no gradient", reason)
    if not evidence.had_gradient and evidence.start is None and _only_decays(evidence):
        return Explanation("no gradient", "no gradient in any recorded update, only weight decay")
    tried: list[Explanation] = []
    for tier in _tiers(evidence, claim, forms, tiers, replay):
        tried += tier
        if min(tried, key=lambda each: each.residual).is_accepted:
            break
    ranked = sorted(tried, key=lambda each: each.residual)
    best = _benefit_of_doubt(ranked, claim)
    other = next((each for each in ranked if each.rule != best.rule), None)
    if other is not None:
        best = replace(best, runner_up=(other.detail, other.residual))
    best = replace(best, rounding=evidence.rounding)
    if best.is_accepted and best.tolerance > SURE and best.residual > 0.1:
        return replace(best, rule="undecided", detail=f"rounding hides the rule (perhaps {best.detail})")
    if not best.is_accepted:
        profiled = _by_profile(evidence, claim, forms, tiers[0][0]) if claim.kind == "matrix" else None
        if profiled is not None:
            return replace(profiled, runner_up=(best.detail, best.residual))
        return replace(best, rule="unexplained", detail=f"no known rule (nearest: {best.detail})")
    return best


def _only_decays(evidence: Evidence) -> bool:
    """Return True if the weights shrink by a rate and nothing else."""
    found = evidence.judge([torch.zeros_like(g) for g in evidence.gradients])
    return found.residual <= MARGIN * evidence.rounding + 10 * FLOOR


def _by_profile(
    evidence: Evidence, claim: Claim, forms: GradientForms, whole: Partition
) -> Explanation | None:
    """Return the update as a function of the singular values that no known orthogonalizer is, if it is one."""
    last = evidence.usable[-1]
    decay = claim.decay * evidence.weights[-1]
    update = -evidence.changes[-1] / evidence.rates[-1] - decay
    for name, gradients in forms.items():
        for form in _momenta(claim, 0.0, evidence.start is not None, is_linear=False):
            moment = form(gradients, evidence.all_weights, evidence.start)[last]
            if len(whole.cut(moment)) != 1 or not bool(moment.any()):
                continue
            found = spectral.profile(whole.cut(update)[0], whole.cut(moment)[0])
            kind = spectral.kind(found)
            if kind is None:
                continue
            low, high = float(found.images.min()), float(found.images.max())
            return Explanation(
                "orthogonalized",
                f"{kind}: singular values become {low:.2f} to {high:.2f}, of {form.describe()}",
                partition=whole,
                momentum=form,
                factor=kind,
                gradients=name,
                residual=found.mixed,
                tolerance=spectral.MIXED,
                rounding=evidence.rounding,
            )
    return None


def _benefit_of_doubt(ranked: Sequence[Explanation], claim: Claim) -> Explanation:
    """Return the claimed rule if it explains the updates as well as the best one does up to noise, else the best."""
    best = ranked[0]
    for each in ranked:
        if each.residual > NEARLY * best.residual + FLOOR:
            break
        if each.is_accepted and _is_claimed(each, claim):
            return each
    return best


def _is_claimed(each: Explanation, claim: Claim) -> bool:
    kind = {"orthogonalized": "matrix", "adamw": "adamw", "sgd": "sgd", "sign": "lion", "preset": "preset"}
    if kind[each.rule] != claim.kind or bool(each.coupled) == (
        claim.is_decoupled is True and claim.decay > 0
    ):
        return False
    form = each.momentum
    if form is None:
        return True
    wanted = claim.momentum is None or form.mu == claim.momentum
    looks = claim.nesterov is None or form.mu == 0 or form.nesterov == claim.nesterov
    cut = each.partition is None or each.partition.kind in ("whole", "experts", claim.parts)
    method = claim.orthogonalizer in (None, each.factor)
    return wanted and looks and cut and method and not (each.rule == "sgd" and form.ema)


def _tiers(
    evidence: Evidence,
    claim: Claim,
    forms: GradientForms,
    tiers: Sequence[Sequence[Partition]],
    replay: Replay,
) -> Iterator[list[Explanation]]:
    """Yield explanations in groups, cheap and likely ones first."""
    if claim.kind == "preset":
        replayed = _replayed(evidence, claim, replay)
        if replayed is None:
            yield [
                Explanation(
                    "undecided", f"{claim.preset} cannot be replayed here", residual=0.0, tolerance=0.0
                )
            ]
            return
        yield [replayed]
    elementwise = [each for name, g in forms.items() for each in _elementwise(evidence, claim, name, g)]
    if len(evidence.record.shape) < 2:
        yield elementwise
        return
    for number, tier in enumerate(tiers):
        found = elementwise if number == 0 else []
        for name, gradients in forms.items():
            for partition in tier:
                found += list(_orthogonalized(evidence, claim, partition, name, gradients))
        yield found
    whole = tiers[0][0]
    if any(evidence.micro):
        yield list(_per_micro_batch(evidence, claim, whole))
    for gradients in forms.values():
        previous = [torch.zeros_like(gradients[0]), *gradients[:-1]]
        stale = list(_orthogonalized(evidence, claim, whole, "previous", previous))
        yield [replace(each, detail=f"{each.detail}, of the previous step's gradient") for each in stale]


def _replayed(evidence: Evidence, claim: Claim, replay: Replay) -> Explanation | None:
    changes = replay(None)
    if changes is None:
        return None
    # The replay's changes contain the learning rate and the decay: as directions of rate 1 they must come out as 1.
    steps = [-changes[t] for t in evidence.usable]
    found = fit(evidence.changes, steps, [torch.zeros_like(w) for w in evidence.weights], [1.0] * len(steps))
    residual = (found.residual**2 + max(abs(s - 1.0) for s in found.scales) ** 2) ** 0.5
    tolerance = MARGIN * (evidence.rounding + 4 * torch.finfo(evidence.dtype).eps) + 20 * FLOOR
    if residual > tolerance:
        # An iteration in bf16 rounds nearly all numbers as it does in the run. One that it rounds the other way changes
        # the update by a part of what bf16 changes it by.
        tolerance += _apart(changes, replay("float32"), evidence.usable)
    return Explanation(
        "preset", f"preset {claim.preset}", (found,), (), residual=residual, tolerance=tolerance
    )


def _apart(changes: Sequence[Tensor], others: Sequence[Tensor] | None, usable: Sequence[int]) -> float:
    """Return how far two replays are apart, relative to the changes: root mean square over the usable updates, fp64."""
    if others is None:
        return 0.0
    apart = [
        float((changes[t] - others[t]).double().square().sum())
        / max(float(changes[t].double().square().sum()), 1e-300)
        for t in usable
    ]
    return (sum(apart) / max(len(apart), 1)) ** 0.5


def _elementwise(
    evidence: Evidence, claim: Claim, name: str, gradients: list[Tensor]
) -> Iterator[Explanation]:
    """Yield AdamW, momentum SGD and sign rules."""
    tolerance = (
        MARGIN * (evidence.rounding**2 + (4 * torch.finfo(evidence.dtype).eps) ** 2) ** 0.5 + 10 * FLOOR
    )

    def judged(
        rule: str, detail: str, candidate: list[Tensor], coupled: float, form: Momentum | None = None
    ) -> Explanation:
        found = evidence.judge(candidate)
        return Explanation(
            rule,
            detail,
            (found,),
            momentum=form,
            gradients=name,
            coupled=coupled,
            residual=found.residual,
            tolerance=tolerance,
        )

    weights = evidence.all_weights
    for coupled in _couplings(claim):
        l2 = ", L2 decay in the gradient" if coupled else ""
        for betas in dict.fromkeys((claim.betas, (0.9, 0.999), (0.9, 0.95))):
            for raw in (False, True):
                adam = Adam(betas, claim.eps, coupled, raw)
                detail = f"AdamW β {betas[0]:g}, {betas[1]:g}{l2}"
                yield judged("adamw", detail, adam(gradients, weights, evidence.state), coupled)
        for form in _momenta(claim, coupled, evidence.start is not None, is_linear=True):
            moments = form(gradients, weights, evidence.start)
            yield judged("sgd", f"SGD, {form.describe()}{l2}", moments, coupled, form)
            signs = [moment.sign() for moment in moments]
            yield judged("sign", f"sign of the gradient, {form.describe()}{l2}", signs, coupled, form)
    for betas in dict.fromkeys((claim.betas, (0.9, 0.99))):
        yield judged(
            "sign",
            f"Lion β {betas[0]:g}, {betas[1]:g}",
            directions.lion(betas, gradients, evidence.state),
            0.0,
        )


def _couplings(claim: Claim) -> list[float]:
    return [0.0, claim.decay] if claim.decay else [0.0]


def _momenta(claim: Claim, coupled: float, has_start: bool, is_linear: bool) -> Iterator[Momentum]:
    """Yield momentum forms, those that the group announces first.

    From a zero state, a sum and an average of gradients differ by a factor only, which an orthogonalized update does
    not show; with a look-ahead both are (1 - μ)G + μM of their own M.
    """
    rates = [claim.momentum] if claim.momentum is not None else []
    forms = (False, True) if has_start or is_linear else (False,)
    for mu in dict.fromkeys((*rates, 0.95, 0.9)):
        for nesterov in (True, False):
            for ema in forms:
                yield Momentum(mu, nesterov, ema, coupled)
    yield Momentum(0.0, False, False, coupled)


def _orthogonalized(
    evidence: Evidence, claim: Claim, partition: Partition, name: str, gradients: list[Tensor]
) -> Iterator[Explanation]:
    """Yield every orthogonalizer on every momentum form, with the matrix cut in one way."""
    known = directions.factors(claim.steps)
    first = claim.orthogonalizer
    order = sorted(known, key=lambda key: key != first) if first else list(known)
    if partition.kind in ("heads", "shards"):
        order = list(dict.fromkeys((order[0], "newton_schulz", "svd")))
    for coupled in _couplings(claim):
        moments = {
            form: form(gradients, evidence.all_weights, evidence.start)
            for form in _momenta(claim, coupled, evidence.start is not None, is_linear=False)
        }
        # One update decides which orthogonalizers are worth a look at all of them.
        probe = next((t for t in evidence.usable if bool(gradients[t].any())), evidence.usable[0])
        screened: list[tuple[float, Momentum, str]] = []
        # From a zero state, the first direction is the gradient in every form.
        is_same = evidence.start is None and not coupled and not any(bool(g.any()) for g in gradients[:probe])
        seen: dict[str, float] = {}
        for form, moment in moments.items():
            for key in order:
                if not is_same or key not in seen:
                    direction = _applied(known[key].exact, partition, moment[probe])
                    found = _fit_blocks(evidence, partition, {probe: direction}, [probe])
                    seen[key] = _together(found, evidence, partition, [probe])
                screened.append((seen[key], form, key))
        best = min(residual for residual, _, _ in screened)
        for residual, form, key in screened:
            if residual <= 2.0 * best + 0.02:
                yield _judged(evidence, claim, partition, name, moments[form], form, known[key], coupled)


def _judged(
    evidence: Evidence,
    claim: Claim,
    partition: Partition,
    name: str,
    moment: list[Tensor],
    form: Momentum,
    factor: Factor,
    coupled: float,
) -> Explanation:
    picked = {t: _applied(factor.exact, partition, moment[t]) for t in evidence.usable}
    fits = _fit_blocks(evidence, partition, picked, evidence.usable)
    residual = _together(fits, evidence, partition, evidence.usable)
    floor = _floor(
        factor, partition, moment[evidence.usable[-1]], picked[evidence.usable[-1]], evidence.dtype
    )
    tolerance = MARGIN * (evidence.rounding**2 + floor**2) ** 0.5 + 10 * FLOOR
    blocks = partition.cut(evidence.changes[0])
    shapes = [(b.shape[1], b.shape[0]) if partition.transposed else (b.shape[0], b.shape[1]) for b in blocks]
    cut = "" if partition.kind == "whole" else f", {partition.label}"
    l2 = ", L2 decay in the gradient" if coupled else ""
    return Explanation(
        "orthogonalized",
        f"{factor.name} of {form.describe()}{cut}{l2}",
        tuple(fits),
        tuple(shapes),
        partition,
        form,
        factor.name,
        name,
        coupled,
        residual,
        tolerance,
    )


def _applied(function: Callable[[Tensor], Tensor], partition: Partition, moment: Tensor) -> list[Tensor]:
    return [function(block.contiguous()) for block in partition.cut(moment)]


def _fit_blocks(
    evidence: Evidence, partition: Partition, picked: dict[int, list[Tensor]], updates: Sequence[int]
) -> list[Fit]:
    """Return one fit for each matrix."""
    at = [evidence.usable.index(t) for t in updates]
    changes = [partition.cut(evidence.changes[i]) for i in at]
    weights = [partition.cut(evidence.weights[i]) for i in at]
    rates = [evidence.rates[i] for i in at]
    fits = []
    for block in range(len(changes[0])):
        moved = [c[block] for c in changes]
        if all(bool(m.any()) for m in moved):
            fits.append(fit(moved, [picked[t][block] for t in updates], [w[block] for w in weights], rates))
        else:
            fits.append(Fit((), 0.0, float("inf"), 0.0))
    return fits


def _together(fits: Sequence[Fit], evidence: Evidence, partition: Partition, updates: Sequence[int]) -> float:
    """Return the residual of all matrices of a parameter, weighted by their share of the updates."""
    at = [evidence.usable.index(t) for t in updates]
    shares = torch.zeros(len(fits), dtype=torch.float64)
    for i in at:
        sizes = torch.tensor([float(b.double().square().sum()) for b in partition.cut(evidence.changes[i])])
        shares += sizes / sizes.sum().clamp_min(1e-300)
    shares /= len(at)
    return float(sum(share * found.residual**2 for share, found in zip(shares.tolist(), fits))) ** 0.5


def _floor(
    factor: Factor, partition: Partition, moment: Tensor, exact: list[Tensor], dtype: torch.dtype
) -> float:
    """Return the relative difference that a correct implementation may show: measured, not assumed.

    Newton–Schulz in bf16 is compared with the same in fp32, and a moment that is rounded to the gradients' dtype with
    one that is not: small singular values amplify both.
    """
    unit = torch.finfo(dtype).eps / 2
    noise = torch.Generator().manual_seed(0)
    shift = torch.rand(moment.shape, generator=noise, dtype=torch.float64).to(moment) * 2 - 1
    disturbed = moment * (1 + 2 * unit * shift)
    twins = _applied(factor.exact, partition, disturbed)
    total = _distance(twins, exact) ** 2
    if factor.rounded is not None:
        total += _distance(_applied(factor.rounded, partition, moment.float()), exact) ** 2
    return total**0.5


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    error = sum(float((x.to(y) - y).square().sum()) for x, y in zip(a, b))
    size = sum(float(y.square().sum()) for y in b)
    return (error / size) ** 0.5 if size else 0.0


def _per_micro_batch(evidence: Evidence, claim: Claim, partition: Partition) -> Iterator[Explanation]:
    """Yield Newton–Schulz of a momentum that advances with every micro-batch, by what has accumulated so far."""
    factor = directions.factors(claim.steps)[claim.orthogonalizer or "newton_schulz"]
    sequence: list[Tensor] = []
    ends: list[int] = []
    for gradient, partial in zip(evidence.gradients, evidence.micro):
        sequence += partial[:-1] if partial else []
        sequence.append(gradient)
        ends.append(len(sequence) - 1)
    weights = [torch.zeros_like(sequence[0])] * len(sequence)
    for form in _momenta(claim, 0.0, evidence.start is not None, is_linear=False):
        moment = form(sequence, weights, evidence.start)
        found = _judged(
            evidence, claim, partition, "micro-batches", [moment[end] for end in ends], form, factor, 0.0
        )
        yield replace(found, detail=f"{found.detail}, advanced with every micro-batch")
