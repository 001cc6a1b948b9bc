"""`trimtab eval`: measure a run, an adapter or a plain model on a data file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, figure, heading, is_machine, say
from trimtab.core.errors import UserError, listing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

WRITTEN = ("exact", "f1", "bleu", "nist", "rouge_l", "cider_d", "meteor_exact")
METRICS = ("loss", *WRITTEN, "choices")


@dataclass
class Subject:
    """What is measured: a model with its tokenizer, and the recipe and record of its run where it has one."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: str
    settings: Mapping[str, Any]
    labels: Any = None
    directory: Path | None = None


@dataclass(frozen=True)
class Options:
    """What is measured on, and how."""

    data: str
    roles: str = ""
    reference_text: str | None = None
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 64
    max_length: int | None = None


@click.command(cls=Verb, name="eval", short_help="Measure a run or a model on a data file.")
@click.argument("subject", metavar="RUN_OR_MODEL")
@click.option("--data", help="Rows: jsonl, json, csv, tsv, parquet or txt, also gzipped.")
@click.option("--harness", help="Tasks of the LM evaluation harness, with commas, in place of --data.")
@click.option("--harness-tasks", help="A folder with tasks of your own, in the harness's YAML.")
@click.option("--shots", type=int, help="Examples in front of each question of the harness.")
@click.option("--adapter", help="An adapter directory, over a plain model.")
@click.option("--metrics", default="loss", show_default=True, help=f"With commas: {', '.join(METRICS)}; or all.")
@click.option("--columns", "roles", default="", help="Which column plays which role: prompt=mr,completion=ref.")
@click.option(
    "--reference-text", help="A text file, or built-in: its loss, and for a run its change, which is forgetting."
)
@click.option("--limit", type=int, help="Use at most this many rows.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows at a time.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Longest answer.")
@click.option("--max-length", type=int, help="Cut longer rows at so many tokens.")
@click.option("--base", is_flag=True, help="Also measure the model without its adapter.")
@click.option("--dtype", default="auto", show_default=True, help="Floating type of a plain model's weights.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option("--output", help="Also write the result, with every answer, to this JSON file.")
def command(
    subject: str,
    data: str | None,
    harness: str | None,
    harness_tasks: str | None,
    shots: int | None,
    adapter: str | None,
    metrics: str,
    roles: str,
    reference_text: str | None,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    max_length: int | None,
    base: bool,
    dtype: str,
    device: str,
    output: str | None,
) -> dict[str, Any]:
    """Measure a run directory, or a model with or without an adapter, on rows of a file.

    loss gives loss and perplexity per token, a classifier's accuracy, F1 and Matthews correlation, or correlations.
    exact, f1, bleu, nist, rouge_l, cider_d and meteor_exact score greedy answers; rows with equal prompts are one input
    with several references. choices asks for the likeliest of several continuations.

    \b
        trimtab eval runs/smollm2-lora-1 --data testset_w_refs.csv --columns prompt=mr,completion=ref --metrics all
        trimtab eval smollm2-135m-instruct --data openbookqa.json --metrics choices
        trimtab eval runs/smollm2-lora-1 --harness lambada_openai,piqa --limit 200   # pip install trimtab[harness]
    """
    if (data is None) == (harness is None):
        raise UserError("eval: what is measured is --data or --harness, one of them", fix="--data rows.jsonl")
    if data is None:
        assert harness is not None
        return by_harness(
            subject, harness, harness_tasks, shots, adapter, limit, batch_size, base, dtype, device, output
        )
    wanted = metrics_of(metrics)
    options = Options(data, roles, reference_text, limit, batch_size, max_new_tokens, max_length)
    found = opened(subject, adapter, dtype, device)
    result: dict[str, Any] = {"subject": subject, "data": data, "task": found.task}
    result["scores"], answers = measured(found, wanted, options)
    if base:
        from trimtab.core.attach import activate

        if found.settings.get("plain"):
            raise UserError("eval: --base needs a run or an adapter", fix="leave --base out: a plain model is the base")
        activate(found.model, None)
        result["base"], _ = measured(found, wanted, options)
        activate(found.model, "default")
    say(table(result))
    target = Path(output) if output else found.directory / f"eval-{Path(data).stem}.json" if found.directory else None
    if target is not None:
        from trimtab.core.files import write_together

        content = json.dumps(result | {"answers": answers}, indent=1, ensure_ascii=False) + "\n"
        write_together(target.absolute().parent, {target.name: content.encode()})
        say(f"\nwritten  {target}")
        result["written"] = str(target)
    return result


def by_harness(
    subject: str,
    tasks: str,
    folder: str | None,
    shots: int | None,
    adapter: str | None,
    limit: int | None,
    batch_size: int,
    base: bool,
    dtype: str,
    device: str,
    output: str | None,
) -> dict[str, Any]:
    """What the LM evaluation harness says of a run or a model."""
    from trimtab.core.attach import activate
    from trimtab.core.files import write_together
    from trimtab.evaluate.harness import harness

    names = [one.strip() for one in tasks.split(",") if one.strip()]
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"eval: --harness-tasks {folder} is no folder", fix="a folder of the harness's YAML files")
    found = opened(subject, adapter, dtype, device)
    if base and found.settings.get("plain"):
        raise UserError("eval: --base needs a run or an adapter", fix="leave --base out: a plain model is the base")

    def scores() -> dict[str, dict[str, float]]:
        with bar("requests", 0) as tick:
            return harness(
                *(found.model, found.tokenizer, names),
                **{"folder": folder, "limit": limit, "shots": shots, "batch_size": batch_size, "progress": tick},
            )

    result: dict[str, Any] = {"subject": subject, "task": found.task, "harness": scores()}
    if base:
        activate(found.model, None)
        result["base"] = scores()
        activate(found.model, "default")
    head = ("task", "metric", "value", *(["base"] if base else []))
    lines = [
        (task, metric, f"{value:.4f}", *([f"{result['base'][task][metric]:.4f}"] if base else []))
        for task, values in result["harness"].items()
        for metric, value in values.items()
    ]
    say(heading("LM evaluation harness") + "\n" + columns([head, *lines], right=(2, 3)[: len(head) - 2]))
    if output:
        content = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        write_together(Path(output).absolute().parent, {Path(output).name: content.encode()})
        say(f"\nwritten  {output}")
        result["written"] = output
    return result


