"""What a rule is. A package outside this one brings its own by the entry-point group
`optbench.optimizers`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from optimizers.layouts.rows import Rows
from optimizers.options import Option
from optimizers.stacks import Axes, LowRank, Stack


class Update(NamedTuple):
    """What a rule returns for a stack; the optimizer then does W ← (1 - lr·wd)·W - lr·delta.

    Attributes:
        delta: (b, m, n) in the stack's dtype; or `LowRank`, which some layouts can send or apply without
            forming it. The optimizer may overwrite it.
        moment: (b, …) what was orthogonalized or normalized; None: the state that `Rule.observed` names.
        factor: (b, …) the orthogonal factor that was applied to it; None: the rule applies none.
        singular_values: (b, k) of `moment`, descending, where the step computed them.
        fallbacks: 0-dim int64 on the device: matrices whose factorization needed a fallback.
    """

    delta: Tensor | LowRank
    moment: Tensor | None = None
    factor: Tensor | None = None
    singular_values: Tensor | None = None
    fallbacks: Tensor | None = None


class Rule(ABC):
    """A rule. Subclasses hold no state: it lives in the stacks.

    Attributes:
        doc: one line.
        source: paper or code.
        defaults: the rule's own options with their values (plug-ins; those of the rules here are in
            `presets`). The common ones (lr, weight_decay, alpha, aux_lr …) come on their own.
        own_options: what the rule's options mean and which values they take, where `optimizers.OPTIONS` has none of
            that name. One that is left out takes values of its default's type: true or false, whole numbers, numbers.
        needs_whole: the rule has no row form: a sharded layout gives it whole matrices.
    """

    doc: ClassVar[str] = ""
    source: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    own_options: ClassVar[Sequence[Option]] = ()
    needs_whole: ClassVar[bool] = True

    @abstractmethod
    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """kind → shape of the state of one (m, n) matrix."""

    def observed(self, shape: tuple[int, int], options: Mapping[str, Any]) -> str | None:
        """Return the kind of state whose spectrum is reported: "moment", else the first one that is a matrix."""
        state = self.state(shape, options)
        matrices = [kind for kind, size in state.items() if len(size) == 2]
        return "moment" if "moment" in matrices else next(iter(matrices), None)

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """For each kind of `state`: the axis of the matrix (0 rows, 1 columns, None neither) that each of its
        dimensions runs along. Asked only of rules that have a row form."""
        raise NotImplementedError(f"{type(self).__name__} has no row form (needs_whole)")

    def factors(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """(rank, keep) of the `LowRank` updates of (m, n) matrices; None: the updates are dense."""
        return None

    def row_traffic(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Bytes that a rank sends in an ordinary step for one fp32 matrix that is split along `split`, in the
        row form; infinite without one."""
        return math.inf

    @abstractmethod
    def step(self, stacks: Sequence[Stack], rows: Rows) -> Iterable[Update]:
        """One `Update` per stack, in order. A generator keeps one stack's update in memory at a time."""

    def spectrum_of_state(self, options: Mapping[str, Any]) -> bool:
        """Whether `Update.singular_values` belong to the observed state as it is after the step."""
        return True
