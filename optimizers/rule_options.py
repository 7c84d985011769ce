"""Options that several rules share, and the presets that give them values. Nothing here imports torch.

The options of a rule are a frozen dataclass next to the rule (`optimizers.rules.sumo.SumoOptions`), built from the
families below: each field states an option's type, default, meaning and bounds once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from optimizers.options import OptionError, option


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every optimizer takes."""

    lr: float = option(1e-3, "peak learning rate of the matrix rule", minimum=0)
    weight_decay: float = option(
        0.0, "decoupled decay: the weight times 1 − lr·weight_decay", minimum=0
    )  # fmt: skip
    rounding: Literal["nearest", "stochastic", "kahan"] = option(
        "nearest",
        "how an fp32 update lands in bf16 or fp16 weights: nearest; stochastic; kahan "
        "(with a compensation of the weight's size in the state)",
    )
    seed: int = option(0, "seed of the randomized basis and of stochastic rounding", minimum=0)
    weight_decay_form: Literal["decoupled", "cautious"] = option(
        "decoupled",
        "decoupled: of every weight; cautious: only where update and weight do not have opposite signs "
        "(arXiv 2510.12402)",
    )
    weight_norm: Literal["free", "fixed", "hyperball"] = option(
        "free",
        "Frobenius norm R of each hidden matrix: free; fixed: after each step the weight is scaled back to the R it "
        "started with; hyperball: the update is given the norm R, too, so that lr is a relative step "
        "(arXiv 2606.16899)",
    )
    average_decay: float | None = option(
        None,
        "β of the average of weights that evaluation uses, too: A ← βA + (1 − β)W after each step, corrected for its "
        "start; null: none is kept",
        minimum=0,
        maximum=0.9999999,
    )
    state_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "how moments are stored: float32 (float64 for float64 weights), or bfloat16, rounded stochastically; bases "
        "stay float32",
    )

    @property
    def values(self) -> Mapping[str, Any]:
        """Option → value, read-only."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = self.active(values)
        return MappingProxyType({name: value for name, value in values.items() if name in kept})

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return every option, also those without a meaning at these values, with its default."""
        return {field.name: field.default for field in fields(cls)}

    @staticmethod
    def settled(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
        """Return the values with those that follow from others; a rule with such options overrides this.

        Args:
            values: of all options.
            given: options that the user set.
        """
        return values

    @staticmethod
    def active(values: Mapping[str, Any]) -> Collection[str]:
        """Return the options that mean something with these values; a rule with conditional options overrides this.

        The others are left out of its option values, and refused where somebody sets them.
        """
        return values.keys()

    @staticmethod
    def check(values: Mapping[str, Any]) -> None:
        """Refuse values that exclude each other; a rule with such options overrides this.

        Raises:
            OptionError: naming one of the options.
        """


@dataclass(frozen=True, kw_only=True)
class AuxRateOptions(CommonOptions):
    """What every optimizer takes that has a learning rate for hidden matrices and one for the rest."""

    aux_lr: float | None = option(
        None,
        "learning rate of AdamW on what is no hidden matrix (embeddings, output head, norms, biases); null: the same "
        "as lr",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class MatrixOptions(AuxRateOptions):
    """What every matrix rule takes, also one of another package: its scale, and the AdamW of the other parameters."""

    alpha: float = option(
        1.0, "factor on the whole matrix update (not on the weight decay)", minimum=0
    )  # fmt: skip
    update_rms: float | None = option(
        None,
        "root mean square that the update of each matrix is scaled to, before lr (AdamW's is about 0.2); it takes the "
        "place of update_scale and alpha; null: the update as the rule gives it",
        minimum=1e-6,
    )
    split_heads: bool = option(
        False, "each head of Q, K and V is a matrix of its own for the rule, also in fused projections"
    )
    matrix_modules: tuple[str, ...] | None = option(
        None,
        "hidden matrices that take the rule, by parts of their modules' names (the others take AdamW): a list such as "
        "[query, key, intermediate.dense], or sumo_glue (the choice of SUMO's public script); null or all: all of them",
    )
    aux_scheduled: bool = option(True, "a scheduler moves aux_lr too")
    aux_betas: tuple[float, float] = option((0.9, 0.95), "betas of that AdamW")
    aux_eps: float = option(1e-8, "eps of that AdamW", minimum=0)
    aux_eps_form: Literal["corrected", "raw"] = option("corrected", "as eps_form, of that AdamW")
    aux_weight_decay: float = option(0.0, "weight decay of that AdamW", minimum=0)


NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "weight_decay_form": "decoupled",
        "weight_norm": "free",
        "average_decay": None,
        "state_dtype": "float32",
        "update_rms": None,
        "split_heads": False,
        "matrix_modules": None,
    }
)
"""Options that came later, and the values under which a run is what it was before: they are no part of its identity."""


