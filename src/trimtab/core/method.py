"""The method axis: a method is a frozen dataclass of hyper-parameters with pure functions, its verbs.

Three trainable spaces, each an abstract class with its own few verbs:

    weight   weight(W, p) -> W'      bias(b, p) -> b'      (fast `forward` and exact `merge` are optional)
    hidden   forward(x, base, p) -> y
    input    virtual(p) -> (length, out)

`p` is what `init(site)` returned, read by attribute: an `nn.Parameter` trains, a plain tensor is fixed, an `nn.Module`
is a body, a dict is a nested group. `base` is the frozen thing seen through `trimtab.core.site.Base`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.core.code import Code
    from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class Method(ABC):
    """Abstract base of everything trainable. Fields are the hyper-parameters: also the JSON, the flags and equality."""

    space: ClassVar[str]
    """`weight`, `hidden` or `input`."""
    paper: ClassVar[str] = ""
    """arXiv id of the method's paper."""
    where: ClassVar[str] = "all-linear"
    """Default sites in the `where` language."""
    learning_rate: ClassVar[float] = 2e-4
    """A sensible AdamW learning rate at a residual width of 1024: methods differ here by factors of hundreds."""
    width_power: ClassVar[float] = 0.0
    """1 where matrices train, whose best rate under Adam falls as 1/width (arXiv 2203.03466); 0 for vectors."""
    hosts: ClassVar[frozenset[str]] = frozenset({"linear"})
    """Kinds of site it can sit on: linear, embedding, conv, norm, attention, opaque."""
    mergeable: ClassVar[bool] = False
    """Whether the trained delta folds into the frozen weight."""
    elastic: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors whose shape is chosen from data at init, so a file decides it at load."""
    statistics: ClassVar[str | None] = None
    """What must be measured on the model before `init` (`fisher`), else None."""
    on_bias: ClassVar[bool] = False
    """Whether it sits only where there is a bias already; other places that `where` names are passed over."""
    takes_out: ClassVar[bool] = False
    """Whether a product is taken out of the frozen weight at the start, so that quantizing has to know of it."""
    replaces: ClassVar[bool] = False
    """Whether a weight of its own stands for W, which then nothing reads any more."""
    stackable: ClassVar[bool] = True
    """Whether its tensors can be stacked, one for each matrix of a stack of experts."""
    own_rows: ClassVar[bool] = False
    """Whether it decides something by the rows of its own process, so that several would decide differently."""
    source: ClassVar[str] = ""
    """What it reads beside its site's input, as `base.batch.sources[source]`: `stream`, the residual stream where its
    sub-layer takes it in, or a role of its attention (`q`), whose output is meant."""
    laws: ClassVar[Mapping[str, str]] = {}
    """Laws this method does not obey, each with the reason; shown in the docs."""

    @abstractmethod
    def init(self, site: Site) -> dict[str, Any]:
        """Tensors at one site, drawn from torch's global generator, which is seeded by (seed, site name)."""

    @abstractmethod
    def count(self, site: Site) -> int:
        """Number of trained values at one site, by the formula of the paper (what `shared` trains is not in it)."""

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        """Tensors that all sites of one attachment use together, read as `p.shared.<name>`; none by default."""
        return {}

    def count_shared(self, sites: Sequence[Site]) -> int:
        """Number of trained values in what `shared` returns, by formula."""
        return 0

    @abstractmethod
    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        """The output of the edited site for its input `x`."""

    def taken(self, p: Any) -> tuple[Tensor, Tensor] | None:
        """B0 (out, rank) and A0 (rank, in), scales included, whose product a quantized weight is encoded without."""
        return None

    def added(self, p: Any, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """B (out, k) and A (k, in) where `forward` is base(x) + (x Aᵀ)Bᵀ as things stand, so that rows with different
        adapters can share batched products; None where it is not, or not while training."""
        return None

    def penalty(self, p: Any) -> Tensor | None:
        """A term added to the loss for one site (orthogonality, sparsity), or None."""
        return None

    def over(self, steps: int) -> Method:
        """This method for a run of so many steps, where a schedule of its own would not end in them; else itself."""
        inner = {field.name: getattr(self, field.name) for field in fields(self)}
        laid = {name: one.over(steps) for name, one in inner.items() if isinstance(one, Method)}
        return replace(self, **laid) if any(one is not inner[name] for name, one in laid.items()) else self

    def on_step(self, p: Any, step: int) -> None:
        """Called after each optimizer step, its gradients still there (re-allocation); nothing by default."""
        return None

    def stale(self, p: Any, step: int) -> Sequence[Tensor]:
        """Trained tensors that `on_step` or `settle` drew anew at this step: the optimizer forgets them; often none."""
        return ()

    def due(self, step: int | None) -> bool:
        """Whether `settle` wants to be called after this step (None: after the last one); never by default."""
        return False

    def settle(self, sites: Mapping[str, Any], statistics: Mapping[str, Tensor], step: int | None) -> None:
        """Decide something over all sites (name -> p) together, with what `statistics` names measured again."""
        return None

    def only_at(self, vocabulary: int) -> Sequence[int] | None:
        """The token ids without which it changes nothing and learns nothing; None: any will do."""
        return None

    def bake(self, p: Any) -> tuple[Method, dict[str, Tensor]] | None:
        """The method without what only training needs, and its tensors at this site; None when all of it is needed."""
        return None

    def rate(self, width: int) -> float:
        """The default learning rate for a model of this residual width, to two digits."""
        return float(f"{self.learning_rate * (1024 / width) ** self.width_power:.1e}")

    def at(self, where: str) -> Placed:
        """This method at other sites than its default ones: `LoRA(rank=4).at("q, v")`."""
        return Placed(self, where)


@dataclass(frozen=True)
class Placed:
    """A method together with where it goes; several make up a preset such as MAM or LongLoRA."""

    method: Method
    where: str | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.method, self.where))


