"""Checks of one recipe on its own model and rows: the same gradients however rows are batched, a base left alone, files
and merges that lose nothing.

The reference is the plainest way there is: every row alone, unpacked, without any fast piece. Trained tensors are moved
off their start first, since factors that start at zero would hide half of all mistakes, and dropout is off.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import detach
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError
from trimtab.core.merge import merge
from trimtab.core.modes import dropout_rates
from trimtab.core.quantized import quantized_modules
from trimtab.core.save import adapter_tensors, load, save
from trimtab.core.state import require_state
from trimtab.data.batches import IGNORED, batches, collate
from trimtab.data.encoded import Encoded
from trimtab.data.packing import SHARE, bag, pack
from trimtab.engine.attention import can_pack, edited_ends
from trimtab.engine.checkpointing import POLICIES, checkpointing
from trimtab.engine.faster import running
from trimtab.engine.loss import loss_sum, on, terms_of
from trimtab.engine.precision import computing_in, exactly, narrow_tensors, room_for
from trimtab.train.job import Job
from trimtab.train.prepare import prepare
from trimtab.train.recipe import Recipe
from trimtab.train.reporter import Reporter

BOUND = 1e-5
"""Largest difference of a gradient relative to its largest entry; in a half precision it is `COARSE` roundings."""
COARSE, SUMMED = 8, 32
"""Roundings of a gradient; of one that sums over many tokens at once, as a packed step's do, against row after row."""
SMALL = 1e-2
"""Share of the largest gradient below which a tensor's is mostly what other terms leave when they cancel: a key's bias
has a gradient of zero but for rounding."""
NOISE = 0.02
"""How far trained tensors are moved off their start."""


@dataclass(frozen=True)
class Check:
    """One line of the answer; `passed` is None where a check does not apply."""

    name: str
    passed: bool | None
    measured: float | None = None
    bound: float | None = None
    note: str = ""


def verify(recipe: Recipe, rows: int = 7, reporter: Reporter | None = None) -> list[Check]:
    """Run every check on the first `rows` rows of the first epoch. Nothing is trained and nothing is kept on disk."""
    tell = reporter or Reporter()
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(recipe, tell, Path(folder) / "run")
        tell.stage("checking")
        model = job.model
        order = batches(job.train_rows, max(2, rows), recipe.seed, 0)
        chosen = [job.train_rows[index] for index in order[0]]
        before = fingerprint(frozen_tensors(model))
        nudge(model)
        model.eval()
        found = [loss_mask(job, chosen), *batching(job, chosen)]
        found.append(step_leaves_the_base(job, chosen, before))
        found += [*files(model, Path(folder)), *endings(job, chosen, before, Path(folder))]
    return found


# ---------------------------------------------------------------------------------------------------- gradients


def batching(job: Job, rows: Sequence[Encoded]) -> list[Check]:
    """Every way of putting the same rows through the model against each row alone.

    They are compared in float64, since a deep model's own rounding is larger than a fault may be; in float32 where
    there is no room for that, or an operator that does not know it (experts' grouped products). Then once more as the
    run computes, where each row alone is off by its rounding, and the run may be off by twice as much.
    """
    wide = next((dtype for dtype in (torch.float64, torch.float32) if computes_in(job, dtype, rows[0])), None)
    narrow = [] if wide is None else narrow_tensors(job.model, wide)
    if wide is None or not narrow:
        return ways_of(job, rows)[0]
    with computing_in(job.model, wide):
        found, exact = ways_of(job, rows)
    rounded = gradients(job, [padded(job, [row]) for row in rows])
    kind = min((one.dtype for one in narrow), key=lambda dtype: dtype.itemsize)
    bound = max(SUMMED * torch.finfo(kind).eps, 2 * difference(rounded, exact)[0])
    run = in_training(job, [job.together(rows)], pieces=job.pieces, compile=job.recipe.compile)
    apart, worst = difference(run, rounded)
    name = f"as the run has them, in {str(kind).removeprefix('torch.')} = alone"
    return [*found, Check(name, apart <= bound, apart, bound, worst)]


def computes_in(job: Job, dtype: torch.dtype, row: Encoded) -> bool:
    """Whether a row goes through the model and back in a floating type."""
    if not room_for(job.model, dtype):
        return False
    try:
        with computing_in(job.model, dtype):
            gradients(job, [padded(job, [row])])
    except (RuntimeError, NotImplementedError):
        return False
    return True