def stores_in_half(kind: str, options: Mapping[str, Any]) -> bool:
    """Return True if a state is stored in bf16: kinds whose names end in "moment", with `state_dtype` so."""
    return options.get("state_dtype") == "bfloat16" and kind.endswith("moment")


def check_common(rule: str, values: Mapping[str, Any]) -> None:
    """Refuse values of the common options that exclude each other, or that mean nothing under this rule.

    Args:
        rule: of the preset.
        values: all of its options.

    Raises:
        OptionError: naming one of the options.
    """
    norm = values["weight_norm"]
    if norm != "free" and values["weight_decay"] != 0:
        raise OptionError(
            "weight_norm",
            norm,
            f"undoes weight_decay={values['weight_decay']:g}: both set the norm of the weights",
            ("free", f"{norm} with weight_decay=0"),
        )
    if norm == "hyperball" and rule == "adamw":
        raise OptionError(
            "weight_norm",
            norm,
            "scales whole updates, which adamw computes element by element",
            ("free", "fixed", "hyperball with a matrix rule, e.g. muon"),
        )
    if norm == "hyperball" and values["update_rms"] is not None:
        raise OptionError(
            "update_rms",
            values["update_rms"],
            "and weight_norm=hyperball both set the size of the update",
            ("null", f"{values['update_rms']:g} with weight_norm=fixed"),
        )


@dataclass(frozen=True, kw_only=True)
class RefreshOptions(MatrixOptions):
    """What rules take that renew a basis every some steps."""

    refresh_interval: int = option(200, "K, steps between new subspaces", minimum=1)
    refresh_offset: int = option(
        0, "refresh when (t + offset) mod K = 0, t = 0, 1, …, and at t = 0", minimum=0
    )  # fmt: skip
    refresh_stagger: Literal[False, True, "auto"] = option(
        "auto",
        "spread the refreshes over the interval (the first one stays at t = 0): true: evenly; auto: those of matrices "
        "with a short side of 2048 or more, in 8 steps; false: all matrices in one step",
    )


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(RefreshOptions):
    """What rules in a subspace of the gradient take: the subspace and its renewal."""

    decay_order: Literal["before", "after"] = option(
        "before", "weight decay acts on the weight before or after the step"
    )
    rank: int | None = option(
        None, "r, dimension of the subspace; null: a quarter of each matrix's short side", minimum=1
    )
    refresh_threshold: float | None = option(
        None,
        "ς: a step with ‖Ĝ‖_F ≤ ς takes a new subspace too (decided on the device); null: off",
        minimum=0,
    )
    side: Literal["short", "long"] = option(
        "short",
        "side of the matrix that the moment keeps: short (Algorithm 1 of SUMO), long (GaLore std)",
    )
    basis: Literal["svd", "randomized", "random", "gaussian", "dct", "tracked", "power"] = option(
        "randomized",
        "how the subspace is found: svd (exact leading singular vectors); randomized (range finder); random "
        "(orthonormal, of normal numbers); gaussian (normal numbers of variance 1/r, for gradient_scaling); dct (the "
        "columns of the DCT-II matrix that hold most of the gradient); tracked (svd first, then one geodesic step on "
        "the Grassmannian); power (svd first, then one block power iteration)",
    )
    transport: Literal[False, True, "projection_aware"] = option(
        True,
        "carry the moment into a new subspace by R = Q_newᵀ Q_old; projection_aware: carry both of Adam's moments as "
        "the statistics that they estimate",
    )
    track_step: float = option(
        10.0,
        "η, step along the geodesic of basis=tracked; the angle is η·σ, with σ of the size of the squared gradient",
        minimum=0,
    )
    subspace_momentum: float = option(
        0.908,
        "ρ, weight of the moment in what basis=power iterates on: ρ·Q M̂ + (1 − ρ)G",
        minimum=0,
        maximum=1,
    )


@dataclass(frozen=True, kw_only=True)
class DecayOptions(MatrixOptions):
    """What rules with a moment take whose decay is μ."""

    momentum: float = option(0.95, "μ, decay of the moment", minimum=0, maximum=0.9999999)


