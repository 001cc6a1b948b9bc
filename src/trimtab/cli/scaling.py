"""What `trimtab plan --gpus N --nodes M` tells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.verb import columns, heading, say, size

if TYPE_CHECKING:
    from trimtab.plan.devices import Device
    from trimtab.plan.scaling import Layout, Scaling


def tell(scaling: Scaling, plot: str | None) -> dict[str, Any]:
    """Print the tables, draw the plot if one is wanted, and return the document."""
    from trimtab.plan.scaling import LAYOUTS

    device = scaling.device
    recipe = scaling.plan.recipe
    machines = f"{scaling.nodes} machine{'s' * (scaling.nodes > 1)} of {scaling.gpus} × {device.name}"
    title = f"{scaling.model}: {recipe['method']} on {machines}"
    say(heading(title) + f"  ({scaling.step_rows} rows of {scaling.length} tokens a step)")
    say(columns([HEAD, *(row(one) for one in scaling.layouts)], right=(1, 2, 3, 4, 5, 6)))
    if scaling.advised:
        say(f"advised: shard: {scaling.advised}, {LAYOUTS[scaling.advised]}; {scaling.why}")
    else:
        say(f"advised: none of these; {scaling.why}")
    chosen = scaling.advised or scaling.layouts[-1].shard
    say("\n" + heading(f"more devices, shard: {chosen}"))
    say(columns(list(grown(scaling)), right=tuple(range(7))))
    say("\n" + columns(assumed(device)))
    document = scaling.document() | {"assumptions": dict(assumed(device))}
    if plot:
        from trimtab.report.scaling import scaling_plot

        drawn = scaling_plot(scaling, Path(plot))
        say(f"\n{drawn.words}\nPlot: {Path(plot) / drawn.name}.svg, .png")
        document["plot"] = {"svg": str(Path(plot) / f"{drawn.name}.svg"), "words": drawn.words}
    return document


HEAD = ("shard", "memory", "sent a step", "products", "weights", "gradients", "step", "")


def row(one: Layout) -> tuple[str, ...]:
    """A layout as cells; times of gathering weights are whole, hidden or not."""
    times = (one.compute_seconds, one.weights_seconds, one.gradients_seconds, one.step_seconds)
    word = "" if one.fits else "does not fit"
    return one.shard, size(one.memory_bytes), size(round(one.sent_bytes)), *map(moment, times), word


def moment(seconds: float) -> str:
    """Seconds, or milliseconds where these are few."""
    return f"{seconds:.3g} s" if seconds >= 1 or not seconds else f"{1e3 * seconds:.3g} ms"


def grown(scaling: Scaling) -> list[tuple[str, ...]]:
    """Weak and strong scaling side by side."""
    rows: list[tuple[str, ...]] = []
    rows.append(("devices", "weak: rows/s", "of no waiting", "a device", "strong: rows/s", "of no waiting", "a device"))
    strong = {one.devices: one for one in scaling.strong}
    for one in scaling.weak:
        cells = [str(one.devices)]
        for found in (one, strong.get(one.devices)):
            if found is None:
                cells += ["", "", ""]
                continue
            share = f"{found.efficiency(scaling.alone):.0%}" + ("" if found.fits else " (too large)")
            cells += [f"{found.rows_per_second:.4g}", share, size(found.memory_bytes)]
        rows.append(tuple(cells))
    return rows


def assumed(device: Device) -> list[tuple[str, str]]:
    """What the times rest on."""
    near, far = size(round(device.near)), size(round(device.far))
    return [
        ("device", f"{device.flops:.3g} operations/s ({device.source})"),
        ("links", f"{near}/s inside a machine, {far}/s per device between them"),
        ("latency", f"{device.near_latency * 1e6:.3g} and {device.far_latency * 1e6:.3g} µs a message"),
        ("weights", "gathered while products run" if device.overlaps else "gathered first, then products run"),
    ]
