"""`trimtab tune`: flags are the fields of a recipe and, once the method is known, its settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.launch import launch, without_own
from trimtab.cli.verb import Verb, columns, duration, figure, heading, is_other_rank, say, share, size
from trimtab.core.errors import UserError, listing, nearest
from trimtab.train.recipe import (
    ALIASES,
    NAMED,
    OPTIMIZERS,
    SWITCHED,
    Recipe,
    fields,
    read_recipe,
    recipe_from,
    said_twice,
)
from trimtab.train.settings import factory, method_settings, registered_settings, unfolded

if TYPE_CHECKING:
    from trimtab.train.run import Result

GROUPS = {"what": "What", "data": "Data", "training": "Training"}
RECIPE_ENDINGS = (".yaml", ".yml")
BARE = {one: on for name, (_, on) in SWITCHED.items() for one in (name, *ALIASES) if ALIASES.get(one, one) == name}
"""Flags that may stand without a value, and what they mean then."""
ARGUMENTS = "trimtab.arguments"
"""Where the context keeps the command line as it was given."""
FLAGS = "trimtab.flags"
"""Where the context keeps the values of the flags, which are too many to be arguments of a function."""


class Flag(click.Option):
    """A flag of a recipe field or of a method's setting, shown under the title of its group."""

    def __init__(
        self, name: str, text: str, group: str, *, switch: bool, hidden: bool = False, words: str = ""
    ) -> None:
        dashed = name.replace("_", "-")
        spelled = f"--{dashed}/--no-{dashed}" if switch else f"--{dashed}"
        bare: dict[str, Any] = {"is_flag": False, "flag_value": BARE[name]} if name in BARE else {}
        super().__init__(
            [spelled, name], help=text, default=None, hidden=hidden, metavar=None if switch else words or None, **bare
        )
        self.group = group


class Tune(Verb):
    """The command whose options depend on the method named among its own arguments."""

    chosen: str | None = None
    """The method whose settings are flags; None before one is known."""
    others: Mapping[str, str] = MappingProxyType({})
    """The optimizer and the schedule whose settings are flags, by key of the recipe."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        recipe_flags = list(flags_of_recipe())
        settings = list(flags_of_method(self.chosen)) if self.chosen else []
        settings += [flag for key, name in self.others.items() for flag in flags_of_named(key, name)]
        known = {flag.name for flag in recipe_flags}
        flags = [*recipe_flags, *(one for one in settings if one.name not in known)]
        aliases = aliases_of({flag.name or "": flag for flag in flags})
        return [*flags, *aliases, *super().get_params(ctx)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [dashes(argument) for argument in args]
        ctx.meta[ARGUMENTS] = list(args)
        asked_for_help = any(name in args for name in ctx.help_option_names)
        method = name_in(args)
        self.chosen = method or (None if asked_for_help else Recipe.method)
        found = {key: name_in(args, key) for key in NAMED}
        self.others = {key: OPTIMIZERS.get(name.lower(), name) for key, name in found.items() if name}
        if self.chosen:
            factory(self.chosen)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise self.unknown(ctx, error.option_name) from None

    def invoke(self, ctx: click.Context) -> Any:
        names = {one.name or "" for one in self.get_params(ctx) if isinstance(one, Flag)}
        ctx.meta[FLAGS] = {name: ctx.params.pop(name) for name in names if name in ctx.params}
        return super().invoke(ctx)

    def unknown(self, ctx: click.Context, name: str) -> UserError:
        """The error for a flag nobody knows: the nearest flag, or the methods that have such a setting."""
        plain = name.lstrip("-").replace("-", "_")
        plain = ALIASES.get(plain, plain)
        having = methods_with(plain)
        if having:
            fix = f"settings of {self.chosen}: {listing(spelled(method_settings(self.chosen or 'lora'))) or 'none'}"
            return UserError(f"{name} is a setting of {listing(having, 6)}, not of {self.chosen}", fix=fix)
        options = [flag for flag in self.get_params(ctx) if isinstance(flag, click.Option)]
        texts = [text for flag in options for text in (*flag.opts, *flag.secondary_opts)]
        close = [text for text in texts if text.startswith(name)] or nearest(name, texts, 1)
        fix = f"did you mean {close[0]}?" if close else f"trimtab tune --method {self.chosen} --help lists every flag"
        return UserError(f"no flag {name} for `trimtab tune` with method {self.chosen}", fix=fix)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles = {**GROUPS, "settings": f"Settings of {self.chosen}"}
        titles |= {key: f"Settings of {name}" for key, name in self.others.items()}
        parameters = self.get_params(ctx)
        for group, title in titles.items():
            rows = [
                record
                for one in parameters
                if isinstance(one, Flag) and one.group == group and (record := one.get_help_record(ctx))
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=28)
        rest = [
            one.get_help_record(ctx)
            for one in parameters
            if isinstance(one, click.Option) and not isinstance(one, Flag)
        ]
        with formatter.section("Other"):
            formatter.write_dl([row for row in rest if row])
        if not self.chosen:
            formatter.write_paragraph()
            formatter.write_text(
                "A method's own settings are flags too: `trimtab tune --method lora --help` shows them."
            )


def dashes(argument: str) -> str:
    """`--learning_rate=1` as `--learning-rate=1`: names other tools use come with underscores."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def flags_of_recipe() -> Iterator[Flag]:
    """A flag for every field of a recipe but those with settings, which are flags of their own."""
    for name, field in fields().items():
        if name.endswith("settings"):
            continue
        text = field.metadata["help"]
        if not any(field.default is plain for plain in ("", None, dataclasses.MISSING, False)):
            text += f"  [default: {field.default}]"
        kind = str(field.type).removesuffix(" | None")
        yield Flag(name, text, field.metadata["group"], switch=kind == "bool", words=kind_of(kind))


