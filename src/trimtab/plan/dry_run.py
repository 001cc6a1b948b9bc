"""The real training step on the meta device: our loop's own functions on tensors that have sizes and no memory.

What is fast and frugal in the engine (low-rank products, norms and gates that keep little, siblings, the loss in
chunks) runs as it does in training, so what it keeps and drops is counted and not assumed. Where the engine decides by
a trial on numbers, the trial is made on a small copy that has numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import scratch
from trimtab.core.active import Activity
from trimtab.core.attach import attach
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.method import Placed
from trimtab.core.optimizer import Optimizer
from trimtab.core.registry import name_of
from trimtab.core.rounded import kept_in
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded
from trimtab.data.packing import Pack, bag, pack
from trimtab.engine.attention import can_pack, edited_ends, reads_positions
from trimtab.engine.encoder import Seam, candidates
from trimtab.engine.faster import running
from trimtab.engine.loss import Batch, loss_sum, on, terms_of
from trimtab.models.devices import DTYPES
from trimtab.plan.live import Live
from trimtab.plan.stand_ins import decoded_once, encoded_once, on_meta, standing
from trimtab.train.base import format_of, quantize_left, require_dense
from trimtab.train.placing import placed_parts
from trimtab.train.prepare import group_of
from trimtab.train.recipe import Recipe, build_method
from trimtab.train.updates import add_penalties, rule_of, schedule_of


@dataclass(frozen=True)
class Counted:
    """What a dry run came to."""

    points: tuple[dict[str, int], ...]
    """Bytes alive by category at the highest points of forward with the loss, of backward, and of the update."""
    kept: int
    """Bytes of activations when backward begins."""
    largest: int
    """Bytes of the largest tensor among weights and trained ones."""
    flops: int
    """Floating-point operations of matrix products and attention in one step."""
    tokens: int
    trained: int
    adapter_bytes: int
    state_bytes: int

    @property
    def live(self) -> dict[str, int]:
        """Bytes alive by category at the highest point of all."""
        return max(self.points, key=lambda point: sum(point.values()))

    @property
    def peak(self) -> int:
        return sum(self.live.values())


@dataclass
class Bench:
    """A model on the meta device, made ready for a step."""

    model: Any
    recipe: Recipe
    task: str
    packed: bool
    seam: Seam | None
    group: int | None


def prepared(recipe: Recipe, model: Any, task: str, new_modules: Sequence[str], length: int) -> Bench:
    """Quantize and attach on the meta device as a run does."""
    if recipe.dtype != "auto":
        model.to(DTYPES[recipe.dtype])
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    method = build_method(recipe)
    parts = placed_parts(method, recipe.where, new_modules, model)
    format = format_of(recipe)
    with encoded_once(format):
        return attached(recipe, model, task, length, parts, format, kind)


def attached(
    recipe: Recipe,
    model: Any,
    task: str,
    length: int,
    parts: Sequence[Placed],
    format: Format | None,
    kind: torch.dtype,
) -> Bench:
    """The second half of `prepared`."""
    require_dense(model, format)
    together = format is not None and any(part.method.takes_out for part in parts)
    if format is not None and not together:
        quantize_left(model, format)
    wanted = sorted({part.method.statistics for part in parts if part.method.statistics} - {"activations"})
    if wanted:  # a forward of one row is no matter
        raise UserError(f"the method starts from what is measured ({', '.join(wanted)})")
    masters = torch.float32 if kind in (torch.bfloat16, torch.float16) else None
    attach(model, parts, seed=recipe.seed, dtype=masters, quantize=format if together else None)
    if format is not None and together:
        quantize_left(model, format)
    seam, packed = None, False
    if recipe.packing != "off":
        if task in ("classify", "regress"):
            places = candidates(model) if not reads_positions(model) and can_bag(model, length) else []
            seam = Seam(places[0], 0) if places else None
            packed = seam is not None
        else:
            packed = task == "causal" and can_pack(model, length)
    return Bench(model, recipe, task, packed, seam, group_of(recipe, model, task, length))


def can_bag(model: Any, length: int) -> bool:
    """Whether labelled rows of this length would go through the encoder unpadded."""
    from trimtab.engine.attention import plain_attention

    return plain_attention(model, 2 * length)


def rows_of(count: int, length: int, task: str, trained: float, vocabulary: int) -> list[Encoded]:
    """Rows of one length, of which the last share is trained; no two share a beginning."""
    learned = max(1, round(trained * length)) if task in ("causal", "seq2seq") else 0
    found = []
    for row in range(count):
        ids = [(row * 31 + at * 7) % max(2, min(vocabulary, 1 << 14)) for at in range(length)]
        marks = [at >= length - learned for at in range(length)]
        label = 0 if task == "classify" else 0.0 if task == "regress" else None
        source = ids if task == "seq2seq" else None
        found.append(Encoded(ids, marks, label=label, row=row, source=source))
    return found


def batch_of(bench: Bench, rows: Sequence[Encoded]) -> Batch:
    """Rows as the loop would put them together, on the meta device."""
    if not bench.packed:
        made: Batch = collate(rows, 0)
    elif bench.seam is not None:
        made = bag(rows, bench.seam.first_position)
    else:
        made = pack(rows, None, edited_ends(bench.model) or ())
    return made


def dry_run(bench: Bench, batch: Batch, live: Live | None = None) -> Counted:
    """Run one step on the meta device, with the optimizer's state of earlier ones, and count what is alive."""
    model, recipe = bench.model, bench.recipe
    trained = [p for p in model.parameters() if p.requires_grad]
    live = live or Live()
    held = [tensor for p in trained for tensor in kept_in(p)]
    ids = {id(tensor) for tensor in held}
    live.declare((t for t in tensors_of(model) if id(t) not in ids), "weights")
    live.declare(held, "adapter")
    deltas = [module for module in model.modules() if isinstance(module, Delta)]
    terms = terms_of(batch)
    moved = on(batch, torch.device("meta"))
    kept = 0
    with ExitStack() as stack:
        stack.enter_context(on_meta(model, recipe, batch))
        stack.enter_context(decoded_once())
        policy = "block" if recipe.checkpointing == "offload" else recipe.checkpointing
        pieces = ("siblings",) if recipe.faster else ()
        stack.enter_context(
            running(model, packed=bench.packed, seam=bench.seam, pieces=pieces, policy=policy, group=bench.group)
        )
        optimizer, activity = updates(recipe, model, live)
        model.train()
        stack.enter_context(live)
        for handle in gradients_named(trained, live):
            stack.callback(handle.remove)
        stack.enter_context(loss_named(live))
        if activity is not None:
            activity.at(activity.heaviest(recipe.steps))
        optimizer.begin()
        live.forget_peak()
        with live.during("activations"):
            summed, _ = loss_sum(model, moved, bench.task)
            loss = summed / terms
        kept = live.now["activations"]
        points, rooms = [dict(live.at_peak)], scratch.held_bytes()
        live.forget_peak()
        with live.during("temporary"):
            loss.backward()
            add_penalties(deltas)
            del summed, loss
            points.append(dict(live.at_peak))
            live.forget_peak()
            optimizer.step()
            points.append(dict(live.at_peak))
        points[0]["temporary"] += scratch.held_bytes() - rooms  # the first step's backward has made them all
    if recipe.checkpointing == "offload":
        for point in points:
            point["activations"] = max(0, point["activations"] - kept)
    tokens = batch.row_tokens if isinstance(batch, Pack) else int(next(iter(token_counts(batch))))
    return Counted(
        points=tuple(points),
        kept=kept,
        largest=max((p.numel() * p.element_size() for p in model.parameters()), default=0),
        flops=live.flops,
        tokens=tokens,
        trained=sum(p.numel() for p in trained),
        adapter_bytes=sum(tensor.nbytes for tensor in held),
        state_bytes=live.now["optimizer"],
    )


