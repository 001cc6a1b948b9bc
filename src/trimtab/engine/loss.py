"""The loss of a batch, summed over its trained terms: only what is trained reaches the output matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.core.errors import UserError
from trimtab.core.frozen import frozen_weight
from trimtab.core.modes import evaluating
from trimtab.core.product import product
from trimtab.core.site import LinearBase
from trimtab.core.stack import packed_prompts, prompts
from trimtab.data.batches import IGNORED, token_count
from trimtab.data.packing import Bag, Pack
from trimtab.engine.attention import edited_ends
from trimtab.engine.bottom import beginning_at
from trimtab.engine.encoder import outputs

Batch = dict[str, Tensor] | Pack | Bag
"""Rows as a padded batch, or as one sequence."""


def loss_sum(model: nn.Module, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
    """(summed loss, outputs) of one batch; divide by the number of trained terms of the whole step.

    causal and seq2seq: -Σ log p(token | before) over trained tokens, outputs none; classify: -Σ log p(class), outputs
    (rows, classes); regress: Σ (y − ŷ)², outputs (rows,). A pack is causal, a bag is labelled, and their model runs
    inside `trimtab.engine.faster.running`.
    """
    if isinstance(batch, Pack):
        require_parted(model, batch)
        inputs = {"input_ids": batch.ids, "position_ids": batch.positions, "segments": batch.segments}
        with packed_prompts(model, batch.positions, batch.prompts), beginning_at(model, batch.hidden):
            return causal_loss(model, inputs, (0, batch.sources), batch.targets, batch.weights)
    if isinstance(batch, Bag):
        with beginning_at(model, batch.hidden):
            return labelled_loss(outputs(model, batch), batch.labels, task)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if task in ("causal", "seq2seq"):
        keep = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        with prompts(model, labels):
            return causal_loss(model, inputs, keep, F.pad(labels[:, 1:], (0, 1))[keep], None)
    return labelled_loss(model(**inputs).logits, labels, task)


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32, or in float64 where it is in that."""
    return x.float() if x.dtype.itemsize < 4 else x


def require_parted(model: nn.Module, pack: Pack) -> None:
    """Refuse rows that share tokens which the model's adapters edit in one of them only."""
    edited = edited_ends(model) or ()
    if not set(edited) <= set(pack.ends) and any(segment.ancestors for segment in pack.segments):
        raise UserError(
            f"loss: rows share tokens, and an adapter edits the first and last {edited} of each row's own prompt",
            fix="pack(rows, share, ends) with ends from `trimtab.engine.attention.edited_ends(model)`, or share=None",
        )


