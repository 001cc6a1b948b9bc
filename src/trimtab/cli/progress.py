"""What training shows while it runs: one live line in a terminal, plain lines elsewhere, nothing with --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click

from trimtab.cli.verb import duration, figure, is_machine
from trimtab.train.reporter import Reporter

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SMOOTHING = 0.9
PLAIN_LINES = 10
"""Progress lines of a whole training where there is no terminal."""


def reporter() -> QuietReporter:
    """The reporter that suits the running command: silent for machines, live in a terminal, plain lines elsewhere."""
    if is_machine():
        return QuietReporter()
    return LiveReporter(sys.stdout) if sys.stdout.isatty() else PlainReporter(sys.stdout)


class QuietReporter(Reporter):
    """Says nothing."""

    def close(self) -> None:
        """Leave the terminal as it was, whatever happened; called at the end of every run."""


class PlainReporter(QuietReporter):
    """Lines of text: every stage and note, and about ten lines over the whole training."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.steps = self.behind = 0
        self.loss: float | None = None
        self.started = time.perf_counter()
        self.shown = 0

    def line(self, text: str) -> None:
        """One line, at once: a pipe that is read elsewhere should not wait for a full buffer."""
        click.echo(text, file=self.stream)
        self.stream.flush()

    def stage(self, text: str) -> None:
        self.line(f"{text} ...")

    def note(self, text: str) -> None:
        self.line(f"  {text}")

    def evaluated(self, when: str, metrics: Mapping[str, Any]) -> None:
        self.line(f"  held out, {when} training: {measures(metrics)}")

    def start(self, steps: int, rows: int, done: tuple[int, int] = (0, 0)) -> None:
        self.steps, self.started, self.shown, self.behind = steps, time.perf_counter(), 0, done[0]
        self.line(f"training: {steps:,} steps")

    def step(self, metrics: Mapping[str, Any]) -> None:
        self.smooth(metrics)
        tenth = metrics["step"] * PLAIN_LINES // max(1, self.steps)
        if metrics["step"] == 1 or tenth > self.shown:
            self.shown = max(self.shown, tenth)
            self.line(f"  step {metrics['step']:,}/{self.steps:,}  {self.state(metrics)}")

    def smooth(self, metrics: Mapping[str, Any]) -> None:
        """A running mean of the loss: a single batch says little."""
        loss = float(metrics["loss"])
        self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss

    def state(self, metrics: Mapping[str, Any]) -> str:
        """Loss, speed and what is left, of the running training."""
        passed = time.perf_counter() - self.started
        left = passed / max(1, metrics["step"] - self.behind) * (self.steps - metrics["step"])
        return f"loss {self.loss:.3f}  {metrics['rows_per_second']:.3g} rows/s  {duration(left)} left"


class LiveReporter(PlainReporter):
    """One line that is redrawn: a bar, the step, the smoothed loss, rows per second and the time left."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.done = ""
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def line(self, text: str) -> None:
        if self.progress is None:
            super().line(text)
        else:
            self.progress.console.print(text, markup=False, highlight=False)

    def stage(self, text: str) -> None:
        self.stop()
        super().stage(click.style(text, dim=True))

    def start(self, steps: int, rows: int, done: tuple[int, int] = (0, 0)) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.steps, self.started, self.behind = steps, time.perf_counter(), done[0]
        console = Console(file=self.stream)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[state]}"),
            console=console,
            transient=True,
            refresh_per_second=5,
        )
        self.task = self.progress.add_task("training", total=steps, state="")
        self.progress.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        self.smooth(metrics)
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=metrics["step"], state=self.state(metrics))
            self.done = f"trained {metrics['step']:,} steps, loss {self.loss:.3f}"

    def close(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the live line away, so that what follows starts on a clean line."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
            if self.done:
                super().line(f"  {self.done}")


def measures(metrics: Mapping[str, Any]) -> str:
    """`loss 1.234, perplexity 3.43`."""
    return ", ".join(f"{name} {figure(value)}" for name, value in metrics.items() if isinstance(value, float))
