"""What adapters cost in use: the forward pass and the next token of each kind, switching, and rows that differ.

Ways that are compared take turns, so that a busy machine slows all of them alike; what is told is the median over the
rounds of the ratio within a round, with the interval of that median by the sign test (95 %). Merged weights are the
plain model: `base` is both.
"""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import activate, attach, detach
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.method import InputMethod, Placed
from trimtab.core.quantized import quantize
from trimtab.core.save import load, save

BASE = "base"
JOBS = ("forward", "step")
FEWEST = 6
"""Rounds below which no interval of 95 % exists."""


@dataclass(frozen=True)
class Timed:
    """One way of doing a job: seconds (median over the rounds), and its ratio to the first way with an interval."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def in_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    repeats: int = 1,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> list[Timed]:
    """Time every way once a round, after one round to warm up; ratios are to the first way.

    Every round begins with another way, so that none always follows the same one.
    With `repeats` a round's time is the mean of so many calls, for what is over in microseconds. What is in `before`
    under a way's name is done ahead of each of its turns, off the clock.
    """
    if rounds < 1:
        raise UserError(f"bench: {rounds} rounds measure nothing", fix="--rounds 15")
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(rounds + 1):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            if before and name in before:
                before[name]()
            waited()
            started = time.perf_counter()
            for _ in range(repeats):
                ways[name]()
            waited()
            if number:
                times[name].append((time.perf_counter() - started) / repeats)
    found = []
    for name, own in times.items():
        ratios = [one / other for one, other in zip(own, times[order[0]], strict=True)]
        found.append(Timed(name, statistics.median(own), statistics.median(ratios), *interval(ratios)))
    return found


def waited() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median: the order statistics k and n+1-k, k the largest with 2·P(Bin(n, ½) < k) ≤ 0.05.

    Below `FEWEST` values there is none; the smallest and the largest are returned.
    """
    n, k, below = len(values), 0, 0.0
    while k < n / 2:
        below += math.comb(n, k) / 2**n
        if 2 * below > 0.05:
            break
        k += 1
    ordered = sorted(values)
    at = max(k, 1) - 1
    return ordered[at], ordered[n - 1 - at]


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same memory, frozen: what is attached to it leaves the model alone."""
    memo: dict[int, Any] = {id(one): one for one in model.buffers()}
    memo |= {id(one): nn.Parameter(one.data, requires_grad=False) for one in model.parameters()}
    return copy.deepcopy(model, memo)


def prepared(model: nn.Module, parts: Sequence[Placed], format: Format | None) -> nn.Module:
    """A copy with a method attached, its frozen weights in a format where one is given."""
    made = stored(model, parts, format)
    return attach(made, list(parts), quantize=format if takes_out(parts) else None).eval()


def stored(model: nn.Module, parts: Sequence[Placed], format: Format | None) -> nn.Module:
    """A copy whose linear weights are in a format, unless the method takes something out of them before."""
    made = sharing(model)
    return made if format is None or takes_out(parts) else quantize(made, format)


def takes_out(parts: Sequence[Placed]) -> bool:
    """Whether a start takes something out of a weight before it is stored in a format."""
    return any(part.method.takes_out for part in parts)


def only_last(model: Any) -> dict[str, int]:
    """What asks a model for the logits of the last token only, where it can be asked."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def forward_of(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A forward pass over rows, the logits of the last token only where the model writes.

    Where an encoder reads the row, the decoder writes its first token.
    """
    more: dict[str, Any] = only_last(model)
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids[:, :1]
    return lambda: model(input_ids=ids, **more).logits


def step_of(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """The next token of every row behind those that are cached already."""
    cache = model(input_ids=ids, use_cache=True, **only_last(model)).past_key_values

    def once() -> Tensor:
        logits: Tensor = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return once


def tokens(model: Any, batch: int, length: int) -> Tensor:
    """Rows of random tokens, the same every time."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def check(model: Any, job: str, length: int, methods: Mapping[str, Sequence[Placed]]) -> None:
    """Refuse a job that the model cannot do, and rows longer than it reads."""
    if job not in JOBS:
        raise UserError(f"bench: no job {job!r}", fix=f"one of {', '.join(JOBS)}")
    name = type(model).__name__
    if job == "step" and (model.config.is_encoder_decoder or not model.can_generate()):
        raise UserError(f"bench: {name} has no next token behind a cached row", fix="job forward, or a causal model")
    config = model.config.get_text_config()
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    paddings = [module.padding_idx for path, module in model.named_modules() if path.endswith("position_embeddings")]
    offset = max([one + 1 for one in paddings if one is not None], default=0)
    most = min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=None)
    for method, parts in methods.items():
        own = sum(part.method.virtual_tokens for part in parts if isinstance(part.method, InputMethod))
        more = own + offset + (job == "step")
        if most is not None and length + more > most:
            adds = f" and {method} adds {own}" if own else ""
            raise UserError(
                f"bench: rows of {length} tokens are too long: {name} has {most} positions{adds}",
                fix=f"--length {max(1, most - more)}",
            )


