"""How a recipe scales with devices, as a plot: what each of them reaches of the rows a second it would reach alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.report.plots import INK, Plot, figure, finished, legend

if TYPE_CHECKING:
    from trimtab.plan.scaling import Scaling


def scaling_plot(scaling: Scaling, folder: Path) -> Plot:
    """Weak scaling (rows per device fixed) and strong scaling (rows of a step fixed), written as SVG and PNG."""
    made, axes = figure()
    lines = (("weak", scaling.weak, "#2a78d6", "o"), ("strong", scaling.strong, "#d9480f", "s"))
    for name, found, colour, marker in lines:
        rows = scaling.layouts[0].rows if name == "weak" else scaling.step_rows
        label = f"{name}: {rows} rows a {'device' if name == 'weak' else 'step'}"
        points = [(one.devices, 100 * one.efficiency(scaling.alone)) for one in found]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, marker=marker, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.set_xlabel("devices", color=INK)
    axes.set_ylabel("rows a second and device, % of no waiting", color=INK)
    legend(axes)
    last = scaling.weak[-1]
    words = (
        "Predicted rows a second and device, as a share of one that waits for nobody. "
        f"With {last.rows} rows a device, {last.devices} devices reach {last.efficiency(scaling.alone):.0%}."
    )
    return finished(made, folder, "scaling", f"{scaling.model} on many devices", words)