def ways_of(job: Job, rows: Sequence[Encoded]) -> tuple[list[Check], dict[str, Tensor]]:
    """A check for every way, and the gradients of each row alone."""
    kind = next(parameter.dtype for parameter in job.model.parameters() if parameter.is_floating_point())
    bound = max(BOUND, COARSE * torch.finfo(kind).eps)
    alone = gradients(job, [padded(job, [row]) for row in rows])
    third = -(-len(rows) // 3)
    parts = [rows[at : at + third] for at in range(0, len(rows), third)]
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "padded = alone": lambda: gradients(job, [padded(job, rows)]),
        "accumulated = alone, last window short": lambda: gradients(job, [padded(job, part) for part in parts]),
    }
    packing = job.task == "causal" and can_pack(job.model, max(len(row.ids) for row in rows))
    ends = edited_ends(job.model) or ()
    if job.seam is not None:
        start = job.seam.first_position
        ways["packed = alone"] = lambda: gradients(job, [bag(rows, start)])
        ways["packed and accumulated = alone"] = lambda: gradients(job, [bag(part, start) for part in parts])
        ways["fast pieces = alone"] = lambda: gradients(job, [bag(rows, start)], job.pieces)
    elif packing:
        ways["packed = alone"] = lambda: gradients(job, [pack(rows, None, ends)])
        ways["packed with common beginnings = alone"] = lambda: gradients(job, [pack(rows, SHARE, ends)])
        ways["packed and accumulated = alone"] = lambda: gradients(job, [pack(part, SHARE, ends) for part in parts])
        ways["fast pieces = alone"] = lambda: gradients(job, [pack(rows, SHARE, ends)], job.pieces)
    else:
        ways["fast pieces = alone"] = lambda: gradients(job, [padded(job, rows)], job.pieces)
    for policy in POLICIES[1:]:
        again = partial(checkpointing, job.model, policy)
        ways[f"checkpointed ({policy}) = alone"] = partial(in_training, job, [padded(job, rows)], again)
    if job.recipe.compile != "off":
        ways["compiled = alone"] = partial(in_training, job, [job.together(rows)], compile=job.recipe.compile)
    found = []
    for name, way in ways.items():
        try:
            apart, worst = difference(way(), alone)
        except UserError as error:
            found.append(Check(name, None, note=error.message))
            continue
        found.append(Check(name, apart <= bound, apart, bound, worst))
    if not packing and job.seam is None:
        found.append(Check("packed = alone", None, note="this model, task or method is not packed"))
    return found, alone


