"""`trimtab plan`: what a recipe needs on a model known by its `config.json`, and which recipes fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, duration, heading, say, share, size
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.plan.fitting import Candidate
    from trimtab.plan.planning import Plan

WORDS = {
    "weights": "frozen weights",
    "adapter": "what trains",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "loss and logits",
    "temporary": "temporary",
    "process": "the process itself",
    "allocator": "allocator, kernels",
    "file": "weights that stay on disk",
    "loading": "loading, beyond a step",
}
"""Category -> its line."""


@click.command(
    cls=Verb,
    name="plan",
    short_help="Predict memory, operations and size before anything is loaded.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    options_metavar="[FLAGS] [SETTINGS OF A RECIPE]",
)
@click.option("--model", help="A directory, a config.json, a starter or a hub id; no weights are read.")
@click.option("--method", "methods", multiple=True, help="A method or preset; several with commas, or several times.")
@click.option("--recipe", "recipes", multiple=True, help="A recipe file of `trimtab tune`; may be given several times.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows per forward pass.  [default: 8]")
@click.option("--length", type=click.IntRange(min=2), help="Tokens of a row.  [default: 512]")
@click.option("--dtype", help="Floating type of the frozen weights: auto, float32, bfloat16, float16.")
@click.option("--quantize", help="Format of the frozen weights: nf4, nf4-double, absmax, affine.")
@click.option("--checkpointing", help="off, block, sqrt, selective or offload.")
@click.option("--optimizer", help="adamw, adam8, galore, lomo, ...")
@click.option("--active", help="lisa, badam or gradual_unfreezing.")
@click.option("--completions", type=click.FloatRange(0, 1), default=1.0, help="Share of a row's tokens that trains.")
@click.option("--tokens", type=float, help="Training tokens of the whole run, for its operations.")
@click.option("--fit", help="A size (24GB) or a device (rtx4090); without --method: list the recipes that fit.")
@click.option("--gpus", type=click.IntRange(min=1), help="Plan for so many devices a machine; --fit names the device.")
@click.option("--nodes", type=click.IntRange(min=1), help="Machines with that many devices each.  [default: 1]")
@click.option("--device-flops", type=click.FloatRange(min=0, min_open=True), help="Operations/s a device reaches.")
@click.option("--node-bandwidth", help="Bytes/s of a device inside its machine: 300GB.")
@click.option("--link-bandwidth", help="Bytes/s of a device to other machines: 25GB.")
@click.option("--link-latency", type=click.FloatRange(min=0), help="Seconds before a message arrives: 1e-5.")
@click.option("--plot", help="With --gpus: a folder for the plot of scaling.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    methods: Sequence[str],
    recipes: Sequence[str],
    batch_size: int | None,
    length: int | None,
    dtype: str | None,
    quantize: str | None,
    checkpointing: str | None,
    optimizer: str | None,
    active: str | None,
    completions: float,
    tokens: float | None,
    fit: str | None,
    gpus: int | None,
    nodes: int | None,
    device_flops: float | None,
    node_bandwidth: str | None,
    link_bandwidth: str | None,
    link_latency: float | None,
    plot: str | None,
) -> dict[str, Any]:
    """Predict the peak memory of a training step by category, its operations, what is saved, and whether it fits.

    \b
        trimtab plan --model smollm2-135m-instruct --method lora,full --length 256 --dtype float32
        trimtab plan --model path/to/config.json --method lora --rank 64 --quantize nf4-double --fit 48GB
        trimtab plan --model path/to/config.json --fit 24GB
        trimtab plan --model path/to/config.json --method lora --batch-size 256 --fit h100 --gpus 8 --nodes 4

    Settings of the method and other keys of a recipe are taken as flags. Without --fit the plan is for this machine.
    """
    from trimtab.plan.process import room

    given = {"batch_size": batch_size, "max_length": length, "dtype": dtype, "quantize": quantize}
    given |= {"checkpointing": checkpointing, "optimizer": optimizer, "active": active}
    settings = {key: value for key, value in given.items() if value is not None} | extra(ctx.args)
    where = room(fit)
    links = {"node_bandwidth": node_bandwidth, "link_bandwidth": link_bandwidth, "link_latency": link_latency}
    if gpus or nodes:
        several = wanted(model, methods, recipes, settings)
        return on_many(several, where, completions, (gpus or 1, nodes or 1), {"flops": device_flops, **links}, plot)
    refuse_alone({"device_flops": device_flops, **links, "plot": plot})
    if fit and not methods and not recipes:
        return list_fitting(needed(model), where, settings)
    documents: list[dict[str, Any]] = []
    asked = wanted(model, methods, recipes, settings)
    for values in asked:
        try:
            one = planned(values, where, completions)
        except UserError as problem:
            if len(asked) == 1:
                raise
            say(f"{heading(str(values.get('method', 'lora')))}: {problem.message}\n")
            documents.append({"method": values.get("method"), "problem": problem.message})
            continue
        say(told(one, tokens) + ("" if values is asked[-1] else "\n"))
        documents.append(one.document() | ({"flops": tokens * one.flops_per_token} if tokens else {}))
    return documents[0] if len(documents) == 1 else {"plans": documents}


def refuse_alone(given: Mapping[str, Any]) -> None:
    """Flags that mean nothing for one device."""
    for name, value in given.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"plan: {flag} is for several devices", fix=f"--gpus 8 --nodes 4 {flag} ...")


def on_many(
    recipes: Sequence[Mapping[str, Any]],
    where: Any,
    completions: float,
    cluster: tuple[int, int],
    rates: Mapping[str, Any],
    plot: str | None,
) -> dict[str, Any]:
    """One recipe on several machines."""
    from trimtab.cli.scaling import tell
    from trimtab.models.starters import quiet_transformers
    from trimtab.plan.devices import device_of
    from trimtab.plan.scaling import scaling_of
    from trimtab.train.recipe import recipe_from

    if len(recipes) > 1:
        names = ", ".join(str(one.get("method", "lora")) for one in recipes)
        raise UserError(f"plan: --gpus plans one recipe at a time, and these are {names}", fix="one --method")
    with quiet_transformers():
        found = scaling_of(recipe_from(recipes[0]), where, device_of(where, **rates), *cluster, completions=completions)
    return tell(found, plot)


def extra(args: Sequence[str]) -> dict[str, str]:
    """`--rank 16 --alpha=32` as keys of a recipe."""
    found: dict[str, str] = {}
    left = list(args)
    while left:
        name = left.pop(0)
        if not name.startswith("--"):
            raise UserError(f"plan: {name!r} is no flag", fix="trimtab plan --help")
        key, equals, value = name[2:].partition("=")
        if not equals:
            if not left:
                raise UserError(f"plan: {name} has no value", fix=f"{name} VALUE")
            value = left.pop(0)
        found[key.replace("-", "_")] = value
    return found


def needed(model: str | None) -> str:
    """The model, which has to be given."""
    if not model:
        raise UserError("plan: `--model` is missing", fix="trimtab plan --model smollm2-135m-instruct --method lora")
    return model


def wanted(
    model: str | None, methods: Sequence[str], recipes: Sequence[str], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The recipes asked for, as keys: of the files, then one for each method."""
    from trimtab.train.recipe import ALIASES, read_recipe

    found = []
    for path in recipes:
        content = {ALIASES.get(key, key): value for key, value in read_recipe(path).items()}
        found.append({"data": "-", **content, **settings, **({"model": model} if model else {})})
    names = [name.strip() for item in methods for name in item.split(",") if name.strip()]
    for name in names or ([] if recipes else ["lora"]):
        found.append({"data": "-", **own(settings, name, names), "model": needed(model), "method": name})
    return found


