"""The learning-rate range test: train while the rate rises a thousandfold, and see where the loss falls fastest.

arXiv 1506.01186. The loss is smoothed; the rate suggested is the one of its steepest fall, which Adam bears well, and
the sweep ends when the loss explodes. Nothing of it stays in the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.core.files import write_together
from trimtab.data.batches import batches
from trimtab.engine.loss import loss_sum, terms_of
from trimtab.train import checkpoint
from trimtab.train.job import Job
from trimtab.train.prepare import prepare
from trimtab.train.recipe import Recipe
from trimtab.train.reporter import Reporter
from trimtab.train.updates import Updates

PLOT = "learning_rates.png"
SMOOTHING = 0.8


@dataclass(frozen=True)
class Sweep:
    """What a range test saw."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smooth: tuple[float, ...]
    suggested: float | None
    """None: the loss fell nowhere."""
    default: float
    """The method's own rate for this model."""
    plot: Path


def find_rate(
    recipe: Recipe, reporter: Reporter | None = None, steps: int = 40, directory: Path | None = None
) -> Sweep:
    """Sweep from a hundredth of the method's own rate to ten times it and write a plot beside the run directory."""
    tell = reporter or Reporter()
    job = prepare(recipe, tell, directory)
    rates = tuple(job.rate * 10 ** (-2 + 3 * at / (steps - 1)) for at in range(steps))
    tell.stage(f"trying {steps} learning rates from {rates[0]:.1e} to {rates[-1]:.1e}")
    start = checkpoint.taken(job.model)
    with job.running():
        losses = sweep(job, rates)
    checkpoint.put(job.model, start)
    smooth = smoothed(losses)
    best = steepest(rates, smooth)
    found = Sweep(rates[: len(losses)], tuple(losses), tuple(smooth), best, job.rate, job.directory / PLOT)
    plot(found)
    return found


def sweep(job: Job, rates: Sequence[float]) -> list[float]:
    """The loss of each step, one rate a step; ends early when it explodes."""
    recipe, model = job.recipe, job.model.train()
    update = Updates(recipe, model, rates[0], job.ratios)
    losses: list[float] = []
    order: list[list[int]] = []
    while len(order) < len(rates):
        order += batches(job.train_rows, recipe.batch_size, recipe.seed, len(order))
    for step, (rate, rows) in enumerate(zip(rates, order, strict=False)):
        batch = job.batch(rows)
        update.begin(step, rate)
        for _ in update.passes():
            loss = loss_sum(model, batch, job.task)[0] / terms_of(batch)
            loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or losses[-1] > 3 * min(losses) + 3:
            break
        update.clip()
        update.optimizer.step()
        update.optimizer.zero_grad(set_to_none=True)
    update.close()
    return [loss for loss in losses if math.isfinite(loss)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    mean, found = 0.0, []
    for at, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**at))
    return found


def steepest(rates: Sequence[float], smooth: Sequence[float]) -> float | None:
    """The rate where the smoothed loss falls fastest per factor of the rate, before its lowest point."""
    lowest = min(range(len(smooth)), key=lambda at: smooth[at], default=0)
    falls = {at: smooth[at - 2] - smooth[at + 2] for at in range(2, min(lowest, len(smooth) - 3) + 1)}
    best = max(falls, key=lambda at: falls[at], default=None)
    return None if best is None or falls[best] <= 0 else float(f"{rates[best]:.1e}")


def plot(found: Sweep) -> None:
    """The sweep as PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.semilogx(found.rates, found.losses, color="0.75", linewidth=0.8, label="each step")
    axes.semilogx(found.rates, found.smooth, color="tab:blue", linewidth=1.8, label="smoothed")
    axes.axvline(found.default, color="tab:gray", linestyle=":", label=f"the method's own, {found.default:g}")
    if found.suggested is not None:
        axes.axvline(found.suggested, color="tab:orange", linestyle="--", label=f"steepest, {found.suggested:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    write_together(found.plot.parent, {found.plot.name: stream.getvalue()})