def padded(job: Job, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows as one padded batch."""
    batch = on(collate(rows, job.pad_id), job.device)
    assert isinstance(batch, dict)
    return batch


def gradients(job: Job, parts: Sequence[Any], pieces: tuple[str, ...] = (), compile: str = "off") -> dict[str, Tensor]:
    """Gradients of the loss over all trained terms of these batches together."""
    model, terms = job.model, sum(terms_of(part) for part in parts)
    model.zero_grad(set_to_none=True)
    for part in parts:
        packed = not isinstance(part, dict)
        with running(model, packed=packed, seam=job.seam if packed else None, pieces=pieces, compile=compile):
            (loss_sum(model, on(part, job.device), job.task)[0] / terms).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def in_training(
    job: Job,
    parts: Sequence[Any],
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
    pieces: tuple[str, ...] = (),
    compile: str = "off",
) -> dict[str, Tensor]:
    """Gradients of a model in training, checkpointed or compiled, but without dropout."""
    model = job.model.train()
    rates = [(one, name, rate) for one in model.modules() for name, rate in dropout_rates(one)]
    for one, name, _ in rates:
        setattr(one, name, 0.0)
    for one in model.modules():
        if isinstance(one, Delta):
            one.eval()
    try:
        with within():
            return gradients(job, parts, pieces, compile)
    finally:
        for one, name, rate in rates:
            setattr(one, name, rate)
        model.eval()


def difference(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> tuple[float, str]:
    """Largest |difference| over the largest entry of a tensor's gradient (or `SMALL` of all), and that tensor."""
    if ours.keys() != plain.keys():
        return float("inf"), f"gradients reach other tensors: {sorted(ours.keys() ^ plain.keys())[0]}"
    size = max((float(one.abs().max()) for one in plain.values()), default=0.0)
    apart = {
        name: float((ours[name] - one).abs().max()) / max(float(one.abs().max()), SMALL * size, 1e-30)
        for name, one in plain.items()
    }
    worst = max(apart, key=lambda name: apart[name]) if apart else ""
    return apart.get(worst, float("inf")), worst


def nudge(model: nn.Module) -> None:
    """Move trained tensors off their start, by the same numbers every time."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw) * NOISE
                parameter.add_(noise.to(parameter.device, parameter.dtype))


# -------------------------------------------------------------------------------------------------- everything else


def loss_mask(job: Job, rows: Sequence[Encoded]) -> Check:
    """What the loss counts against what the data says is trained."""
    if job.task not in ("causal", "seq2seq"):
        return Check("every row has one label", all(row.label is not None for row in rows))
    wanted = sum(sum(row.trained[1:]) for row in rows)
    counted = terms_of(padded(job, rows))
    note = f"{counted} of {sum(len(row.ids) for row in rows)} tokens of these {len(rows)} rows are trained"
    return Check("the loss counts the trained tokens", counted == wanted > 0, note=note)


def step_leaves_the_base(job: Job, rows: Sequence[Encoded], before: str) -> Check:
    """One optimizer step changes trained tensors and nothing else."""
    model = job.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    old = [parameter.detach().clone() for parameter in trained]
    (loss_sum(model, padded(job, rows), job.task)[0]).backward()
    torch.optim.AdamW(trained, lr=1e-3).step()
    model.zero_grad(set_to_none=True)
    moved = sum(not torch.equal(one, other) for one, other in zip(trained, old, strict=True))
    note = f"{moved} of {len(trained)} trained tensors moved"
    return Check(
        "a step leaves the base as it was", fingerprint(frozen_tensors(model)) == before and moved > 0, note=note
    )


def files(model: nn.Module, folder: Path) -> list[Check]:
    """Saved and loaded again, every tensor has the same bits."""
    own = {key: value.detach().clone() for key, value in adapter_tensors(model, "default").items()}
    save(model, folder / "adapter")
    detach(model)
    load(model, folder / "adapter")
    again = adapter_tensors(model, "default")
    equal = own.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in own.items())
    return [Check("saved and loaded, the same bits", equal, note=f"{len(own)} tensors")]


@torch.no_grad()
def endings(job: Job, rows: Sequence[Encoded], before: str, folder: Path) -> list[Check]:
    """Merged and detached models, a merged one of half precision in float32 where there is room for that."""
    model = job.model.eval()
    parts = [part for adapter in require_state(model, "verify").adapters.values() for part in adapter.parts]
    batch = padded(job, rows)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    own = {key: value.detach().clone() for key, value in adapter_tensors(model, "default").items()}
    with exactly(model):
        edited = model(**inputs).logits.float()
    detach(model)
    found = [Check("detached, the base has its bits back", fingerprint(model.state_dict()) == before)]
    stuck = [type(part.method).__name__ for part in parts if not part.method.mergeable]
    if stuck or any(True for _ in quantized_modules(model)):
        why = (
            f"{', '.join(stuck)} cannot be merged"
            if stuck
            else "over a quantized base merging rounds; see `trimtab merge`"
        )
        return [*found, Check("merged = unmerged", None, note=why)]
    load(model, folder / "adapter")
    for key, value in adapter_tensors(model, "default").items():
        value.copy_(own[key])
    with exactly(model):
        merge(model)
        kind = next(model.parameters()).dtype
        apart, size = (model(**inputs).logits.float() - edited).abs(), edited.abs()
    if edited.ndim == 3:
        real = batch["labels"] != IGNORED if job.task == "seq2seq" else inputs["attention_mask"].bool()
        apart, size = apart[real], size[real]
    measured = float(apart.max() / size.max())
    bound = 10 * max(BOUND, COARSE * torch.finfo(kind).eps)
    return [*found, Check("merged = unmerged", measured <= bound, measured, bound, "logits")]


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base by their own names, without the adapter's."""
    return {key: value for key, value in model.state_dict().items() if ".delta." not in key and "trimtab_" not in key}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bits."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        total.update(tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
