"""Interfaces between the training loop and the packages around it, which do not import each other. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from optimizers.layouts.layout import Layout as ParameterLayout

    MicroBatch = tuple[torch.Tensor, ...]
    """The tensors of ``micro_batch_size`` samples, whose meaning the task's `Objective` knows."""

Put = Callable[[str, "torch.Tensor"], None]
"""Take the name of a parameter or buffer and its whole value on the CPU, which is gone after the call."""

MetricRow = dict[str, float | int | None]
"""One row of metrics.jsonl: metric key → value."""

MOMENT_FIGURES = ("condition_number", "effective_rank", "stable_rank", "orthogonality_error", "polar_error")
"""What is measured of each matrix' moment; metric keys and columns of moments.parquet bear these names."""

WeightLayout = Literal["replicated", "sharded", "partitioned"]
"""How weights are held when the optimizer steps: whole on every process, as DTensors, or as DeepSpeed's flat slices."""


class WeightSource(Protocol):
    """The numbers of a model on the meta device; `harness.model.InitialWeights` has them."""

    def deliver(self, put: Put) -> None:
        """Hand over every parameter and buffer once, tied ones under their first name."""
        ...


class Engine(Protocol):
    """One process' view of the training processes.

    Every process calls every method in the same order: several of them are collectives. In the order of a run:
    `shard`, build the optimizer, `prepare`; then per step `micro_step`, `autocast` and `backward` for each
    micro-batch, and `step`.
    """

    name: str
    layout: WeightLayout
    """How the weights are held when the optimizer steps."""
    rank: int
    world_size: int
    shards: int
    """Processes over which `shard` cuts one copy of the weights; 1 where it does nothing."""
    device: torch.device
    forward_is_local: bool
    """True if forward passes communicate nothing, so that their time is this process' own."""
    model: nn.Module
    """The model as it must be called in the forward pass."""

    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """Return the group over which weights are replicated; None for one process, and where weights are cut."""
        ...

    def shard(
        self,
        model: nn.Module,
        axes: Mapping[str, int],
        blocks: Sequence[nn.Module],
        weights: WeightSource | None = None,
    ) -> None:
        """Cut the model where the optimizer is to be built on shards, and put this process' part on `device`.

        Args:
            model: the same on every process; on the meta device, or whole on any other.
            axes: parameter name → axis to cut it along; 0 for names that are not in it.
            blocks: modules of the model whose weights are gathered together, such as its decoder layers.
            weights: numbers of a model on the meta device; None: it has them.
        """
        ...

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take over the model and the optimizer."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Compute the enclosed forward pass in mixed precision, where the run asks for it."""
        ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Enclose forward and backward of one micro-batch; after the ``last`` one the gradients are reduced (means)."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this micro-batch's loss (0-dim)."""
        ...

    def force_skip(self, where: torch.Tensor) -> None:
        """Make the next `step` skip its update where a flag is set, by a non-finite gradient.

        Args:
            where: 0-dim bool on `device`, equal on all processes; the host does not wait for it.
        """
        ...

    def step(self, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Unscale and clip the gradients, then make one optimizer step.

        Where a gradient is not finite anywhere, weights and state stay untouched on all processes.

        Args:
            max_norm: of the global gradient; None: no clipping.

        Returns:
            The global gradient norm before clipping, and 1.0 where it is not finite (else 0.0): 0-dim fp32
            tensors on `device`, equal on all processes.
        """
        ...

    def undo_step_counters(self) -> None:
        """Take back what the host counted in the last step, which turned out to be skipped."""
        ...

    def inference(self) -> AbstractContextManager[nn.Module]:
        """Give what to call in forward passes without gradients, as often on every process."""
        ...

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the processes (a copy)."""
        ...

    def max(self, value: torch.Tensor) -> torch.Tensor:
        """Return the maximum over the processes (a copy)."""
        ...

    def reduce_flags(self, flags: torch.Tensor) -> Callable[[], list[float]]:
        """Start a maximum over the processes without blocking; calling the result waits for it.

        Args:
            flags: 1-D, 0.0 or 1.0 each.
        """
        ...

    def measure_communication(self, on: bool) -> None:
        """Measure in the next step what `exposed_communication` returns, or not; issues no collectives."""
        ...

    def exposed_communication(self) -> float | None:
        """Return the seconds of gradient communication that computation did not hide in the last step, if measured."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Return the bytes of "weights" (with buffers and master copies) and "gradients" on this process."""
        ...

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Return whole weights by name on rank 0, nothing elsewhere: fp32 copies on the CPU (a collective)."""
        ...

    def set_collective_timeout(self) -> None:
        """Limit the wait of every collective to ``engine.timeout_s``; called once everything is prepared."""
        ...

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name, as they are between steps."""
        ...

    def parameter_layout(self) -> ParameterLayout:
        """Return how the processes hold the trainable parameters, for optimizers (plug-ins) that do not know."""
        ...

    def sync_from_masters(self) -> None:
        """Update what the engine derives from the weights after they were overwritten (a collective)."""
        ...

    def warm_up(self, step: Callable[[], object]) -> None:
        """Run forward and backward once where an engine fixes its order of summation in the first step (a collective).

        What follows then adds up in the order of a run that is under way. The gradients of ``step`` are dropped.
        """
        ...

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scale and what decides when it changes; empty without loss scaling."""
        ...

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Continue from what `scaler_state` returned; an empty state changes nothing."""
        ...

    def release(self) -> None:
        """Undo what the engine did to this process, which stays in the process group and may start another one."""
        ...

    def close(self) -> None:
        """Release, wait for the others and leave the process group."""
        ...


class Losses(NamedTuple):
    """The losses of one forward pass: 0-dim sums over its loss tokens.

    Attributes:
        objective: what is differentiated.
        loss: the loss that is reported, nats for cross-entropy.
        aux: load-balancing loss before its coefficient; None where the model has none.
    """

    objective: torch.Tensor
    loss: torch.Tensor
    aux: torch.Tensor | None


class Objective(Protocol):
    """What a run minimizes: from a micro-batch to the inputs of the model, and from its outputs to losses."""

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward pass, in training and evaluation."""
        ...

    def losses(self, outputs: Any, batch: MicroBatch) -> Losses:
        """Return the training losses of a forward pass."""
        ...

    def validation_sums(self, outputs: Any, batch: MicroBatch) -> torch.Tensor:
        """Return the validation loss and its number of loss tokens as sums, ``(2,)`` fp64."""
        ...


class Samples(Protocol):
    """The training samples of a run by number: sample n depends on data, seed and n alone.

    Attributes:
        length: samples of an epoch.
    """

    length: int

    def rows(self, first: int, count: int) -> tuple[np.ndarray, ...]:
        """Return the samples ``first`` … ``first + count - 1`` as the arrays of one micro-batch."""
        ...

    def loss_tokens(self, first: int, count: int) -> int:
        """Return what the loss sum of these samples is divided by: tokens with a loss, or examples."""
        ...

    def tokens(self, first: int, count: int) -> int:
        """Return the tokens of these samples that count as trained on, padding not included."""
        ...


class Evaluator(Protocol):
    """What a task measures on its validation data."""

    def figures(self, *, is_last: bool) -> dict[str, float]:
        """Return metric key → value of the weights as they are, "val/loss" among them (a collective).

        Args:
            is_last: of the run, where results of single examples are kept.
        """
        ...


class BatchLoader(Protocol):
    """This process' share of the samples of every step."""

    def micro_batches(self, step: int) -> Sequence[MicroBatch]:
        """Return this process' micro-batches of a step, on its device."""
        ...

    def loss_tokens(self, step: int) -> int:
        """Return what the loss sum of the global batch of a step is divided by, without communication."""
        ...

    def tokens(self, step: int) -> int:
        """Return the tokens of the global batch of a step, padding not included, without communication."""
        ...

    def epoch(self, step: int) -> float:
        """Return the passes over the training split after a step."""
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...


class LogitCollector(Protocol):
    """What collects the largest attention logits of a step's forward passes for an optimizer that clips by them."""

    def begin(self) -> None:
        """Forget those of the last step."""
        ...

    def give(self, optimizer: torch.optim.Optimizer) -> None:
        """Give them to the optimizer before its step (a collective)."""
        ...


class Probe(Protocol):
    """A measurement at some steps. It runs on every process, so it may issue collectives."""

    def due(self, step: int) -> bool:
        """Return True if this step needs a row with this probe's keys; the same on all processes."""
        ...

    def before_update(self, step: int) -> None:
        """Prepare the measurement right before the optimizer step of a step that is due."""
        ...

    def measure(self, step: int, row: MetricRow) -> None:
        """Add keys to the row of a step that is due."""
        ...

    def state(self) -> dict[str, Any]:
        """Return, as JSON, what the probe needs to continue in another process."""
        ...

    def restore(self, state: dict[str, Any], steps: int) -> str | None:
        """Continue from `state` as it was after ``steps`` steps; return one line on files that are lost, or None."""
        ...


class Sink(Protocol):
    """A destination of rows, on rank 0 alone."""

    def write(self, row: MetricRow) -> None:
        """Take one row. Must not raise for reasons outside of this machine."""
        ...


class CheckpointManager(Protocol):
    """The checkpoints of a run. Every process calls each method at the same points of the loop."""

    @property
    def is_wanted(self) -> bool:
        """True if this process wants a checkpoint now. Does not block."""
        ...

    @property
    def is_writing(self) -> bool:
        """True while this process writes a checkpoint. Does not block."""
        ...

    @property
    def problem(self) -> str:
        """Why the last step is not on the disk, one line; "" where it is, or where nobody asked for it."""
        ...

    def before_step(self) -> None:
        """Note the random states before a step draws numbers."""
        ...

    def after_step(self, *, wanted: bool, writing: bool) -> None:
        """Save where it is due.

        Args:
            wanted: any process wanted a checkpoint, up to two steps ago.
            writing: any process was writing one, up to two steps ago.
        """
        ...

    def stop(self) -> None:
        """Save the steps that are done, because the run is asked to stop before its end."""
        ...

    def finish(self) -> None:
        """Save the last step, also that of a run that diverged."""
        ...


class NoCheckpoints:
    """A `CheckpointManager` that writes nothing."""

    is_wanted = False
    is_writing = False
    problem = ""

    def before_step(self) -> None:
        """Do nothing: no checkpoint is written."""

    def after_step(self, *, wanted: bool, writing: bool) -> None:
        """Do nothing: no checkpoint is written."""

    def stop(self) -> None:
        """Do nothing: no checkpoint is written."""

    def finish(self) -> None:
        """Do nothing: no checkpoint is written."""


class StepObserver(Protocol):
    """An observer of this process' steps, such as a profiler."""

    @property
    def problem(self) -> str:
        """Why what the observer promised is missing, one line; "" where nothing is."""
        ...

    def step(self) -> None:
        """Note the end of a step. Issues no collectives."""
        ...
