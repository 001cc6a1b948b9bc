"""The LM evaluation harness over a model of ours, through the harness's own interface (`pip install trimtab[harness]`).

What the harness asks for are log-likelihoods of continuations and of whole texts, and greedy answers up to a stop. All
run in batches of rows of like length, and logits exist for a few positions at a time, never for a whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.modes import evaluating
from trimtab.core.stack import prompts
from trimtab.data.batches import IGNORED
from trimtab.engine.loss import CHUNK, ends_with_head, only_positions
from trimtab.evaluate.choices import padded
from trimtab.evaluate.generate import generate, room_of

ANSWER = 256
"""Tokens of an answer where a task does not say."""
Progress = Callable[[int, int], None]


class Continued(NamedTuple):
    """Token ids, and the place of the first one that is scored; at least one stands before it."""

    ids: list[int]
    start: int


def continued(tokenizer: Any, context: str, continuation: str, longest: int) -> Continued:
    """A continuation behind its context as the harness has it: white space at the border belongs to the continuation.

    The model reads at most `longest` of the tokens, the last ones, and not the very last. An empty context is a token
    that begins texts.
    """
    if not context:
        ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        begin = beginning(tokenizer)
        whole, start = (ids, 1) if ids[:1] == [begin] else ([begin, *ids], 1)
    else:
        bare = context.rstrip()
        whole = list(tokenizer(context + continuation, add_special_tokens=False)["input_ids"])
        start = len(tokenizer(bare, add_special_tokens=False)["input_ids"])
    cut = max(0, len(whole) - longest - 1)
    return Continued(whole[cut:], max(1, start - cut))


def beginning(tokenizer: Any) -> int:
    """The token in front of a text that has no context."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError("harness: the tokenizer has no token that begins or ends a text")
    return int(found)


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, rows: Sequence[Continued], *, batch_size: int = 8, progress: Progress | None = None
) -> list[tuple[float, bool]]:
    """Σ log p of the scored tokens of every row, and whether each of them is the likeliest."""
    found = [(0.0, True)] * len(rows)
    order = sorted((at for at, row in enumerate(rows) if len(row.ids) > row.start), key=lambda at: -len(rows[at].ids))
    device = next(model.parameters()).device
    with evaluating(model):
        for begin in range(0, len(order), batch_size):
            group = order[begin : begin + batch_size]
            ids, mask = padded([rows[at].ids for at in group], device)
            labels = ids.masked_fill(mask == 0, IGNORED)
            for place, at in enumerate(group):
                labels[place, : rows[at].start] = IGNORED
            for at, told in zip(group, scored(model, ids, mask, labels), strict=True):
                found[at] = told
            if progress is not None:
                progress(begin + len(group), len(order))
    return found


def scored(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> list[tuple[float, bool]]:
    """(Σ log p, all likeliest) of the tokens of each row that `labels` names."""
    keep = labels[:, 1:] != IGNORED  # the last token is predicted, and read by nobody
    goals, row = labels[:, 1:][keep], keep.nonzero()[:, 0]
    inputs, labels = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "use_cache": False}, labels[:, :-1]
    each, likeliest = [], []
    for at, logits in enumerate(few_at_a_time(model, inputs, labels, keep)):
        here = goals[at * CHUNK : at * CHUNK + len(logits)]
        each.append(-F.cross_entropy(logits.float(), here, reduction="none"))
        likeliest.append(logits.argmax(-1) == here)
    sums = torch.zeros(len(ids), device=ids.device).index_add_(0, row, torch.cat(each))
    wrong = torch.zeros(len(ids), device=ids.device).index_add_(0, row, (~torch.cat(likeliest)).float())
    return list(zip(sums.tolist(), (wrong == 0).tolist(), strict=True))