def own(settings: Mapping[str, Any], method: str, methods: Sequence[str]) -> dict[str, Any]:
    """The settings without those that are for another one of several methods."""
    from trimtab.train.settings import method_settings

    others = {key for name in methods for key in method_settings(name)} - set(method_settings(method))
    return {key: value for key, value in settings.items() if key not in others}


def planned(values: Mapping[str, Any], where: Any, completions: float) -> Plan:
    """The plan of one recipe."""
    from trimtab.models.starters import quiet_transformers
    from trimtab.plan.planning import plan_of
    from trimtab.train.recipe import recipe_from

    with quiet_transformers():
        return plan_of(recipe_from(values), fit=where, completions=completions)


def told(plan: Plan, tokens: float | None) -> str:
    """A plan as text."""
    recipe = plan.recipe
    named = [recipe["method"], *(f"{key} {value}" for key, value in recipe["settings"].items())]
    named += [recipe[key] for key in ("quantize", "active") if recipe[key]]
    named += [recipe["optimizer"]] if recipe["optimizer"] != "adamw" else []
    named += [f"checkpointing {recipe['checkpointing']}"] if recipe["checkpointing"] != "off" else []
    shape = f"{recipe['batch_size']} rows of {recipe['max_length']} tokens, {recipe['dtype']}"
    title = heading(f"{plan.model}: {', '.join(map(str, named))}") + f"  ({shape})"
    rows = [(WORDS[key], size(value)) for key, value in plan.memory.items() if value]
    rows += [("peak", size(plan.peak_memory_bytes))]
    facts = [
        ("", verdict(plan)),
        ("trains", f"{plan.trained:,} of {plan.parameters:,} parameters ({share(plan.trained, plan.parameters)})"),
        ("saved", f"{size(plan.saved_bytes)}, switched in about {duration(plan.switch_seconds)} (read at 1 GB/s)"),
        ("operations", f"{plan.flops_per_token:.4g} per token, {plan.flops_per_step:.4g} per step" + run(plan, tokens)),
        ("two ways", ways(plan)),
        *(("note", note) for note in plan.notes),
    ]
    return "\n".join([title, columns(rows, right=(1,)), columns(facts)])