def metrics_of(text: str) -> list[str]:
    """The metrics asked for; an unknown one is an error with the known ones."""
    names = [one.strip().lower().replace("-", "_") for one in text.split(",") if one.strip()]
    if names == ["all"]:
        return ["loss", *WRITTEN]
    if unknown := [one for one in names if one not in METRICS]:
        raise UserError(f"eval: no metric {listing(unknown)}", fix=f"metrics: {listing(METRICS)}, or all")
    if not names:
        raise UserError("eval: no metrics", fix=f"metrics: {listing(METRICS)}, or all")
    return names


def opened(subject: str, adapter: str | None, dtype: str, device: str) -> Subject:
    """A run directory, or a plain model with an adapter over it."""
    from trimtab.train.rundir import RECORD, open_run

    if (Path(subject) / RECORD).is_file():
        if adapter:
            raise UserError("eval: a run has its adapter", fix="give the model's name with --adapter")
        run = open_run(subject)
        model, tokenizer = run.load(device)
        report = (run.record.get("data") or {}).get("report") or {}
        kept = {key: getattr(run.recipe, key) for key in ("columns", "max_length", "train_on")}
        labels = report.get("labels") or run.record.get("labels")
        return Subject(model, tokenizer, run.record["task"], kept, labels, Path(subject))
    from trimtab.models.loading import load
    from trimtab.models.tasks import writing_task

    task = writing_task(subject)
    loaded = load(subject, task=task, dtype=dtype, device=device, progress=lambda line: say(line, err=True))
    if adapter:
        from trimtab.core.save import load as load_adapter

        load_adapter(loaded.model, adapter, trainable=False)
    return Subject(loaded.model.eval(), loaded.tokenizer, task, {"plain": not adapter})


