"""Delta: the one generic module that holds a method's tensors at a site, and what a model knows of its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.grouped import Kept, grouped
from trimtab.core.method import Method, WeightMethod
from trimtab.core.rows import Rows
from trimtab.core.site import Base, Edited, Known

if TYPE_CHECKING:
    from trimtab.core.format import Format
    from trimtab.core.places import Place


class Group(nn.Module):
    """A dict of tensors as a module: a Parameter trains, a plain tensor is fixed, a Module is a body, a dict nests."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            elif isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.add_module(name, Group(value))


class Cast:
    """A group read in another floating type: fp32 master parameters beside a bf16 model, cast where they are used."""

    def __init__(self, group: Any, dtype: torch.dtype) -> None:
        self._group, self._dtype = group, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._group, name)
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        return Cast(value, self._dtype) if isinstance(value, Group) else value


class Delta(Group):
    """A method's tensors at one site; called as `delta(x, base)`, so that sharding and other hooks on it fire."""

    def __init__(
        self,
        method: Method,
        tensors: Mapping[str, Any],
        *,
        adapter: str,
        slot: str,
        rows: Rows | None = None,
    ) -> None:
        super().__init__(tensors)
        self.method, self.adapter, self.slot, self.rows = method, adapter, slot, rows
        self.master = False
        self.share(None)

    def share(self, group: Group | None) -> None:
        """Point `p.shared` at tensors that live at the root of the model, without owning them."""
        for module in self.modules():
            if isinstance(module, Group):
                module.__dict__["shared"] = group

    def at(self, dtype: torch.dtype) -> Any:
        """These tensors as the method reads them: themselves, or cast when they are kept in a wider type."""
        return Cast(self, dtype) if self.master else self

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.master:
            return self.method.forward(x, base, self)
        return self.method.forward(x, base, self.at(x.dtype if x.is_floating_point() else base.weight.dtype))

    def effective(self, base: Base, rows: Rows | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the whole base with this delta applied (to `rows` of it only, for a slice)."""
        method = self.method
        if not isinstance(method, WeightMethod):
            raise UserError(f"{type(method).__name__} edits activations: a site under it has no single weight")
        part = base if rows is None else Known(base, rows)
        W, b = part.weight, part.bias
        p = Cast(self, W.dtype)
        new_W, new_b = method.weight(W, p), method.bias(b, p)
        if rows is None:
            return new_W, new_b
        whole_b = base.bias
        if whole_b is None and new_b is not None:
            whole_b = new_b.new_zeros(base.shape[0])
        new_b = whole_b if whole_b is None or new_b is None else rows.put(whole_b, new_b)
        return rows.put(base.weight, new_W, 0), new_b

    def extra_repr(self) -> str:
        return repr(self.method)


@dataclass
class Part:
    """One method of an adapter, with the places it is at."""

    method: Method
    where: str
    label: str
    places: list[Place]
    format: Format | None = None
    """What its weights are stored in, where they were encoded without what its start takes out."""


@dataclass
class Adapter:
    """A named set of parts that are attached, activated, saved and merged together."""

    name: str
    seed: int
    parts: list[Part]


@dataclass
class State:
    """What a model knows of its adapters: plain data, kept in the root's `__dict__`, copied with the model."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] | None = None
    frozen: dict[str, bool] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    prompt: Tensor | None = None
    prompt_held: bool = False
    packed: tuple[Tensor, Tensor] | None = None
    """Of a running pack, (1, tokens) each: where a token stands in its row, and how many prompt tokens the row has."""
    hooks: list[Any] = field(default_factory=list)
    padded: list[Any] = field(default_factory=list)
    """torch's encoders that would pack padded rows into nested tensors, which no method takes; kept from it."""
    kept: Kept = field(default_factory=Kept)
    """Stacked factors of the rows' adapters; forgotten when other adapters are activated."""

    def row_groups(self, size: int) -> list[tuple[tuple[str, ...], list[int]]]:
        """Batch rows by the adapters they use. A batch of k·rows (beams, flattened tokens) repeats each row k times."""
        assert self.rows is not None
        if size % len(self.rows):
            raise UserError(
                f"activate: the batch has {size} rows and {len(self.rows)} adapter names were given",
                fix="give one name (or None) per row, or activate one adapter for all rows",
            )
        found = None if torch.compiler.is_compiling() else self.kept.get("groups")
        if found is not None and found[0] is self.rows and found[1] == size:
            return found[2]
        groups: dict[tuple[str, ...], list[int]] = {}
        repeat = size // len(self.rows)
        for row in range(size):
            groups.setdefault(self.rows[row // repeat], []).append(row)
        listed = list(groups.items())
        if not torch.compiler.is_compiling():
            self.kept["groups"] = (self.rows, size, listed)
        return listed


class Deltas(nn.ModuleDict):
    """The deltas of one module in the order they were attached; what the swapped class calls."""

    way: ClassVar[str] = "through its forward"
    """How they edit their module, in words; there is one way a module."""
    state: State
    stack: str
    width: int
    hook: Any
    sources: tuple[str, ...]
    """What methods here read beside the site's input."""
    ears: dict[str, Any]
    """Source -> the hook where it passes by."""
    heard: dict[str, Tensor]
    """What passed by in the running forward; forgotten when the site is done, since it would be held for nothing."""

    def __init__(self, state: State, stack: str) -> None:
        super().__init__()
        self.__dict__["state"], self.__dict__["stack"] = state, stack
        self.__dict__["sources"], self.__dict__["ears"], self.__dict__["heard"] = (), {}, {}
        self.__dict__["index"] = None

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self.__dict__["index"] = None
        super().__setitem__(key, module)

    def __delitem__(self, key: str) -> None:
        self.__dict__["index"] = None
        super().__delitem__(key)

    def of(self, names: Sequence[str]) -> list[Delta]:
        """The deltas of these adapters in the order they were attached, without a look at all the others."""
        index = self.__dict__["index"]
        if index is None:
            index = {}
            for place, (key, delta) in enumerate(self.items()):
                index.setdefault(delta.adapter, []).append((place, key))
            self.__dict__["index"] = index
        places = sorted(place for name in set(names) for place in index.get(name, ()))
        return [self._modules[key] for _, key in places]  # type: ignore[misc]

    @property
    def batch(self) -> Batch | None:
        batch = self.state.batches.get(self.stack)
        if not self.sources:
            return batch
        missing = [source for source in self.sources if source not in self.heard]
        if missing:
            raise UserError(
                f"forward: {listing(missing)} did not pass by before the site that reads it",
                fix="name modules by their path in `where`, whose own input is read then",
            )
        return replace(batch or Batch(), sources=dict(self.heard))

    def over(self, base: Base, names: Sequence[str]) -> Base:
        """The base with the deltas of these adapters stacked on it."""
        for delta in self.of(names):
            base = Edited(base, delta, delta.rows)
        return base

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.state.rows is None:
            out = self.over(base, self.state.active)(x)
            self.heard.clear()
            return out
        y = base(x)
        groups = self.state.row_groups(x.shape[0])
        out, done = grouped(self, x, y, base, groups)
        for names, rows in groups:
            if names not in done and self.of(names):
                index = torch.tensor(rows, device=x.device)
                part = x.index_select(0, index)
                batch = base.batch.of_rows(names, index) if base.batch is not None else None
                edited = self.over(Known(base, None, part, y.index_select(0, index), batch), names)
                out = out.index_copy(0, index, edited(part))
        self.heard.clear()
        return out


def build(tensors: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The tensors of `init` with their floating members in `dtype` on `device`; nesting is kept."""
    done: dict[str, Any] = {}
    for name, value in tensors.items():
        if isinstance(value, nn.Module):
            done[name] = value.to(device=device, dtype=dtype)
        elif isinstance(value, Tensor):
            moved = value.detach().to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
            done[name] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
        else:
            done[name] = build(value, dtype=dtype, device=device)
    return done


def state_of(model: nn.Module) -> State | None:
    """The adapters of a model, or None when it has none."""
    return model.__dict__.get("_trimtab")


def require_state(model: nn.Module, verb: str) -> State:
    """As `state_of`, but an error naming `verb` when nothing is attached."""
    state = state_of(model)
    if state is None or not state.adapters:
        raise UserError(
            f"{verb}: no adapter is attached to this {type(model).__name__}", fix="trimtab.attach(model, ...)"
        )
    return state


def check_names(state: State, names: Sequence[str], verb: str) -> None:
    """Every name is an attached adapter, else one error naming all that are not."""
    unknown = [name for name in dict.fromkeys(names) if name not in state.adapters]
    if unknown:
        close = [near for name in unknown for near in nearest(name, state.adapters)]
        raise UserError(
            f"{verb}: no adapter named {listing(unknown)}; attached: {listing(state.adapters)}",
            fix=f"did you mean {listing(close)}?" if close else None,
        )


def edited_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that carries deltas, with its path."""
    for name, module in model.named_modules():
        if isinstance(module._modules.get("delta"), Deltas):
            yield name, module