class Parts(tuple[Placed, ...]):
    """The parts of a preset that also wants something of the recipe: `recipe` holds keys and values, which the recipe's
    own go before. Attached to a model, it is a tuple like any other."""

    recipe: Mapping[str, Any]

    def __new__(cls, parts: Iterable[Placed], recipe: Mapping[str, Any]) -> Parts:
        made = super().__new__(cls, parts)
        made.recipe = recipe
        return made


@dataclass(frozen=True)
class WeightMethod(Method):
    """y = W'x + b' with W' = weight(W, p) and b' = bias(b, p): the whole family of mergeable methods."""

    space: ClassVar[str] = "weight"
    mergeable: ClassVar[bool] = True

    def weight(self, W: Tensor, p: Any) -> Tensor:
        """The effective weight (out, in)."""
        return W

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        """The effective bias (out), or None where there is none."""
        return b

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base.affine(x, self.weight(base.weight, p), self.bias(base.bias, p))

    def merge(self, code: Code, p: Any) -> dict[str, Tensor] | None:
        """New tensors of a quantized weight that absorb the delta exactly, or None when only a dense merge is exact."""
        return None

    def row_norm(self, base: Base, p: Any) -> Tensor:
        """Row norms (out) of the effective weight, without gradient; low-rank methods override it cheaply."""
        return torch.linalg.vector_norm(self.weight(base.weight, p), dim=1)


@dataclass(frozen=True)
class HiddenMethod(Method):
    """Edits activations: y = forward(x, base, p). Not mergeable, since a nonlinearity or a position is in the way."""

    space: ClassVar[str] = "hidden"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "opaque"})
    laws: ClassVar[Mapping[str, str]] = {"merge": "the edit is not an affine map of the site's input"}


@dataclass(frozen=True)
class InputMethod(Method):
    """Virtual tokens: `length` reserved positions whose outputs at this site are replaced by `virtual(p)`.

    At the embedding that is a prompt, at k and v it is a prefix. Nothing at a reserved position reaches a real token
    except through the replaced values, so no cache class and no attention code is touched.
    """

    space: ClassVar[str] = "input"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    laws: ClassVar[Mapping[str, str]] = {
        "merge": "virtual tokens have no weight to merge into",
        "identity": "extra keys take attention mass from the first step on",
    }

    @property
    @abstractmethod
    def virtual_tokens(self) -> int:
        """How many positions are reserved in each sequence."""

    @abstractmethod
    def virtual(self, p: Any) -> Tensor:
        """What the site outputs at the reserved positions: (virtual_tokens, out)."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        y = base(x)
        return y if base.batch is None else base.batch.replace(y, self.virtual(p), p.slot)


def dropout(x: Tensor, rate: float, p: Any) -> Tensor:
    """Inverted dropout on the adapter's input while training; ids (an embedding's input) have nothing to drop."""
    return F.dropout(x, rate, p.training) if rate and x.is_floating_point() else x
