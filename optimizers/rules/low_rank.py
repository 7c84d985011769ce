"""The low-rank family: a basis, an inner rule, what becomes of the rest of the gradient, a scale. Each is an option.

    Q ← basis                                  every K steps, with the moments carried over (`transport`)
    Ĝ = QᵀG        N = inner rule of Ĝ         orthogonalize: s·(MMᵀ)^(-1/2)M   adam: M̂/(√V̂ + ε)   sign: sign(M)
    W ← W - η α (Q N + residual)               drop: 0   sgd: ρ(G - QĜ)   scaled: ρ φ·(G - QĜ), φ = ‖N‖/‖Ĝ‖ by channel
    W ← W - η α φ·G                            with `gradient_scaling`: the subspace gives only the size

The files next to this one (`optimizers.rules.sumo`, `galore`, `fira`, `apollo`, `ldadam`, `gum`, `subtrack`,
`dct_subspace`) name the published members of the family, with equations and sources.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimizers.options import OptionError, option, option_word
from optimizers.rule import Axes, Rule
from optimizers.rule_options import AdamOptions, LowRankOptions, Preset, ScaledOrthogonalOptions
from optimizers.rules import parts

if TYPE_CHECKING:
    from optimizers.interfaces import MatrixBatch, Steps, Update


class LowRankRule(Rule):
    """The composed rule; its options say which one."""

    needs_whole: ClassVar[bool] = False

    def update(self, b: MatrixBatch) -> Steps[Update]:
        """Take one step; see the module's formula."""
        if b.options["error_feedback"]:
            b.feed_back("error")  # G below is G + E
        carried = parts.CarriedMoment(b)
        yield from parts.refresh(b)
        carried.after_refresh()
        q = parts.basis(b)
        g = yield parts.project(b, q)
        yield from parts.record_projected_norm(b, g)
        if b.options["residual"] == "unbiased":
            return parts.sampled_full_rank(b, q, g)
        step = yield from parts.inner_step(b, g)
        if b.options["error_feedback"]:
            parts.keep_error(b, q, g, carried)
        delta = yield from parts.compose(b, q, g, step)
        return parts.Update(delta, step.moment, step.factor, step.singular_values, step.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return r(m + n) numbers; r·long more with Adam, mn with error feedback, one for each norm that is remembered.

        A DCT basis is r numbers. With `residual` unbiased the moment has mn.
        """
        state = parts.subspace_state(shape, options)
        if options["inner"] == "adam":
            state["second_moment"] = state["moment"]
        if options["error_feedback"]:
            state["error"] = shape
        if options["norm_growth_limit"] is not None:
            state["previous_norm"] = ()
        if options["refresh_threshold"] is not None:
            state["projected_norm"] = ()
        return state

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return the axes of basis and moments; a norm is one number for the whole matrix."""
        axes = parts.subspace_axes(shape, options)
        return {
            **axes,
            "second_moment": axes["moment"],
            "error": (0, 1),
            "previous_norm": (),
            "projected_norm": (),
        }

    def low_rank_form(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """Return the rank and factor of αρG + Q(N - αρĜ); None where the whole update is scaled or has to be formed."""
        is_dense = options["residual"] in ("scaled", "unbiased") or options["gradient_scaling"] != "none"
        limits = parts.limits_growth(options, "residual") or parts.limits_growth(options, "total")
        if is_dense or limits:
            return None
        return parts.rank_of(shape, options), options["alpha"] * options["residual_scale"]

    def sharded_step_bytes(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return the bytes of Ĝ where Q contracts the split axis; else of what the inner rule sums or gathers."""
        return parts.step_traffic(shape, split, options, ranks)

    def state_holds_spectrum(self, options: Mapping[str, Any]) -> bool:
        """Return False with a look-ahead that is not stored."""
        return options.get("nesterov") is not True


RULE = LowRankRule()

_ORTHOGONAL = ("orthogonalizer", "orthogonalizer_steps", "orthogonalizer_dtype", "update_scale")
_MOMENTUM = ("momentum", "momentum_form", "nesterov")
_ADAM = ("betas", "eps", "eps_form")
_OF_INNER = {"orthogonalize": (*_MOMENTUM, *_ORTHOGONAL), "adam": _ADAM, "sign": _MOMENTUM}


@dataclass(frozen=True, kw_only=True)
class ComposedOptions(ScaledOrthogonalOptions, AdamOptions, LowRankOptions):
    """Every option of the family; which of them a rule has depends on `inner`, `basis` and `residual`."""

    inner: Literal["orthogonalize", "adam", "sign"] = option(
        "orthogonalize",
        "what becomes of the projected gradient: orthogonalize (factor of its momentum), adam, sign (of its momentum)",
    )
    eps_form: Literal["corrected", "raw"] = option(
        "corrected",
        "corrected: √v̂ + eps (torch); raw: √v + eps before bias correction (Hugging Face, galore-torch)",
    )
    residual: Literal["drop", "sgd", "scaled", "unbiased"] = option(
        "sgd",
        "the gradient outside the subspace, G − QQᵀG: drop; sgd (times residual_scale); scaled (by channel as Adam "
        "scaled the gradient inside); unbiased (a period in full rank with full_rank_probability)",
    )
    residual_scale: float = option(
        1.0, "factor on the gradient outside the subspace, G − QQᵀG (0: dropped)", minimum=0
    )
    full_rank_probability: float = option(
        0.1, "q, probability of a full-rank period with residual=unbiased", minimum=1e-9, maximum=0.999999999
    )
    gradient_scaling: Literal["none", "channel", "tensor"] = option(
        "none",
        "step along the whole gradient, scaled by ‖N‖/‖Ĝ‖ of each channel or of the matrix, instead of along Q N",
    )
    error_feedback: Literal[False, "gradient", "generalized"] = option(
        False,
        "add what the last steps left out to the gradient: gradient: G − QQᵀG; generalized: and what the moment lost "
        "at a refresh",
    )
    norm_growth_limit: float | None = option(
        None, "γ: the target's norm grows at most by this factor a step; null: off", minimum=1
    )
    norm_growth_target: Literal["factor", "residual", "total"] = option(
        "factor", "what γ limits: the orthogonal factor O, the residual G − QQᵀG, or the whole update"
    )

    @staticmethod
    def settled(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
        """Let `residual` and `residual_scale` agree: a residual is dropped exactly where its factor is 0."""
        residual, factor = values["residual"], values["residual_scale"]
        if residual == "drop" and factor != 0 and "residual_scale" in given and "residual" not in given:
            residual = "sgd"
        elif residual == "drop" and not {"residual", "residual_scale"} <= {*given}:
            factor = 0.0
        elif (
            factor == 0 and residual == "sgd" and not ("residual" in given and "residual_scale" not in given)
        ):
            residual = "drop"
        elif factor == 0 and "residual_scale" not in given:
            factor = 1.0
        return {**values, "residual": residual, "residual_scale": factor}

    @staticmethod
    def active(values: Mapping[str, Any]) -> Collection[str]:
        """Leave out the options of other inner rules, bases and residuals."""
        others = {name for names in _OF_INNER.values() for name in names} - {*_OF_INNER[values["inner"]]}
        if values["basis"] != "tracked":
            others.add("track_step")
        if values["basis"] != "power":
            others.add("subspace_momentum")
        if values["residual"] != "unbiased":
            others.add("full_rank_probability")
        return values.keys() - others

    @staticmethod
    def check(values: Mapping[str, Any]) -> None:
        """Refuse combinations without a meaning, with the nearest one that has one.

        Raises:
            OptionError: naming the option.
        """
        for is_wrong, key, reason, nearest in _conflicts(values):
            if is_wrong:
                raise OptionError(key, option_word(values[key]), reason, nearest)


Conflict = tuple[bool, str, str, tuple[str, ...]]
"""(applies, option, reason, what is nearest) of a combination that would mean nothing."""


def _conflicts(v: Mapping[str, Any]) -> list[Conflict]:
    """Return what can be without a meaning, in the order in which it is refused."""
    return [
        *_residual_conflicts(v),
        *_scaling_conflicts(v),
        *_basis_conflicts(v),
        *_feedback_conflicts(v),
        *_growth_conflicts(v),
    ]


def _residual_conflicts(v: Mapping[str, Any]) -> list[Conflict]:
    inner, residual, transport = v["inner"], v["residual"], v["transport"]
    return [
        (
            residual == "scaled" and inner != "adam",
            "residual",
            f"takes its size from Adam's output over its input, which inner={inner} does not have",
            ("scaled with inner=adam", "sgd"),
        ),
        (
            residual == "unbiased" and inner != "orthogonalize",
            "residual",
            f"orthogonalizes the whole moment in a full-rank period, which inner={inner} does not do",
            ("unbiased with inner=orthogonalize", "sgd"),
        ),
        (
            residual == "drop" and v["residual_scale"] != 0,
            "residual_scale",
            "is the factor on a residual that residual=drop leaves out",
            ("0", f"{v['residual_scale']:g} with residual=sgd"),
        ),
        (
            residual == "unbiased" and v["residual_scale"] != 1,
            "residual_scale",
            "has no part in residual=unbiased, whose factors follow from full_rank_probability",
            ("1", f"{v['residual_scale']:g} with residual=sgd"),
        ),
        (
            residual == "unbiased" and transport is not False,
            "transport",
            "carries a moment over, and with residual=unbiased each period starts with a new one",
            ("false",),
        ),
    ]


def _scaling_conflicts(v: Mapping[str, Any]) -> list[Conflict]:
    inner, residual, scaling = v["inner"], v["residual"], v["gradient_scaling"]
    return [
        (
            scaling != "none" and inner != "adam",
            "gradient_scaling",
            f"is the ratio of Adam's output to its input, which inner={inner} does not have",
            (f"{scaling} with inner=adam", "none"),
        ),
        (
            scaling != "none" and residual != "drop",
            "residual",
            f"is part of the whole gradient already, which gradient_scaling={scaling} steps along",
            ("drop",),
        ),
    ]


def _basis_conflicts(v: Mapping[str, Any]) -> list[Conflict]:
    inner, basis, scaling, transport = v["inner"], v["basis"], v["gradient_scaling"], v["transport"]
    return [
        (
            basis == "gaussian" and scaling == "none",
            "basis",
            "is not orthonormal: it keeps norms, but nothing can be brought back from its subspace",
            ("random", "gaussian with gradient_scaling=channel or tensor"),
        ),
        (
            basis == "gaussian" and transport is not False,
            "transport",
            "needs orthonormal bases, and basis=gaussian is a new matrix of random numbers each time",
            ("false", f"{option_word(transport)} with basis=random"),
        ),
        (
            basis == "power" and inner != "adam",
            "basis",
            f"iterates on Adam's first moment and the gradient; inner={inner} has no bias-corrected one",
            ("randomized (it starts from the last basis, too)", "power with inner=adam"),
        ),
        (
            transport == "projection_aware" and inner != "adam",
            "transport",
            f"carries Adam's two moments, and inner={inner} has one",
            ("true",),
        ),
    ]


def _feedback_conflicts(v: Mapping[str, Any]) -> list[Conflict]:
    inner, residual, scaling, feedback, transport = (
        v["inner"],
        v["residual"],
        v["gradient_scaling"],
        v["error_feedback"],
        v["transport"],
    )
    return [
        (
            bool(feedback) and (residual != "drop" or scaling != "none"),
            "error_feedback",
            "adds the residual to the next gradient, and this step uses it already",
            ("false", f"{feedback} with residual=drop and gradient_scaling=none"),
        ),
        (
            feedback == "generalized" and (inner != "adam" or transport is False),
            "error_feedback",
            "corrects what Adam's first moment loses when it is carried over",
            ("gradient", "generalized with inner=adam and transport=projection_aware"),
        ),
    ]


def _growth_conflicts(v: Mapping[str, Any]) -> list[Conflict]:
    inner, residual, scaling, target = (
        v["inner"],
        v["residual"],
        v["gradient_scaling"],
        v["norm_growth_target"],
    )
    limits = v["norm_growth_limit"] is not None
    return [
        (
            limits and target == "residual" and (residual == "drop" or v["residual_scale"] == 0),
            "norm_growth_target",
            "limits nothing where residual_scale is 0",
            ("total", "residual with residual=sgd"),
        ),
        (
            limits and target == "factor" and inner != "orthogonalize",
            "norm_growth_target",
            f"limits the orthogonal factor, which inner={inner} has not",
            ("residual", "total"),
        ),
        (
            limits and residual == "scaled" and target != "residual",
            "norm_growth_target",
            "is not limited by Fira's rule, which limits the scaled residual",
            ("residual",),
        ),
        (
            limits and scaling != "none" and target != "total",
            "norm_growth_target",
            f"does not exist with gradient_scaling={scaling}, where the update is one scaled gradient",
            ("total",),
        ),
        (
            limits and residual == "unbiased",
            "norm_growth_limit",
            "compares norms of neighbouring steps, and with residual=unbiased the rank changes between periods",
            ("null",),
        ),
    ]


PRESETS: tuple[Preset, ...] = ()