def measured(
    subject: Subject, wanted: Sequence[str], options: Options
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Every metric asked for, and the answers that were scored."""
    from trimtab.data.reading import read
    from trimtab.train.settings import pairs

    table = read(options.data)
    try:
        given = pairs(options.roles) or dict(subject.settings.get("columns") or {})
    except ValueError as error:
        raise UserError(f"eval: --columns: {error}", fix="--columns prompt=mr,completion=ref") from None
    scores: dict[str, float] = {}
    answers: list[dict[str, Any]] = []
    if "choices" in wanted:
        scores |= choices(subject, table.rows[: options.limit], str(table.path))
    if set(wanted) - {"choices"}:
        from trimtab.data.forms import detect, examples
        from trimtab.data.splitting import take

        rows = examples(table, detect(table, given or None))
        if "loss" in wanted:
            scores |= losses(subject, take(rows, options.limit), options)
        if written := [one for one in wanted if one in WRITTEN]:
            more, answers = generated(subject, rows, written, options)
            scores |= more
    if options.reference_text not in (None, "none"):
        scores["reference_loss"] = reference(subject, options)
    return scores, answers


def losses(subject: Subject, rows: Sequence[Any], options: Options) -> dict[str, float]:
    """Loss and what goes with it for the task."""
    from trimtab.data.encode import encode_all
    from trimtab.evaluate.glue import labelled_scores
    from trimtab.evaluate.loss import evaluate
    from trimtab.models.tasks import decoder_start

    settings: dict[str, Any] = {"max_length": options.max_length or subject.settings.get("max_length")}
    settings["truncation"] = "right"
    settings |= {"train_on": subject.settings["train_on"]} if "train_on" in subject.settings else {}
    if subject.task == "seq2seq":
        settings["decoder_start"] = decoder_start(subject.model.config)
    encoded = encode_all(rows, subject.tokenizer, labels=labels_of(subject, rows), **settings)
    pad = int(subject.tokenizer.pad_token_id)
    with bar("loss", len(encoded)) as tick:
        found = evaluate(subject.model, encoded, subject.task, pad, batch_size=options.batch_size, progress=tick)
    if subject.task in ("classify", "regress"):
        found |= labelled_scores(subject.model, encoded, subject.task, pad, options.batch_size)
    return found


def labels_of(subject: Subject, rows: Sequence[Any]) -> Any:
    """The classes in the order the model has them."""
    if subject.task != "classify" or subject.labels is None:
        return None
    from trimtab.data.labelled import labels_of as found_in

    known, found = [str(one) for one in subject.labels], found_in(rows)
    if unknown := sorted({str(one) for one in found} - set(known)):
        raise UserError(f"eval: labels {listing(unknown)} are none of the model's: {listing(known)}")
    by_name = {str(one): one for one in found}
    return tuple(by_name.get(name, name) for name in known)


def generated(
    subject: Subject, rows: Sequence[Any], wanted: Sequence[str], options: Options
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Greedy answers to every distinct prompt, scored against all its completions."""
    from trimtab.data.examples import PromptCompletion
    from trimtab.data.wording import inference_prompt
    from trimtab.evaluate.generate import generate
    from trimtab.evaluate.overlap import corpus_scores
    from trimtab.evaluate.text import exact_match, token_f1

    if subject.task not in ("causal", "seq2seq") or not all(isinstance(one, PromptCompletion) for one in rows):
        raise UserError(f"eval: {listing(wanted)} need rows of prompt and completion, and a model that writes")
    inputs: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        inputs.setdefault(row.prompt_key(), []).append(row)
    groups = list(inputs.values())[: options.limit]
    reads = subject.task == "seq2seq"
    prompts = [inference_prompt(group[0], subject.tokenizer, encoder=reads) for group in groups]
    with bar("answers", len(prompts)) as tick:
        answers = generate(subject.model, subject.tokenizer, prompts, options.max_new_tokens, options.batch_size, tick)
    references = [[row.completion for row in group] for group in groups]
    scores: dict[str, float] = {"inputs": len(groups)}
    for name, one in (("exact", exact_match), ("f1", token_f1)):
        if name in wanted:
            best = [
                max(one([answer], [other]) for other in found)
                for answer, found in zip(answers, references, strict=True)
            ]
            scores[name] = sum(best) / len(best)
    if set(wanted) - {"exact", "f1"}:
        overlap = corpus_scores(answers, references)
        scores |= {name: overlap[name] for name in wanted if name in overlap}
    kept = [
        {"prompt": group[0].prompt, "answer": answer, "references": found}
        for group, answer, found in zip(groups, answers, references, strict=True)
    ]
    return scores, kept


def choices(subject: Subject, rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, float]:
    """Accuracies of multiple choice."""
    from trimtab.evaluate.choices import accuracies, questions, score

    if subject.task != "causal":
        raise UserError(f"eval: choices need a model that writes, not one for {subject.task}")
    asked = questions(rows, where)
    with bar("questions", len(asked)) as tick:
        return {"questions": len(asked)} | accuracies(score(subject.model, subject.tokenizer, asked, progress=tick))


def reference(subject: Subject, options: Options) -> float:
    """Loss per token of a text."""
    from trimtab.evaluate.reference import reference_loss

    if subject.task != "causal":
        raise UserError(f"eval: a model for {subject.task} has no loss on a text", fix="leave --reference-text out")
    asked = str(options.reference_text)
    return reference_loss(subject.model, subject.tokenizer, asked, batch_size=options.batch_size)


def bar(title: str, total: int) -> Any:
    """A progress bar in a terminal; what it yields is called with (done, all)."""
    import sys

    if is_machine() or not sys.stderr.isatty():
        return nullcontext(None)
    return Bar(title, total)


class Bar:
    """A bar of rich, as a context."""

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(title, total=total)

    def __enter__(self) -> Callable[[int, int], None]:
        self.progress.start()
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *unused: object) -> None:
        self.progress.stop()


def table(result: Mapping[str, Any]) -> str:
    """The scores for people, with those of the base beside them."""
    rows = [
        (name, shown(value), shown(result.get("base", {}).get(name, ""))) for name, value in result["scores"].items()
    ]
    head = [("", "tuned", "base")] if "base" in result else []
    return heading(f"{result['subject']} on {result['data']}") + "\n" + columns([*head, *rows], right=(1, 2))


def shown(value: Any) -> str:
    """A score in four digits."""
    return figure(float(value)) if isinstance(value, float) else f"{value}"
