"""`trimtab quickstart`: a small model learns to turn messages into JSON records, and shows what changed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.tune import document, run, shell, summary
from trimtab.cli.verb import Verb, columns, duration, heading, say
from trimtab.train.recipe import Recipe, recipe_from

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from trimtab.evaluate.text import RecordScores

RECIPE: Mapping[str, Any] = {
    "model": "smollm2-135m-instruct",
    "method": "lora",
    "rank": 8,
    "learning_rate": 1e-3,
    "epochs": 1,
    "limit": 400,
    "batch_size": 4,
}
"""400 of the 480 shipped rows, once: more would not fit in the minutes that a first run should take."""
MAX_NEW_TOKENS = 64
SHOWN = 3


@click.command(cls=Verb, name="quickstart", short_help="Tune a small model on shipped data.")
@click.option("--output", help="Run directory to make; default: a numbered one under runs/.")
def command(output: str | None) -> dict[str, Any]:
    """Fetch a small chat model, tune LoRA on shipped rows, and show answers and scores before and after.

    Takes about five minutes on two CPU cores, once the model is here (93 MB to download). The model learns to file a
    message to a shop's front desk as a JSON record.
    """
    from trimtab.models.starters import fetch, starters

    started = time.perf_counter()
    if RECIPE["model"] in starters():
        fetch(RECIPE["model"], progress=say)
    with ExitStack() as stack:
        folder = resources.files("trimtab.data") / "quickstart"
        train, test = (stack.enter_context(resources.as_file(folder / f"{part}.jsonl")) for part in ("train", "test"))
        recipe = recipe_from({**RECIPE, "data": str(train), "heldout": str(test), "output": output})
        say(command_line(recipe) + "\n")
        result = run(recipe)
        rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    wanted = [row["completion"] for row in rows]
    answers = answers_of(result.directory, [row["prompt"] for row in rows])
    scores = {when: scored(given, wanted) for when, given in answers.items()}
    for row, before, after in list(zip(rows, answers["before"], answers["after"], strict=True))[:SHOWN]:
        say("\n" + heading(row["prompt"]))
        say(columns([("before", one_line(before)), ("after", one_line(after)), ("wanted", row["completion"])]))
    say(f"\n{len(rows)} held-out messages; no name and no item of theirs is in the training rows")
    say(table(scores["before"], scores["after"]) + "\n")
    say(summary(result))
    directory = shell(result.directory)
    say(columns([
        (f"trimtab merge {directory} --out tuned-model", "a plain model directory"),
        ("trimtab methods", "what else there is besides LoRA"),
        (f"trimtab tune --model {recipe.model} --data FILE", "your own rows"),
    ]))  # fmt: skip
    seconds = time.perf_counter() - started
    say(f"\nall of it took {duration(seconds)}")
    return {
        **document(result),
        "seconds_in_all": seconds,
        "scores": {when: one.document() for when, one in scores.items()},
        "examples": [
            {
                "prompt": row["prompt"],
                "wanted": row["completion"],
                **{when: given[place] for when, given in answers.items()},
            }
            for place, row in enumerate(rows[:SHOWN])
        ],
    }


def command_line(recipe: Recipe) -> str:
    """The `trimtab tune` command that does the same training."""
    return "\n    ".join(
        [
            f"trimtab tune --model {recipe.model} --method {recipe.method} --rank {recipe.settings['rank']} \\",
            f"--learning-rate {recipe.learning_rate:g} --epochs {recipe.epochs:g} --limit {recipe.limit} \\",
            f"--batch-size {recipe.batch_size} --data {shell(Path(recipe.data))} \\",
            f"--heldout {shell(Path(recipe.heldout))}",
        ]
    )


def answers_of(directory: Path, prompts: Sequence[str]) -> dict[str, list[str]]:
    """What the model of a run, read from disk, answers with its adapter off (`before`) and on (`after`)."""
    from trimtab.core.attach import activate
    from trimtab.models.starters import quiet_transformers
    from trimtab.train.rundir import open_run

    with quiet_transformers():
        model, tokenizer = open_run(directory).load()
    found = {}
    for when, adapter in (("before", None), ("after", "default")):
        say(f"answering {len(prompts)} held-out messages {when} tuning ...")
        activate(model, adapter)
        found[when] = answered(model, tokenizer, prompts)
    return found


def answered(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The greedy answer to each prompt, worded as training rows are."""
    from trimtab.data.examples import PromptCompletion
    from trimtab.data.wording import inference_prompt
    from trimtab.evaluate.generate import generate

    ids = [inference_prompt(PromptCompletion(prompt, ""), tokenizer) for prompt in prompts]
    return generate(model, tokenizer, ids, MAX_NEW_TOKENS, batch_size=30)


def scored(answers: Sequence[str], wanted: Sequence[str]) -> RecordScores:
    """Scores of answers that should be JSON records."""
    from trimtab.evaluate.text import record_scores

    return record_scores(answers, wanted)


def table(before: RecordScores, after: RecordScores) -> str:
    """Scores before and after tuning, side by side, as percentages."""
    rows = [("exact match", before.exact, after.exact), ("valid JSON", before.valid, after.valid)]
    rows += [(f"F1 of {name}", before.fields.get(name, 0.0), after.fields.get(name, 0.0)) for name in after.fields]
    shown = [(name, f"{100 * one:.1f}%", f"{100 * other:.1f}%") for name, one, other in rows]
    return columns([("score", "before", "after"), *shown], right=(1, 2))


def one_line(text: str, longest: int = 160) -> str:
    """Text on one line, cut to a readable length."""
    words = " ".join(text.split())
    return words if len(words) <= longest else words[:longest] + " ..."