def run(plan: Plan, tokens: float | None) -> str:
    """Operations of a whole run."""
    return f", {tokens * plan.flops_per_token:.4g} for {tokens:.4g} tokens" if tokens else ""


def verdict(plan: Plan) -> str:
    """Whether it fits."""
    word = "fits" if plan.fits else "does not fit"
    return f"{word} {plan.room} ({size(plan.room_bytes)})"


def ways(plan: Plan) -> str:
    """What the two ways say of the step's own tensors."""
    each = [f"{name.replace('_', ' ')} {size(value)}" for name, value in plan.routes.items() if value is not None]
    apart = f", {plan.apart:+.1%} apart" if plan.apart is not None else ", one way only"
    return " and ".join(each) + apart


def list_fitting(model: str, where: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What fits, best first."""
    from trimtab.models.starters import quiet_transformers
    from trimtab.plan.fitting import SOURCE, fitting

    with quiet_transformers():
        good, bad, refused = fitting(model, where, settings, tell=lambda name: say(f"planning {name}", err=True))
    say(heading(f"{model} in {where.name} ({size(where.bytes)})"))
    say(columns([line(one) for one in good] or [("nothing fits", "")], right=(1,)))
    if bad:
        say("\n" + heading("too large"))
        say(columns([line(one) for one in bad], right=(1,)))
    for name, reason in refused.items():
        say(f"  {name}: {reason}")
    say(f"\n{SOURCE}")
    return {
        "room": where.name,
        "room_bytes": where.bytes,
        "fits": [{"name": one.name, **one.plan.document()} for one in good],
        "too_large": [{"name": one.name, **one.plan.document()} for one in bad],
        "refused": refused,
        "order": SOURCE,
    }


def line(one: Candidate) -> tuple[str, str, str]:
    """A candidate as cells."""
    again = f"checkpointing {one.checkpointing}" if one.checkpointing != "off" else ""
    return one.name, size(one.plan.peak_memory_bytes), again
