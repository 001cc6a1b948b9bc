"""The real training step on the meta device: our loop's own functions on tensors that have sizes and no memory.

What is fast and frugal in the engine (low-rank products, norms and gates that keep little, siblings, the loss in
chunks) runs as it does in training, so what it keeps and drops is counted and not assumed. Where the engine decides by
a trial on numbers, the trial is made on a small copy that has numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as experimental

from trimtab.core import code, scratch
from trimtab.core.active import Activity
from trimtab.core.attach import attach
from trimtab.core.attention import attention as through_edits
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.method import Placed
from trimtab.core.optimizer import Optimizer
from trimtab.core.registry import name_of
from trimtab.core.rounded import kept_in
from trimtab.core.swap import swap_alike
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded
from trimtab.data.packing import Pack, bag, pack
from trimtab.engine.attention import can_pack, edited_ends, reads_positions
from trimtab.engine.encoder import Seam, candidates
from trimtab.engine.faster import quick_gate, quick_norm, running
from trimtab.engine.loss import Batch, loss_sum, on, terms_of
from trimtab.models.devices import DTYPES
from trimtab.plan.live import Live
from trimtab.train.base import format_of, quantize_left, require_dense
from trimtab.train.prepare import group_of, placed_parts
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


@contextmanager
def encoded_once(format: Format | None) -> Iterator[None]:
    """Encode one weight of each shape: on the meta device the others would come to the same sizes, slowly."""
    if format is None:
        yield
        return
    cls, plain = type(format), type(format).encode
    known: dict[Any, dict[str, Tensor]] = {}

    def encode(self: Any, W: Tensor) -> dict[str, Tensor]:
        key = (self, W.shape, W.dtype)
        if not W.is_meta:
            return plain(self, W)
        if key not in known:
            known[key] = plain(self, W)
        return {name: torch.empty_like(tensor) for name, tensor in known[key].items()}

    with standing(cls, "encode", encode):
        yield


@contextmanager
def decoded_once() -> Iterator[None]:
    """Decode one weight of each kind as its format does, the others by what that one needed on the way."""
    plain = code._decoded
    known: dict[str, tuple[int, torch.dtype]] = {}

    def decoded(tensors: Sequence[Tensor], key: str) -> Tensor:
        if not tensors[0].is_meta:
            return plain(tensors, key)
        if key not in known:
            with Live() as inner:
                W = plain(tensors, key)
            known[key] = (max(0, inner.peak - W.nbytes), W.dtype)
            return W
        extra, dtype = known[key]
        room = torch.empty(extra, dtype=torch.uint8, device="meta")
        W = torch.empty(code._recipe(key).shape, dtype=dtype, device="meta")
        del room
        return W

    with standing(code, "_decoded", decoded):
        yield


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


# ------------------------------------------------------------------------------------ standing in for trials


@contextmanager
def standing(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute of a module or a class inside."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def on_meta(model: Any, recipe: Recipe, batch: Batch) -> Iterator[None]:
    """Decide on small copies with numbers what the engine decides by trial, and run attention as a CPU does."""
    scratch.release()
    if recipe.faster:
        for module in list(model.modules()):
            quicken(module)
    try:
        with standing_in(whole=not isinstance(batch, dict) or unpadded(batch)), counted_whole():
            model.__dict__["_trimtab_ends_with_head"] = hands_on_logits(model)
            yield
    finally:
        scratch.release()


def quicken(module: nn.Module) -> None:
    """Give a norm or a gated feed-forward on the meta device its fast class, if a small copy of it gets one."""
    w = module._parameters.get("weight")
    if w is not None and w.ndim == 1 and w.is_meta and not w.requires_grad and not module._modules:
        twin = copy.copy(module)
        twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters}}
        twin._parameters["weight"] = nn.Parameter(torch.linspace(0.5, 1.5, len(w), dtype=w.dtype), requires_grad=False)
        if quick_norm(twin):
            swap_alike(module, twin)
    elif {"gate_proj", "up_proj", "down_proj"} <= set(module._modules) and not module._parameters:
        if "delta" in module._modules:
            return
        twin = copy.copy(module)
        twin.__dict__ = {**module.__dict__, "_modules": {**module._modules}}
        small = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
        for name, (out, into) in small.items():
            layer = nn.Linear(into, out, bias=False)
            with torch.no_grad():
                layer.weight.copy_(torch.linspace(-1, 1, out * into).sin().view(out, into))
            layer.requires_grad_(False)
            twin._modules[name] = layer
        if quick_gate(twin):
            swap_alike(module, twin)


@torch.no_grad()
def hands_on_logits(model: Any) -> bool:
    """Whether the logits are the very tensor that the output matrix returns."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    made: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: made.append(output))
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=torch.tensor([[1, 2, 3]], device="meta"), use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        handle.remove()
        model.train(training)
    return len(made) == 1 and logits is made[0]


def counted_whole() -> AbstractContextManager[None]:
    """Where a mask without values picks rows, all of them are picked: a bit more than of the real batch."""
    known, settings = "meta_nonzero_assume_all_nonzero", cast("Any", experimental)
    return settings.patch(**{known: True}) if hasattr(settings, known) else nullcontext()


def unpadded(batch: dict[str, Tensor]) -> bool:
    """Whether every row of a padded batch is of one length."""
    masks = [value for key, value in batch.items() if key.endswith("attention_mask")]
    return all(bool(mask.all()) for mask in masks)


@contextmanager
def standing_in(whole: bool) -> Iterator[None]:
    """On the meta device: attention by the kernel that a CPU takes, and an answer where a mask is asked if it is whole.

    Models leave a mask out when nothing is padded, and ask the mask itself, which has no values here. A function mode
    would not reach what checkpointing runs again.
    """
    plain, truth = F.scaled_dot_product_attention, Tensor.__bool__

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kernel = flash if query.is_meta else plain

        def run(q: Tensor) -> Tensor:
            return kernel(q, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        return through_edits(query, run, scale) if query.is_meta else run(query)

    def answer(self: Tensor) -> bool:
        return whole if self.is_meta else truth(self)

    with standing(F, "scaled_dot_product_attention", attention), standing(Tensor, "__bool__", answer):
        yield


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention's output and what it keeps; under dropout a CPU takes the plain way, with all scores."""
    if dropout_p > 0:
        plain = torch.ops.aten._scaled_dot_product_attention_math
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    out: Tensor = made[0]
    return out