def flags_of_method(method: str) -> Iterator[Flag]:
    """A flag for every setting of a method or preset."""
    for name, default in method_settings(method).items():
        plain = default is None or isinstance(default, str | int | float | bool)
        text = f"[default: {default}]" if plain else f"[default: {default}; set it in a recipe or in Python]"
        words = kind_of(type(default).__name__ if default is not None else "")
        yield Flag(name, text, "settings", switch=isinstance(default, bool), words=words)


def flags_of_named(key: str, name: str) -> Iterator[Flag]:
    """A flag for every setting of an optimizer or a schedule: `--optimizer-rank`, `--active-layers`."""
    for setting, default in registered_settings(name, NAMED[key]).items():
        words = kind_of(type(default).__name__ if default is not None else "")
        text = f"[default: {default}]"
        yield Flag(f"{key}_{setting}", text, key, switch=isinstance(default, bool), words=words)


def kind_of(name: str) -> str:
    """How the help names the value of a flag."""
    return {"int": "NUMBER", "float": "NUMBER", "Mapping[str, str]": "ROLE=COLUMN,..."}.get(name, "TEXT")


def aliases_of(known: Mapping[str, Flag]) -> Iterator[Flag]:
    """A hidden flag for every name other tools use for one of ours."""
    for alias, name in ALIASES.items():
        if name in known and alias not in known:
            yield Flag(
                alias,
                f"The same as {known[name].opts[0]}.",
                "alias",
                switch=bool(known[name].secondary_opts),
                hidden=True,
            )


def spelled(settings: Mapping[str, Any]) -> list[str]:
    """Names of settings as flags."""
    return ["--" + name.replace("_", "-") for name in settings]


def methods_with(setting: str) -> list[str]:
    """The methods and presets that have a setting of this name."""
    from trimtab.core.registry import names

    return [name for name in names() if setting in method_settings(name)]


def flags_for(key: str) -> set[str]:
    """The flags of a key of a recipe, those that other tools call it by among them."""
    return {f"--{key}", *("--" + alias.replace("_", "-") for alias, name in ALIASES.items() if name == key)}


def name_in(args: list[str], key: str = "method") -> str | None:
    """The method (or another named thing) of a command line, or of the recipe named there; None when neither says."""
    names, found = flags_for(key), None
    for place, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in names and (equals or place + 1 < len(args)):
            found = value if equals else args[place + 1]
    if found is not None:
        return found
    of_data = flags_for("data") | flags_for("heldout")
    for before, argument in zip(["", *args], args, strict=False):
        if before in of_data:  # a mixture of data sets has the ending of a recipe
            continue
        if argument.endswith(RECIPE_ENDINGS) and not argument.startswith("-") and Path(argument).is_file():
            for one, value in read_recipe(argument).items():
                if ALIASES.get(one, one) == key and value is not None:
                    return unfolded(value)[0] if isinstance(value, Mapping) else str(value)
    return None


