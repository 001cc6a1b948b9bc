"""Formats that choose their codes by what the layers see: a model is measured and coded block by block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.quantized import quantize_module, targets

Batch = Mapping[str, Any]
PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


@dataclass
class Stage:
    """Layers that are measured together: those of one block, or a layer outside of any."""

    path: str
    root: nn.Module
    layers: dict[str, nn.Module] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    format: Format,
    batches: Sequence[Batch],
    where: str | Sequence[str] = "all-linear",
    *,
    select: Callable[[nn.Module, Any], Sequence[Any]] | None = None,
    run: Callable[[nn.Module, Batch], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> nn.Module:
    """Store the selected linear weights in a format that needs inputs, such as `GPTQ`, in place; returns the model.

    Block by block: H = Σ x xᵀ (in, in) in fp32 over all tokens of `batches` is summed for every layer of a block, whose
    inputs come from the blocks before it as they are stored by then; then its weights are coded. Positions that an
    `attention_mask` excludes do not count, dropout is off. `run(model, batch)` defaults to `model(**batch)`;
    `progress(done, blocks)` is called after each block; `where` and `select` are those of `quantize`.

    Cost: three passes over the model and the coding, and the memory of one block's H and of one hidden state per token;
    where blocks cannot be run by themselves (an encoder with a decoder), a pass over the whole model for every block.
    A layer that saw no input (an expert that no token was sent to) is rounded to the nearest, with a warning. Errors:
    those of `quantize`; a format that needs no inputs; no batches.
    """
    if not format.needs_inputs:
        raise UserError(f"calibrate: {type(format).__name__} needs no inputs", fix="trimtab.quantize(model, format)")
    if not batches:
        raise UserError("calibrate: no batch was given", fix="pass some hundreds of rows like those the model will see")
    chosen = targets(model, format, where, select)
    call = run or (lambda model, batch: model(**batch))
    with quiet(model), torch.no_grad():
        stages = in_order(model, stages_of(model, chosen), call, batches[0])
        flow = Flow.of(model, stages, call, batches)
        for done, stage in enumerate(stages):
            moments = Moments(stage.layers)
            with moments:
                for number, batch in enumerate(batches):
                    moments.begin(batch)
                    call(model, batch) if flow is None else flow.step(stage, number)
            unseen = code(stage, format, moments)
            if unseen:
                warnings.warn(f"calibrate: {listing(unseen, 4)} saw no input: rounded to the nearest", stacklevel=2)
            if flow is not None:
                flow.advance(stage)
            if progress is not None:
                progress(done + 1, len(stages))
    return model


def code(stage: Stage, format: Format, moments: Moments) -> list[str]:
    """Store the layers of a stage; returns those that saw nothing."""
    unseen = []
    for path, module in stage.layers.items():
        H = moments.of(path)
        try:
            quantize_module(module, format, H)
        except UserError as error:
            raise UserError(f"calibrate: {path}: {error.message}", fix=error.fix) from None
        if H is None:
            unseen.append(path)
    return unseen


# ------------------------------------------------------------------------------------------------------- the blocks


def stages_of(model: nn.Module, chosen: Mapping[str, nn.Module]) -> list[Stage]:
    """The chosen layers by the entry of the outermost list they stand in; a layer in no list is a stage of its own."""
    found: dict[str, Stage] = {}
    for path, module in chosen.items():
        root = path
        parts = path.split(".")
        for end in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
                root = ".".join(parts[: end + 1])
                break
        found.setdefault(root, Stage(root, model.get_submodule(root))).layers[path] = module
    return list(found.values())


def in_order(model: nn.Module, stages: list[Stage], call: Callable[..., object], batch: Batch) -> list[Stage]:
    """Stages in the order in which a forward pass enters them; those it does not enter come last."""
    entered: dict[int, int] = {}

    def note(module: nn.Module, args: Any) -> None:
        entered.setdefault(id(module), len(entered))

    hooks = [stage.root.register_forward_pre_hook(note) for stage in stages]
    try:
        call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(stages, key=lambda stage: entered.get(id(stage.root), len(stages)))


@dataclass
class Flow:
    """The hidden state of every batch in front of the next block, and what else the blocks are called with."""

    hidden: list[Tensor]
    others: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]

    @classmethod
    def of(
        cls, model: nn.Module, stages: list[Stage], call: Callable[..., object], batches: Sequence[Batch]
    ) -> Flow | None:
        """None where the stages are no chain: each called once, with the output of the one before as first argument.

        Nor may a block be given another thing that depends on the tokens seen so far, as far as can be told: a tensor
        shaped like the hidden state, or an object that could remember (a cache).
        """
        flow, broken = cls([], {stage.path: [] for stage in stages}), [False]
        last: list[Tensor | None] = [None]

        def enter(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = not args and isinstance(kwargs.get("hidden_states"), Tensor)
            x = kwargs["hidden_states"] if named else args[0] if args else None
            first = stage is stages[0]
            others = {key: value for key, value in kwargs.items() if not (named and key == "hidden_states")}
            if not isinstance(x, Tensor) or not (first or x is last[0]):
                broken[0] = True
                return
            broken[0] |= not all(constant(value, x) for value in (*args[1:], *others.values()))
            if first:
                flow.hidden.append(x)
            flow.others[stage.path].append((args[1:] if args else (), others))

        def leave(output: Any) -> None:
            last[0] = state_in(output)

        hooks = []
        for stage in stages:
            hooks += [
                stage.root.register_forward_pre_hook(
                    lambda module, args, kwargs, stage=stage: enter(stage, args, kwargs), with_kwargs=True
                ),
                stage.root.register_forward_hook(lambda module, args, output: leave(output)),
            ]
        try:
            for number, batch in enumerate(batches):
                last[0] = None
                call(model, batch)
                broken[0] |= any(len(calls) != number + 1 for calls in flow.others.values())
                if broken[0]:
                    return None
        finally:
            for hook in hooks:
                hook.remove()
        return flow

    def step(self, stage: Stage, number: int) -> Tensor:
        """The hidden state of a batch behind a stage."""
        args, kwargs = self.others[stage.path][number]
        return state_in(stage.root(self.hidden[number], *args, **kwargs))  # type: ignore[return-value]

    def advance(self, stage: Stage) -> None:
        """Take every batch through a stage, which is coded by now."""
        self.hidden = [self.step(stage, number) for number in range(len(self.hidden))]
        del self.others[stage.path]


def state_in(output: Any) -> Tensor | None:
    """The hidden state in what a block returns."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def constant(value: Any, x: Tensor) -> bool:
    """Whether an argument of a block can be the same for other hidden states, as far as can be told from its look."""
    if isinstance(value, Tensor):
        return value.shape != x.shape
    if isinstance(value, Mapping):
        return all(constant(one, x) for one in value.values())
    if isinstance(value, tuple | list):
        return all(constant(one, x) for one in value)
    return isinstance(value, PLAIN)


