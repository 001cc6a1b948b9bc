"""A run directory describes itself: resolved recipe, versions, data, metrics, a loss plot and the adapter."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.errors import UserError, listing
from trimtab.core.files import write_together
from trimtab.train.base import BASE, format_of, quantize_left
from trimtab.train.recipe import Recipe, recipe_from

RECIPE, RECORD, METRICS, PLOT, ADAPTER = "recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "adapter"


@dataclass(frozen=True)
class Run:
    """A run on disk, read without its weights."""

    directory: Path
    recipe: Recipe
    record: dict[str, Any]
    metrics: list[dict[str, Any]]

    def load(self, device: str = "auto") -> tuple[nn.Module, Any]:
        """The model with the trained adapter, ready to use, and its tokenizer; refuses a base that has changed."""
        from trimtab.core.codes import load_codes
        from trimtab.core.save import load as load_adapter
        from trimtab.data.wording import require_same_words
        from trimtab.models.fingerprints import fingerprint
        from trimtab.models.loading import load as load_model

        known = self.record["model"]
        loaded = load_model(
            self.recipe.model,
            task=self.record["task"],
            labels=self.record.get("labels"),
            dtype=known["dtype"],
            device=device,
            head_seed=self.recipe.seed,
            context=self.recipe.context,
        )
        found = fingerprint(loaded.directory or loaded.model)
        if found != known["fingerprint"]:
            raise UserError(
                f"run: {self.recipe.model} is not the model this adapter was trained on "
                f"(fingerprint {found[:12]}, trained on {known['fingerprint'][:12]})",
                fix="use the model of the run, or train again",
            )
        words = (self.record.get("data", {}).get("report") or {}).get("fingerprint")
        if words:
            require_same_words(loaded.tokenizer, words, self.recipe.model)
        format = format_of(self.recipe)
        after = takes_out(self.directory / ADAPTER)
        if format is not None and format.needs_inputs:
            load_codes(loaded.model, self.directory / BASE)
        elif format is not None and not after:
            quantize_left(loaded.model, format)
        load_adapter(loaded.model, self.directory / ADAPTER, trainable=False)
        if format is not None and after:
            quantize_left(loaded.model, format)
        return loaded.model.eval(), loaded.tokenizer


def takes_out(adapter: Path) -> bool:
    """Whether an adapter was started on weights that are encoded without a part of them: it encodes them itself."""
    from trimtab.core.save import read_record

    return any("quantized" in part for part in read_record(adapter)["parts"])


def open_run(directory: str | Path) -> Run:
    """Read a run directory; a missing, foreign or damaged one gets an error that says which file."""
    import yaml

    folder = Path(directory)
    missing = [name for name in (RECIPE, RECORD) if not (folder / name).is_file()]
    if missing:
        runs = sorted(str(found.parent) for found in Path("runs").glob(f"*/{RECORD}"))
        raise UserError(
            f"{folder} is not a run directory: {listing(missing)} missing",
            fix=f"runs here: {listing(runs, 5)}" if runs else "trimtab tune makes one",
        )
    try:
        recipe = recipe_from(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")))
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        metrics = metrics_of(folder)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be read as a run: {error}") from None
    return Run(folder, recipe, record, metrics)


def new_directory(recipe: Recipe) -> Path:
    """The directory of a new run: the one asked for, which must be empty or absent, or a numbered one under runs/."""
    if recipe.output:
        target = Path(recipe.output)
        if target.exists() and (not target.is_dir() or any(map(is_complete, target.iterdir()))):
            stopped = target.is_dir() and (target / RECORD).is_file() and not (target / ADAPTER).exists()
            fix = f"trimtab tune --resume {target} goes on with it, or choose another --output"
            raise UserError(
                f"output: {target} " + ("is an unfinished run" if stopped else "exists and is not an empty directory"),
                fix=fix if stopped else "choose another --output",
            )
        return writable(target)
    stem = f"{Path(recipe.model).name}-{recipe.method}".lower()
    number = 1
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return writable(Path("runs") / f"{stem}-{number}")


def is_complete(path: Path) -> bool:
    """Whether a file is more than what a killed process left: one it was writing, or a base without its run."""
    return path.name != BASE and not (path.name.startswith(".") and path.suffix == ".partial")


def is_restarted(recipe: Recipe) -> bool:
    """Whether torchrun has started this run again after a process was lost, and it had got as far as its directory."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and bool(recipe.output) and (Path(recipe.output or "") / RECORD).is_file()


def writable(target: Path) -> Path:
    """A directory that can be made and written to: said before any work is done."""
    above = next(one for one in (target, *target.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written to" if above.is_dir() else "is a file"
        raise UserError(f"output: {target} cannot be made: {above} {what}", fix="choose another --output")
    return target


def write_start(directory: Path, recipe: Recipe, record: Mapping[str, Any]) -> None:
    """The resolved recipe as YAML, every field written out, and the first `run.json`: both or none."""
    import yaml

    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(recipe).items()}
    order = [one.name for one in dataclasses.fields(Recipe)]
    text = yaml.safe_dump({key: values[key] for key in order}, sort_keys=False, allow_unicode=True)
    write_together(directory, {RECIPE: text.encode(), RECORD: as_json(record)})


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last one that a kill or a full disk cut short is left out."""
    path = directory / METRICS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def cut_metrics(directory: Path, step: int | None = None) -> list[dict[str, Any]]:
    """Keep the lines of `metrics.jsonl` up to a step, or all whole ones, in the file too, and return them."""
    kept = metrics_of(directory)[:step]
    write_together(directory, {METRICS: "".join(json.dumps(line) + "\n" for line in kept).encode()})
    return kept


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """`run.json`, replaced as a whole."""
    write_together(directory, {RECORD: as_json(record)})


def as_json(record: Mapping[str, Any]) -> bytes:
    """A record as the bytes of its file."""
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def versions() -> dict[str, str]:
    """The versions a run depends on."""
    from importlib.metadata import version

    import trimtab

    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    found = {name: version(name) for name in packages}
    return {"trimtab": trimtab.__version__, "python": platform.python_version(), **found}


def peak_memory() -> int | None:
    """Peak bytes of this process (its resident set on a CPU; on CUDA what the allocator held), or None if unknown."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if os.uname().sysname == "Darwin" else peak * 1024)


def plot_loss(directory: Path, metrics: list[dict[str, Any]], heldout: list[tuple[int, float]]) -> None:
    """`loss.png`: training loss per step, smoothed, with the held-out loss before and after."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    smooth, value = [], losses[0] if losses else 0.0
    for loss in losses:
        value = 0.9 * value + 0.1 * loss
        smooth.append(value)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="smoothed")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o--", color="tab:orange", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    write_together(directory, {PLOT: stream.getvalue()})