@dataclass(frozen=True)
class Cell:
    """All ways at one batch size and length."""

    batch: int
    length: int
    timed: tuple[Timed, ...]


@torch.no_grad()
def latency(
    model: nn.Module,
    methods: Mapping[str, Sequence[Placed]],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    rounds: int = 15,
    job: str = "forward",
    formats: Mapping[str, Format] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """Seconds of a forward pass, or of the next token (`step`), with every method attached, beside the plain model.

    Adapters are as they start, which costs what trained ones cost. Weights are shared by all copies but those that
    `formats` names: these hold them in the method's format, and the plain model beside them stays dense.
    """
    for length in lengths:
        check(model, job, length, {BASE: [], **methods})
    made: dict[str, Any] = {BASE: sharing(model).eval()}
    for name, parts in methods.items():
        made[name] = prepared(model, parts, (formats or {}).get(name))
    cells = []
    for batch in batches:
        for length in lengths:
            tell(f"{batch} × {length}")
            ids = tokens(model, batch, length)
            ways = {name: (forward_of if job == "forward" else step_of)(one, ids) for name, one in made.items()}
            cells.append(Cell(batch, length, tuple(in_turns(ways, rounds, 1 if job == "forward" else 5))))
    return cells


@dataclass(frozen=True)
class Switching:
    """Seconds to go to another adapter, by how it is done, and the bytes of one saved adapter."""

    timed: tuple[Timed, ...]
    saved_bytes: int
    adapters: int


def switching(
    model: nn.Module, parts: Sequence[Placed], *, adapters: int = 8, rounds: int = 15, format: Format | None = None
) -> Switching:
    """The time to switch between adapters that are loaded, and to read one from disk in place of another."""
    model = stored(model, parts, format)
    names = [f"bench{number}" for number in range(adapters)]
    for seed, name in enumerate(names):
        attach(model, list(parts), name=name, seed=seed)
    at = 0

    def loaded() -> None:
        nonlocal at
        at = (at + 1) % adapters
        activate(model, names[at])

    with tempfile.TemporaryDirectory() as folder:
        saved = save(model, Path(folder) / "adapter", name=names[0])
        size = sum(one.stat().st_size for one in Path(saved).iterdir())

        def from_disk() -> None:
            detach(model, "fresh")
            load(model, Path(folder) / "adapter", name="fresh")

        load(model, Path(folder) / "adapter", name="fresh")
        timed = in_turns({"loaded already": loaded, "from disk": from_disk}, rounds)
    return Switching(tuple(timed), size, adapters)


@torch.no_grad()
def mixed(
    model: nn.Module,
    parts: Sequence[Placed],
    *,
    rows: int = 16,
    length: int = 64,
    rounds: int = 15,
    job: str = "forward",
    format: Format | None = None,
) -> list[Timed]:
    """A batch of which every row has its own adapter, beside the same batch with one for all, and with none."""
    check(model, job, length, {BASE: parts})
    if rows < 2:
        raise UserError(f"bench: {rows} row cannot differ from another", fix="--batch 16")
    plain, model = sharing(model).eval(), stored(model, parts, format)
    names = [f"bench{number}" for number in range(rows)]
    for seed, name in enumerate(names):
        attach(model, list(parts), name=name, seed=seed)
    model.eval()
    ids = tokens(model, rows, length)
    make = forward_of if job == "forward" else step_of
    ways, before = dict[str, Callable[[], Any]](), dict[str, Callable[[], Any]]()
    for label, choice in (("one for all", names[0]), ("one for each", names)):
        activate(model, choice)
        ways[label] = once = make(model, ids)

        def chosen(once: Callable[[], Any] = once, choice: Any = choice) -> None:
            activate(model, choice)
            once()  # factors of the rows are stacked here

        before[label] = chosen
    ways["none"] = make(plain, ids)
    return in_turns(ways, rounds, 1 if job == "forward" else 5, before)
