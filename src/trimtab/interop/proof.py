"""A proof that two models compute the same: their log-probabilities side by side, on rows of real data."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.engine.precision import exactly
from trimtab.train.rundir import Run

PROBES, PROBE_TOKENS = 4, 128
"""Rows on which models are compared, and their longest length in tokens."""
LARGEST = 4_000_000_000
"""Bytes of log-probabilities that are kept of one model at most."""
TOLERANCE = {"float32": 5e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of log-probabilities that rounding explains."""


@dataclass(frozen=True)
class Difference:
    """How far the log-probabilities of two models lie apart."""

    largest: float
    mean: float
    greedy_agreement: float
    """Share of positions at which both find the same token most likely."""
    loss: float | None
    """Mean loss of the second one on the next tokens of the rows; None where rows have no next token."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def probes(run: Run | None, model: nn.Module, tokenizer: Any, count: int = PROBES) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and what they are: the first rows of the run's data, else random ids."""
    from trimtab.data.encode import encode_all
    from trimtab.data.mixture import gather
    from trimtab.evaluate.generate import room_of

    longest = min(PROBE_TOKENS, room_of(model) - 1)
    if run is not None and Path(run.recipe.data).is_file():
        known = (run.record.get("data") or {}).get("sha256")
        with suppress(UserError):  # rows that cannot be read or encoded alone are no obstacle to merging
            found = gather(run.recipe.data, run.recipe.columns)
            if found.sha256 == known:
                rows = found.parts[0].rows[:count]
                made = encode_all(rows, tokenizer, max_length=None, train_on="all")
                return [row.ids[:longest] for row in made], f"{len(made)} rows of the run's data"
    return random_rows(model, tokenizer, count, longest)


def rows_of(path: str | Path, tokenizer: Any, model: nn.Module, count: int = PROBES) -> tuple[list[list[int]], str]:
    """Token ids of the first rows of a data file the user names."""
    from trimtab.data.encode import encode_all
    from trimtab.data.forms import detect, examples
    from trimtab.data.reading import read
    from trimtab.evaluate.generate import room_of

    longest = min(PROBE_TOKENS, room_of(model) - 1)
    table = read(str(path))
    made = encode_all(examples(table, detect(table, None))[:count], tokenizer, max_length=None, train_on="all")
    return [row.ids[:longest] for row in made], f"{len(made)} rows of {path}"


def random_rows(model: nn.Module, tokenizer: Any, count: int, longest: int) -> tuple[list[list[int]], str]:
    """Rows of random ids, the same every time."""
    draw = random.Random(0)
    words = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    length = min(16, longest)
    return [[draw.randrange(words) for _ in range(length)] for _ in range(count)], f"{count} rows of random ids"


def log_probabilities(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """log softmax of the model's outputs for each row alone, on the CPU; a single output stays as it is.

    Computed in float32 where there is room for that: of two models of half precision what is left between them is then
    the rounding of their weights.
    """
    device = next(model.parameters()).device
    outputs: list[Tensor] = []
    encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    with torch.no_grad(), exactly(model):
        for ids in rows:
            given = torch.tensor([list(ids)], device=device)
            more = {"decoder_input_ids": given} if encoder else {}
            outputs.append(model(input_ids=given, **more).logits[0].float().cpu())
            need = outputs[0].numel() * outputs[0].element_size() * len(rows)
            if need > LARGEST:
                fitting = max(1, int(LARGEST * len(rows) / need))
                told = f"the log-probabilities of {len(rows)} rows take {need / 1e9:.1f} GB"
                raise UserError(f"merge: {told}", fix=f"--rows {fitting}")
    return [one if one.shape[-1] == 1 else torch.log_softmax(one, -1) for one in outputs]


def difference(one: Sequence[Tensor], other: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Difference:
    """The second list of log-probabilities against the first."""
    gaps = [(a - b).abs() for a, b in zip(one, other, strict=True)]
    largest = max(float(gap.max()) for gap in gaps)
    mean = math.fsum(float(gap.double().sum()) for gap in gaps) / sum(gap.numel() for gap in gaps)
    alike = [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(one, other, strict=True)]
    share = float(torch.cat(alike).double().mean())
    return Difference(largest, mean, share, loss_of(other, rows))


def loss_of(found: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> float | None:
    """Mean loss on the next token of every position but the last."""
    losses = losses_of(found, rows)
    return float(torch.cat(losses).mean()) if losses else None


def losses_of(found: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Losses on the next tokens, row by row; none where a model does not write."""
    losses = []
    for values, ids in zip(found, rows, strict=True):
        if values.ndim == 2 and values.shape[0] == len(ids) > 1 and values.shape[1] > max(ids):
            losses.append(-values[:-1].gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].double())
    return losses


def better(one: Sequence[Tensor], other: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> bool:
    """Whether the second model's loss is lower by more than two standard errors of the paired difference."""
    first, second = losses_of(one, rows), losses_of(other, rows)
    if not first:
        return False
    gain = torch.cat(first) - torch.cat(second)
    return len(gain) > 1 and bool(gain.mean() > 2 * gain.std() / len(gain) ** 0.5)


def table(found: Mapping[str, Difference]) -> list[list[str]]:
    """The rows of a table, its heading first."""
    lines = [["", "largest", "mean", "greedy", "loss"]]
    for name, one in found.items():
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        lines.append([name, f"{one.largest:.2g}", f"{one.mean:.2g}", f"{one.greedy_agreement:.2%}", loss])
    return lines
