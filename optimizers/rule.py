"""What a matrix rule is. Importing it does not import torch, so that a rule's options are read without."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from optimizers.options import Option

if TYPE_CHECKING:
    from optimizers.interfaces import MatrixBatch, Steps, Update

Axes = tuple[int | None, ...]
"""For each dimension of a state: the axis of the matrix that it runs along (0 rows, 1 columns), or None."""


class Rule(ABC):
    """How a batch of matrices moves. A subclass holds no state: that lives in the batches.

    Attributes:
        doc: one line.
        source: paper or code.
        defaults: a rule of another package names its options here, with their values; a rule here has a dataclass.
            The common ones (lr, weight_decay, alpha, aux_lr …) come on their own.
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
        """Return kind → shape of the state of one (m, n) matrix."""

    @abstractmethod
    def update(self, b: MatrixBatch) -> Update | Steps[Update]:
        """Advance the state of a batch and return its `Update`; as a generator where it yields requests.

        All ranks must yield the same sequence of requests, whatever their data.
        """

    def observed(self, shape: tuple[int, int], options: Mapping[str, Any]) -> str | None:
        """Return the kind of state whose spectrum is reported: "moment", else the first one that is a matrix."""
        state = self.state(shape, options)
        matrices = [kind for kind, size in state.items() if len(size) == 2]
        return "moment" if "moment" in matrices else next(iter(matrices), None)

    def state_holds_spectrum(self, options: Mapping[str, Any]) -> bool:
        """Return True if `Update.singular_values` belong to the observed state as it is after the step."""
        return True

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return, for each kind of `state`, the axis of the matrix that each of its dimensions runs along.

        Asked only of rules that have a row form.
        """
        raise NotImplementedError(f"{type(self).__name__} has no row form (needs_whole)")

    def low_rank_form(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """Return (rank, keep) of the `LowRank` updates of (m, n) matrices; None: the updates are dense."""
        return None

    def sharded_step_bytes(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return the bytes that a rank sends in an ordinary step for one fp32 matrix that is split along `split`.

        In the row form; infinite without one.
        """
        return math.inf