def few_at_a_time(model: Any, inputs: Mapping[str, Any], labels: Tensor, keep: Tensor) -> Any:
    """The logits of the kept positions, in order, `CHUNK` of them at a time."""
    if not ends_with_head(model):
        with prompts(model, labels), only_positions(model, keep) as picked:
            logits = model(**inputs).logits
        yield from (logits if picked else logits[keep]).split(CHUNK)
        return
    head, held = model.get_output_embeddings(), list[Tensor]()

    def hold(module: nn.Module, args: Any) -> Any:
        held.append(args[0][keep])
        return (args[0][:1, :1], *args[1:])

    handle = head.register_forward_pre_hook(hold)
    try:
        with prompts(model, labels):
            model(**inputs)
    finally:
        handle.remove()
    for part in held[0].split(CHUNK):
        yield head(part)


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as the harness computes them. `folder` holds tasks of your own, in the harness's YAML.

    Errors: the package is missing, a task is unknown, a data set cannot be had, a model that does not write.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("harness: the package lm-eval is not here", fix="pip install 'trimtab[harness]'") from None
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise UserError(f"harness: {type(model).__name__} does not write texts", fix="a causal model")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [one for one in tasks if one not in manager.all_tasks]:
        close = nearest(unknown[0], manager.all_tasks, n=3)
        raise UserError(
            f"harness: no task {listing(unknown)}", fix=f"did you mean {listing(close)}?" if close else None
        )
    try:
        found = lm_eval.simple_evaluate(
            model=asked_model(model, tokenizer, batch_size, progress),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            f"harness: {listing(list(tasks))} ended with {type(error).__name__}: {reason}",
            fix="its data set has to be in the cache of `datasets`, or to be fetched",
        ) from error
    return {name: measures(values) for name, values in found["results"].items()}


def measures(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task, by the plain names of their metrics."""
    found = {}
    for key, value in values.items():
        name, _, way = str(key).partition(",")
        if isinstance(value, int | float) and not name.endswith("_stderr") and name not in ("alias", "sample_len"):
            found[name if way in ("none", "") else f"{name} ({way})"] = float(value)
    return found


def asked_model(model: Any, tokenizer: Any, batch_size: int, progress: Progress | None) -> Any:
    """The model as the harness asks it."""
    from lm_eval import utils
    from lm_eval.api.model import LM

    longest = room_of(model)

    class Asked(LM):  # type: ignore[misc,unused-ignore]
        """Requests carry their arguments as `args`; answers come back in their order."""

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            rows = [continued(tokenizer, one.args[0], one.args[1], longest) for one in requests]
            return log_likelihoods(model, rows, batch_size=batch_size, progress=progress)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            rows, owner = [], []
            for place, one in enumerate(requests):
                ids = tokenizer(one.args[0], add_special_tokens=False)["input_ids"]
                windows = utils.get_rolling_token_windows(ids, beginning(tokenizer), longest, 1)
                for context, own in map(utils.make_disjoint_window, windows):
                    rows.append(Continued([*context, *own], len(context)))
                    owner.append(place)
            sums = [0.0] * len(requests)
            told = log_likelihoods(model, rows, batch_size=batch_size, progress=progress)
            for place, (value, _) in zip(owner, told, strict=True):
                sums[place] += value
            return sums

        def generate_until(self, requests: Any) -> list[str]:
            alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
            for place, one in enumerate(requests):
                given = dict(one.args[1])
                if given.get("do_sample") or given.get("temperature"):
                    raise UserError("harness: answers are greedy, and the task draws them", fix="another task")
                until = given.get("until") or []
                stops = (until,) if isinstance(until, str) else tuple(until)
                most = int(given.get("max_gen_toks") or given.get("max_new_tokens") or ANSWER)
                alike.setdefault((stops, most), []).append(place)
            answers = [""] * len(requests)
            for (stops, most), places in alike.items():
                room = max(1, longest - most)
                ids = [tokenizer(requests[at].args[0], add_special_tokens=False)["input_ids"][-room:] for at in places]
                texts = generate(model, tokenizer, ids, most, batch_size, progress, until=stops)
                for at, text in zip(places, texts, strict=True):
                    answers[at] = text
            return answers

    return Asked()