def labelled_loss(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """(summed loss, outputs) of rows with a class or a number each."""
    if task == "regress":
        values = at_least_float32(logits.squeeze(-1))
        return F.mse_loss(values, labels.to(values.dtype), reduction="sum"), values
    return F.cross_entropy(at_least_float32(logits), labels, reduction="sum"), logits


def causal_loss(
    model: nn.Module, inputs: dict[str, Any], keep: Any, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-Σ weight·log p(target) at the positions that `keep` indexes, chunk by chunk where the output matrix allows."""
    if not ends_with_head(model):
        with only_positions(model, keep) as picked:
            logits = model(**inputs, use_cache=False).logits
        logits = logits if picked else logits[keep]
        each = F.cross_entropy(at_least_float32(logits), targets, reduction="none")
        return each.sum() if weights is None else each @ weights.to(each.dtype), logits.new_empty(0)
    with hidden_only(model, keep) as found:
        model(**inputs, use_cache=False)
    loss = chunked_cross_entropy(found[0], model.get_output_embeddings(), targets, weights)  # type: ignore[operator]
    return loss, loss.new_empty(0)


def terms_of(batch: Batch) -> int:
    """How many terms the loss of a batch sums over."""
    return token_count(batch) if isinstance(batch, dict) else batch.terms


def on(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device."""
    return {key: value.to(device) for key, value in batch.items()} if isinstance(batch, dict) else batch.to(device)


@contextmanager
def only_positions(model: nn.Module, keep: Any) -> Iterator[bool]:
    """Let only the positions that `keep` indexes reach the output matrix: logits come as (kept, vocabulary).

    Yields False where the model names no output matrix; then logits come whole.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        yield False
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][keep], *args[1:]))
    try:
        yield True
    finally:
        handle.remove()


CHUNK = 64
"""Positions whose logits exist at a time; four times as many where the head trains, whose gradient each chunk adds."""


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor | None) -> Tensor:
    """-Σ weight·log p(target) of `head(hidden)`, hidden (terms, width), with its gradient taken chunk by chunk.

    Never more than a chunk of the logits exists: the loss is a sum, so a chunk has its gradient as soon as its loss,
    and it goes back through the head at once.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled():
        return sum_of(head, hidden, targets, weights)
    return _Chunked.apply(head, targets, weights, len(trained), hidden, *trained)


def sum_of(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The loss alone."""
    total = at_least_float32(hidden.new_zeros(()))
    for at in range(0, len(targets), CHUNK):
        here = slice(at, at + CHUNK)
        each = F.cross_entropy(at_least_float32(head(hidden[here])), targets[here], reduction="none")
        total += each.sum() if weights is None else each @ weights[here].to(each.dtype)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        targets: Tensor,
        weights: Tensor | None,
        count: int,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total = at_least_float32(hidden.new_zeros(()))
        wanted = [ctx.needs_input_grad[4], *(True for _ in trained)]
        sums = [torch.zeros_like(one) if asked else None for one, asked in zip((hidden, *trained), wanted, strict=True)]
        chunk = 4 * CHUNK if trained else CHUNK
        for at in range(0, len(targets), chunk):
            here = slice(at, at + chunk)
            rows, W = hidden[here].detach().requires_grad_(wanted[0]), frozen_head(head, hidden)
            if W is None:
                with torch.enable_grad():
                    logits = head(rows)
            else:
                logits = product(rows.detach(), W, head.bias)  # type: ignore[arg-type]
            goal = targets[here, None]
            p = at_least_float32(logits.detach()) if W is not None else at_least_float32(logits.detach()).clone()
            top = p.amax(1, keepdim=True)
            each = top - p.gather(1, goal)
            size = p.sub_(top).exp_().sum(1, keepdim=True)
            each += size.log()  # (terms, 1)
            factor = 1.0 if weights is None else weights[here, None]
            total += (each * factor).sum()
            if W is not None:
                if sums[0] is not None:  # (softmax − 1 at the label) W, scaled where it is narrow
                    dh = at_least_float32(product(p.to(W.dtype), W.mT)).div_(size).sub_(W[targets[here]]).mul_(factor)
                    sums[0][here] = dh.to(W.dtype)
                del logits, p  # or the next chunk's are made beside them
                continue
            p.div_(size).scatter_add_(1, goal, p.new_full(goal.shape, -1.0)).mul_(factor)
            asked = [one for one, want in zip((rows, *trained), wanted, strict=True) if want]
            if not asked or not logits.requires_grad:
                continue
            found = iter(torch.autograd.grad(logits, asked, p.to(logits.dtype), allow_unused=True))
            for index, total_of in enumerate(sums):
                part = next(found) if total_of is not None else None
                if part is not None and index == 0:
                    total_of[here] = part  # type: ignore[index]
                elif part is not None:
                    total_of += part  # type: ignore[operator]
        ctx.save_for_backward(*(one for one in sums if one is not None))
        ctx.wanted = wanted
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) * dtotal if asked else None for asked in ctx.wanted]
        return None, None, None, None, *grads


def frozen_head(head: nn.Module, hidden: Tensor) -> Tensor | None:
    """The weight (vocabulary, width) of a plain frozen output matrix, whose gradient needs no graph; else None."""
    hooked = head._forward_hooks or head._forward_pre_hooks or "delta" in head._modules
    return None if hooked or not isinstance(head, nn.Linear) else frozen_weight(LinearBase(head, head.forward), hidden)


def ends_with_head(model: nn.Module) -> bool:
    """Whether logits are just what the output matrix returns: no scale, no cap, no copy of it elsewhere.

    Told by a trial on three tokens, once for each model.
    """
    known = model.__dict__.get("_trimtab_ends_with_head")
    if known is None:
        known = model.__dict__["_trimtab_ends_with_head"] = tried(model)
    return known


@torch.no_grad()
def tried(model: nn.Module) -> bool:
    """Compare the logits of three tokens with the output matrix applied to what it is given."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    given: list[Tensor] = []
    device = next(model.parameters()).device
    handle = head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    try:
        with evaluating(model):
            logits = model(input_ids=torch.tensor([[1, 2, 3]], device=device), use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        handle.remove()
    return len(given) == 1 and logits.shape[:2] == given[0].shape[:2] and torch.equal(head(given[0]), logits)


@contextmanager
def hidden_only(model: Any, keep: Any) -> Iterator[list[Tensor]]:
    """Collect what the output matrix is given at the positions `keep`, and keep it from running."""
    found: list[Tensor] = []

    def take(module: nn.Module, args: Any) -> Any:
        found.append(args[0][keep])
        return (args[0][:, :0], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        yield found
    finally:
        handle.remove()