@dataclass(frozen=True, kw_only=True)
class MomentumOptions(DecayOptions):
    """What rules with a momentum take."""

    momentum_form: Literal["sum", "ema"] = option(
        "sum", "sum: M ← μM + G; ema: M ← μM + (1 − μ)G (the same direction, another length)"
    )
    nesterov: Literal[False, True, "stored"] = option(
        False,
        "look ahead once more along the moment; stored: the look-ahead replaces the moment in the state",
    )


@dataclass(frozen=True, kw_only=True)
class PolarOptions(MatrixOptions):
    """What rules take that compute an orthogonal factor."""

    orthogonalizer: Literal[
        "auto", "svd", "qr_svd", "gram", "dwh", "newton_schulz", "cubic", "polar_express"
    ] = option("auto", "method of the polar factor; auto is exact")
    orthogonalizer_steps: int = option(
        5, "iterations of newton_schulz, cubic and polar_express", minimum=1, maximum=100
    )
    orthogonalizer_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "float32",
        "arithmetic of newton_schulz, cubic and polar_express; auto: bfloat16 where the hardware multiplies it, "
        "else float32 (written into the group at construction)",
    )


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(MatrixOptions):
    """What rules take that multiply the orthogonal factor by a number."""

    update_scale: Literal["none", "rms_max", "rows_cols", "rms_rank", "fan_ratio"] = option(
        "rms_max",
        "factor on the orthogonal part: none; rms_max 0.2·√max(m, n); rows_cols √max(1, m/n); "
        "rms_rank 0.2·√(mn/r); fan_ratio √(out/in)",
    )


@dataclass(frozen=True, kw_only=True)
class OrthogonalOptions(PolarOptions, MomentumOptions):
    """What rules that orthogonalize a momentum take."""


@dataclass(frozen=True, kw_only=True)
class ScaledOrthogonalOptions(ScaleOptions, OrthogonalOptions):
    """What rules take that orthogonalize a momentum, and multiply its factor by a number."""


@dataclass(frozen=True, kw_only=True)
class BetaOptions(CommonOptions):
    """What rules with two decay rates take."""

    betas: tuple[float, float] = option(
        (0.9, 0.95),
        "decay rates of the first and second moment (Lion: the moment's weight in the direction, and its decay)",
    )


@dataclass(frozen=True, kw_only=True)
class EpsOptions(CommonOptions):
    """What rules that divide by the root of a second moment take."""

    eps: float = option(1e-8, "added to the root of the second moment", minimum=0)


@dataclass(frozen=True, kw_only=True)
class AdamOptions(EpsOptions, BetaOptions):
    """What rules with Adam's two moments take."""


@dataclass(frozen=True, kw_only=True)
class NormalizedOrthogonalOptions(OrthogonalOptions, EpsOptions):
    """What rules take that divide the orthogonal factor by the root of its own second moment."""

    beta2: float = option(
        0.95, "decay of the second moment of the orthogonal factor", minimum=0, maximum=0.9999999
    )
    factor_rms: float = option(
        0.2, "root mean square of its elements to which the normalized factor is scaled", minimum=0
    )


class PeakRate(NamedTuple):
    """A peak learning rate that somebody used or measured.

    Attributes:
        smallest, largest: parameters of the models it holds for, inclusive.
        lr: peak learning rate.
        source: paper, script or measurement.
        tuned: the source searched for it at these sizes.
        aux_lr: peak learning rate of the AdamW next to a matrix rule; None: the preset's own.
    """

    smallest: float
    largest: float
    lr: float
    source: str
    tuned: bool = False
    aux_lr: float | None = None


# Sources of rates that several presets share.
TUNED_TINY = "tuned at 1.8M, 150 steps of 2,048 tokens (docs/benchmarks.md)"
AS_ADAMW = (
    "AdamW's value: elements of the update have AdamW's root mean square, 0.2 (arXiv 2502.16982, §2.2); "
)
CONDA_BASELINE = "baseline of Conda's C4 scripts (github.com/jie040109/Conda), GaLore protocol"


@dataclass(frozen=True)
class Preset:
    """A rule with a value for each of its options.

    Attributes:
        name: what a user writes.
        rule: module of `optimizers.rules` that computes it, or the name of an entry point.
        options: the full option values (read-only).
        doc: one line.
        source: paper and, where it differs, code.
        rates: default peak learning rates by model size; empty: the user has to give one.
        later: options that this preset got after runs of it existed, each with the values under which such a run is
            what it was: there they are no part of a run's identity.
    """

    name: str
    rule: str
    options: Mapping[str, Any]
    doc: str
    source: str
    rates: tuple[PeakRate, ...] = ()
    later: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