def token_counts(batch: Any) -> Iterator[int]:
    """Tokens of a batch, one way or another."""
    ids = batch["input_ids"] if isinstance(batch, dict) else batch.ids
    yield ids.numel()


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter, buffer and plain tensor of the deltas."""
    yield from model.parameters()
    yield from model.buffers()


def gradients_named(trained: Sequence[Tensor], live: Live) -> list[Any]:
    """Hooks that count a finished gradient as such."""

    def named(p: Tensor) -> None:
        if p.grad is not None:
            live.declare([p.grad], "gradients")

    return [p.register_post_accumulate_grad_hook(named) for p in trained]


@contextmanager
def loss_named(live: Live) -> Iterator[None]:
    """What the loss makes on its own counts as logits."""
    from trimtab.engine import loss as module

    plain = module.chunked_cross_entropy

    def counted(*args: Any) -> Tensor:
        with live.during("logits"):
            return plain(*args)

    with standing(module, "chunked_cross_entropy", counted):
        yield


class FusedAdamW:
    """What torch's fused AdamW holds; it makes nothing on the way, and has no meta kernel."""

    def __init__(self, trained: Sequence[Tensor], live: Live) -> None:
        self.trained, self.live, self.state = trained, live, dict[Tensor, list[Tensor]]()

    def begin(self) -> None:
        """The state that earlier steps have left."""
        self.state.update({p: [torch.zeros_like(p), torch.zeros_like(p)] for p in self.trained if p.requires_grad})
        self.live.declare([one for pair in self.state.values() for one in pair], "optimizer")

    def step(self) -> None:
        """In place."""


class OwnRule:
    """An optimizer of ours: its state, and what a step makes on the way where that needs no value."""

    def __init__(self, optimizer: Optimizer, live: Live) -> None:
        self.optimizer, self.live, self.state = optimizer, live, optimizer.state

    def begin(self) -> None:
        """The state that earlier steps have left."""
        for p in (p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad):
            self.state[p] = self.optimizer._begin(p)
            self.live.declare([one for one in flat_tensors(self.state[p]) if one.is_meta], "optimizer")

    def step(self) -> None:
        """As far as it goes without values."""
        with suppress(RuntimeError, NotImplementedError, UserError):
            self.optimizer.step()


def flat_tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a nested state."""
    for value in state.values():
        if isinstance(value, dict):
            yield from flat_tensors(value)
        elif isinstance(value, Tensor):
            yield value


def updates(recipe: Recipe, model: nn.Module, live: Live) -> tuple[Any, Activity | None]:
    """The optimizer of a dry run and what is active when."""
    rule, schedule = rule_of(recipe), schedule_of(recipe)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if name_of(type(rule)) == "adamw":
        optimizer: Any = FusedAdamW([p for _, p in named], live)
    else:
        optimizer = OwnRule(Optimizer(named, rule, lr=1e-3, seed=recipe.seed), live)
    if schedule is None:
        return optimizer, None
    stand_in = torch.optim.SGD([p for _, p in named], lr=1e-3)
    stand_in.state = optimizer.state
    return optimizer, Activity(model, schedule, stand_in, recipe.seed)
