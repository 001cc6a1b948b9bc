"""Experiment trackers behind one small interface; none is imported before it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing, nearest


class Tracker(ABC):
    """Where the numbers of a run also go."""

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""

    @abstractmethod
    def close(self) -> None:
        """The run is over."""


class TensorBoard(Tracker):
    """Event files in `tensorboard/` of the run directory."""

    package = "tensorboard"

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(directory / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """A Weights & Biases run; its own environment variables say where."""

    package = "wandb"

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.module: Any = import_module(self.package)
        self.run = self.module.init(project="trimtab", name=directory.name, dir=str(directory), config=dict(settings))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Tracker):
    """A trackio run."""

    package = "trackio"

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.module: Any = import_module(self.package)
        self.module.init(project="trimtab", name=directory.name, config=dict(settings))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.module.log({**numbers, "step": step})

    def close(self) -> None:
        self.module.finish()


TRACKERS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def names_in(text: str) -> list[str]:
    """The trackers named in `tensorboard, wandb`; unknown or missing ones are one error."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        close = nearest(unknown[0], TRACKERS, 1)
        raise UserError(f"track: no tracker {listing(unknown)}", fix=f"one of {listing(close or TRACKERS)}")
    missing = [TRACKERS[name].package for name in names if not installed(TRACKERS[name].package)]
    if missing:
        raise UserError(f"track: {listing(missing)} is not installed", fix=f"pip install {' '.join(missing)}")
    return names


def installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    from importlib.util import find_spec

    return find_spec(package) is not None


def opened(names: Sequence[str], directory: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Start the trackers of a run."""
    return [TRACKERS[name](directory, settings) for name in names]
