"""What is examined: the network in closed form, trained victims, or a checkpoint of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.reconstruction import closed_form, foreign, samples, victim
from analysis.reconstruction.config import Config
from analysis.reconstruction.folder import Folder
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import Network
from analysis.reconstruction.samples import Samples
from analysis.reconstruction.victim import Architecture, Checkpoint
from harness.config.errors import InputError
from optimizers import OptionError

FIXTURE, FOREIGN = "closed_form", "checkpoint"


@dataclass(frozen=True)
class Subject:
    """One checkpoint to examine.

    Attributes:
        optimizer, seed, step: whose it is. The closed form and foreign checkpoints have step 0.
        network: its weights. initial: before training, or None.
        hybrid: the norm of its optimizer.
        lambdas: (n,) known multipliers (closed form), or None.
        is_exact: an exact KKT point.
    """

    optimizer: str
    seed: int
    step: int
    network: Network
    initial: Network | None
    hybrid: Geometry
    lambdas: Tensor | None = None
    is_exact: bool = False

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.optimizer}-seed{self.seed}-step{self.step}"


@dataclass(frozen=True)
class Images:
    """The samples as tensors, float64."""

    samples: Samples
    task: str
    x: Tensor
    labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor


def load(config: Config) -> tuple[Images, Network | None]:
    """Images, and the foreign network if one is given.

    Raises:
        InputError: see `samples.load`, `foreign`.
    """
    if config.checkpoint is not None and config.batch is not None:
        network = foreign.network(config.checkpoint)
        d, k = network.weights[0].shape[1], network.weights[-1].shape[0]
        return _images(config, foreign.samples(config.batch, d, k)), network
    seed = None if config.mode == "fixture" else config.data_seed
    found = samples.load(config.data, config.data_path, config.classes, config.per_class, seed, config.offset)
    return _images(config, found), None


def subjects(
    config: Config,
    images: Images,
    network: Network | None,
    folder: Folder,
    say: Callable[[str], None],
) -> Iterator[Subject]:
    """Every checkpoint, victims being trained (or taken from the folder) on the way.

    Raises:
        InputError: options that an optimizer doesn't have, weights that diverged.
    """
    if config.mode == "fixture":
        found = closed_form.build(images.samples.images, images.samples.labels, config.neurons)
        hybrid = Geometry("l2")
        yield Subject(FIXTURE, 0, 0, found.network, None, hybrid, found.lambdas, is_exact=True)
        return
    if network is not None:
        yield Subject(FOREIGN, 0, 0, network, None, Geometry("l2"))
        return
    settings = {name: _options(config, name) for name in config.optimizer}
    for seed in range(config.seed, config.seed + config.seeds):
        for name in config.optimizer:
            yield from _victim(config, images, name, settings[name], seed, folder, say)


def _victim(
    config: Config,
    images: Images,
    name: str,
    settings: dict[str, object],
    seed: int,
    folder: Folder,
    say: Callable[[str], None],
) -> Iterator[Subject]:
    shape = Architecture(
        images.x.shape[1], tuple(config.width), images.samples.outputs, config.bias, config.init_scale
    )
    start = victim.initial(shape, seed)
    key = f"{name}-seed{seed}"
    checkpoints = folder.checkpoints(key)
    if checkpoints is None:
        if "victim" not in config.stages:
            raise InputError(
                "stages",
                ",".join(config.stages),
                f"needs the victim {key}, which is not there",
                fix="stages=victim first",
            )
        say(f"training {key}: {config.steps_to_keep[-1]} steps")
        trained = victim.train(
            name, settings, start, images.x, images.labels, images.task, config.steps_to_keep, config.margins
        )
        checkpoints = [Checkpoint(0, start), *trained]
        folder.keep_checkpoints(key, checkpoints)
    hybrid = victim.hybrid(name, settings, start)
    for checkpoint in checkpoints[1:]:
        yield Subject(name, seed, checkpoint.step, checkpoint.network, checkpoints[0].network, hybrid)


def _options(config: Config, name: str) -> dict[str, object]:
    try:
        return victim.options(name, config.options.get(name, {}))
    except OptionError as error:
        key = f"{name}.{error.key}"
        raise InputError(
            key, error.value, error.reason, allowed=error.allowed, suggestion=error.suggestion
        ) from None


def _images(config: Config, found: Samples) -> Images:
    task = config.task
    if task == "auto":
        task = "binary" if found.outputs == 1 else "multiclass"
    arrays = (found.images, found.labels, found.heldout, found.heldout_labels)
    x, labels, heldout, heldout_labels = (torch.from_numpy(a) for a in arrays)
    return Images(found, task, x, labels, heldout, heldout_labels)