# ------------------------------------------------------------------------------------------------------- the inputs


class Moments:
    """Σ x xᵀ of the inputs of some linear layers, while it is entered; layers with one input share one matrix."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers, self.sums = layers, dict[str, Tensor]()
        self.owner: dict[str, str] = {}
        self.fresh: dict[str, Tensor] = {}
        self.mask: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Before a batch: which of its positions count."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.fresh.clear()

    def of(self, path: str) -> Tensor | None:
        """The matrix of a layer, None if it saw nothing."""
        return self.sums.get(self.owner.get(path, path))

    def note(self, path: str, x: Tensor) -> None:
        self.owner.setdefault(path, next((other for other, one in self.fresh.items() if one is x), path))
        if self.owner[path] != path:
            return
        self.fresh[path] = x
        masked = self.mask is not None and self.mask.shape == x.shape[:-1]
        rows = (x[self.mask] if masked else x.reshape(-1, x.shape[-1])).float()
        if len(rows):
            self.sums[path] = self.sums[path].addmm_(rows.mT, rows) if path in self.sums else rows.mT @ rows

    def __enter__(self) -> Moments:
        self.hooks = [
            module.register_forward_pre_hook(lambda module, args, path=path: self.note(path, args[0]))
            for path, module in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.fresh.clear()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without a cache of keys and values; as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached
        for module, mode in modes.items():
            module.training = mode