def merged(recipe: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe file with the flags over them, all under our own names."""
    content = read_recipe(recipe) if recipe else {}
    for source in (content, given):
        if twice := said_twice(source):
            raise UserError(f"recipe: {'; '.join(twice)}", fix="keep one of them")
    values: dict[str, Any] = {}
    for key, value in (*content.items(), *given.items()):
        if value is not None:
            plain = str(key).replace("-", "_")
            values[ALIASES.get(plain, plain)] = value
    return values


@click.command(cls=Tune, name="tune", short_help="Train an adapter.", options_metavar="[FLAGS]")
@click.argument("recipe", required=False, metavar="[RECIPE.yaml]")
@click.option("--resume", metavar="RUN_DIR", help="Go on with a run that was stopped or killed.")
@click.option("--find-lr", is_flag=True, help="Only try learning rates, on the first batches, and say which suits.")
@click.option("--nproc", type=click.IntRange(1), metavar="NUMBER", help="Train in so many processes on this machine.")
@click.option(
    "--restarts", type=click.IntRange(0), metavar="NUMBER", help="Go on so often after the loss of a process."
)
@click.pass_context
def command(
    ctx: click.Context, recipe: str | None, resume: str | None, find_lr: bool, nproc: int | None, restarts: int | None
) -> dict[str, Any]:
    """Train an adapter from a model and a data file; flags override the recipe file.

    \b
        trimtab tune --model smollm2-135m-instruct --data rows.jsonl --method lora --rank 16
        trimtab tune recipe.yaml --learning-rate 2e-4
        trimtab tune --resume runs/smollm2-135m-instruct-lora-1
        trimtab tune recipe.yaml --nproc 4
    """
    given = [name for name, value in ctx.meta[FLAGS].items() if value is not None]
    if resume and (recipe or given):
        idle = listing(spelled(dict.fromkeys(given)) or [str(recipe)])
        raise UserError(
            f"--resume takes the recipe of the run; {idle} cannot change it", fix=f"trimtab tune --resume {resume}"
        )
    if nproc is not None or restarts is not None:
        in_processes(ctx, recipe, resume, find_lr, nproc or 1, restarts or 0)
    if find_lr:
        return try_rates(recipe_from(merged(recipe, ctx.meta[FLAGS])))
    result = run(Path(resume) if resume else recipe_from(merged(recipe, ctx.meta[FLAGS])))
    if is_other_rank():
        ctx.exit(0)
    say("\n" + summary(result))
    return document(result)


def in_processes(
    ctx: click.Context, recipe: str | None, resume: str | None, find_lr: bool, count: int, restarts: int
) -> None:
    """Leave the work to several processes; the first of them prints. Returns only for a single one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("--nproc starts processes, and torchrun has started this one", fix="leave --nproc out")
    if find_lr:
        raise UserError("--find-lr tries rates in one process", fix="leave --nproc out; the rate holds for any number")
    if count == 1 and not restarts:
        return
    arguments = without_own(ctx.meta[ARGUMENTS])
    if resume is None:
        from trimtab.train.rundir import new_directory

        asked = recipe_from(merged(recipe, ctx.meta[FLAGS]))
        if not asked.output:
            arguments += ["--output", str(new_directory(asked))]
    launch(arguments, count, restarts)
    ctx.exit(0)


def run(what: Recipe | Path) -> Result:
    """Train by a recipe, or go on with a run directory, with the progress that suits the running command."""
    from trimtab.cli.progress import reporter

    shown = reporter()
    try:
        from trimtab.models.starters import quiet_transformers
        from trimtab.train.run import resume, tune

        with quiet_transformers():
            return resume(what, shown) if isinstance(what, Path) else tune(what, shown)
    finally:
        shown.close()


def try_rates(recipe: Recipe) -> dict[str, Any]:
    """The learning-rate range test and its answer."""
    from trimtab.cli.progress import reporter
    from trimtab.models.starters import quiet_transformers
    from trimtab.train.find_rate import find_rate

    shown = reporter()
    try:
        with quiet_transformers():
            found = find_rate(recipe, shown)
    finally:
        shown.close()
    every = max(1, len(found.rates) // 12)
    table = [
        (f"{rate:.1e}", f"{loss:.4f}") for rate, loss in list(zip(found.rates, found.smooth, strict=True))[::every]
    ]
    say("\n" + columns([("learning rate", "loss, smoothed"), *table], right=(0, 1)))
    best = f"{found.suggested:g}" if found.suggested else "none: the loss fell nowhere"
    facts = [("steepest fall", best), ("the method's own", f"{found.default:g}"), ("plot", str(found.plot))]
    say("\n" + columns(facts))
    return {
        "rates": list(found.rates),
        "losses": list(found.losses),
        "suggested": found.suggested,
        "default": found.default,
        "plot": str(found.plot),
    }


def summary(result: Result) -> str:
    """What a run came to, in a few lines."""
    names = [name for name, value in result.before.items() if isinstance(value, float)]
    lines = columns(
        [("held out", "before", "after")]
        + [(name, figure(result.before[name]), figure(result.after.get(name))) for name in names],
        right=(1, 2),
    )
    facts = [
        ("trained", f"{result.trainable:,} of {result.total:,} parameters ({share(result.trainable, result.total)})"),
        ("time", f"{duration(result.seconds)}, {result.rows_per_second:.3g} rows/s"),
        ("peak memory", size(result.peak_memory_bytes) + expected(result)),
        ("run", str(result.directory)),
    ]
    next_steps = [f"trimtab chat {shell(result.directory)}", f"trimtab inspect {shell(result.directory)}"]
    return "\n".join([lines, "", columns(facts), "", heading("next"), *(f"  {step}" for step in next_steps)])


def expected(result: Result) -> str:
    """What the peak was predicted to be."""
    predicted = result.record.get("memory", {}).get("predicted_bytes")
    if not predicted or not result.peak_memory_bytes:
        return ""
    return f", predicted {size(predicted)} ({predicted / result.peak_memory_bytes - 1:+.1%})"


def shell(path: Path) -> str:
    """A path as one word of a command line."""
    import shlex

    return shlex.quote(str(path))


def document(result: Result) -> dict[str, Any]:
    """A run as plain data."""
    return {
        "directory": str(result.directory),
        "before": result.before,
        "after": result.after,
        "seconds": result.seconds,
        "rows_per_second": result.rows_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "trainable": result.trainable,
        "total": result.total,
        "record": result.record,
    }
