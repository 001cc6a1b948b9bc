"""Laws for a method from outside the package; and every law is broken by a method made to break it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab import laws
from trimtab.core import registry
from trimtab.core.site import Base, Site

SINGLE = [host for host in laws.zoo() if host.name in ("linear", "slice")]


@dataclass(frozen=True)
class Gain(tt.WeightMethod):
    """W' = diag(1 + g) W, b' = b.

    g (out) starts at zero. Costs one multiplication per output. Mergeable. arXiv 0000.00001.
    """

    paper: ClassVar[str] = "0000.00001"

    strength: float = 1.0
    parts: int = 9

    def init(self, site: Site) -> dict[str, Any]:
        return {"g": nn.Parameter(torch.zeros(site.out_features))}

    def count(self, site: Site) -> int:
        return site.out_features

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return (1 + self.strength * p.g)[:, None] * W

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        y = (1 + self.strength * p.g) * base.matmul(x)
        return y if base.bias is None else y + base.bias


def oracle(x: Any, W: Any, b: Any, p: Any, method: Gain, context: Any) -> Any:
    y = np.einsum("...i,oi,o->...o", x, W, 1 + method.strength * p["g"])
    return y if b is None else y + b


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered while a test runs."""
    known = {cls.__name__.lower(): cls for cls in (Gain, *(one for one, _ in BREAKERS))}
    monkeypatch.setattr(registry, "_outside", known)


def test_a_method_from_outside_keeps_all_laws() -> None:
    found = laws.check(Gain(), hosts=SINGLE, storages=laws.storages()[:4], oracle=oracle)
    assert not [str(one) for one in found if not one]
    assert {one.law for one in found} == {law.name for law in laws.LAWS} - {"distributed"}
    assert len(found) > 70


def test_without_an_oracle_the_law_says_what_to_write() -> None:
    found = [one for one in laws.check(Gain(), hosts=SINGLE) if one.law == "oracle"]
    assert found
    assert all(one.status == "fail" and "tests/oracles/gain.py" in one.detail for one in found)


def test_a_verdict_reads_well() -> None:
    (one,) = [law.verdict(case) for law, case in laws.work(Gain(), SINGLE[:1], laws.storages()[:1]) if law.number == 6]
    assert bool(one)
    assert str(one) == "pass     count          gain-linear-fp32"


def test_small_settings_are_made_by_one_rule() -> None:
    assert laws.small(Gain(parts=9)).parts == 4
    assert laws.small(tt.DoRA(rank=64)).inner.rank == 4
    assert laws.small(tt.PrefixTuning(hidden=None)).hidden is None
    assert [one.where for one in laws.small(tt.HoulsbyNorm())] == ["attn, ffn", "norm"]
    assert laws.small(tt.LoRA(rank=2, alpha=4.0)) == tt.LoRA(rank=2, alpha=4.0)
    assert laws.small(tt.LoRA(rank=2)).alpha == 4.0


def test_a_twin_is_what_deepcopy_makes() -> None:
    """Also of an adapted model with hooks, tied weights, codes and gradients, which a copy does not have."""
    (host,) = [host for host in laws.zoo() if host.name == "decoder"]
    (nf4,) = [storage for storage in laws.storages() if storage.name == "nf4"]
    case = laws.Case(laws.small((tt.methods()["vb_lora"]().at("q"), tt.methods()["loreft"]().at("block"))), host, nf4)
    model: Any = case.model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model = laws.judging.move(case.attach(model))
    case.run(model).square().mean().backward()
    output, was = case.run(model), {key: value.clone() for key, value in model.state_dict().items()}
    twin: Any = laws.twin.twin(model)
    assert [(n, type(m), sorted(vars(m))) for n, m in twin.named_modules()] == [
        (n, type(m), sorted(vars(m))) for n, m in model.named_modules()
    ]
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.__dict__["_trimtab"] is not model.__dict__["_trimtab"]
    for one, other in zip(twin.parameters(), model.parameters(), strict=True):
        assert one is not other
        assert one.requires_grad == other.requires_grad
        assert one.grad is None
    assert torch.equal(case.run(twin), output)
    laws.judging.move(twin)
    tt.detach(twin)
    assert torch.equal(case.run(model), output)
    laws.judging.same_bits(model.state_dict(), was, "the model after changing its twin")


# ---------------------------------------------------------------------------- each breaks one law, at least


@dataclass(frozen=True)
class Jumps(Gain):
    """The start is not the identity."""

    def init(self, site: Site) -> dict[str, Any]:
        return {"g": nn.Parameter(torch.full((site.out_features,), 0.01))}


@dataclass(frozen=True)
class Idle(Gain):
    """Declares a tensor that nothing uses."""

    def init(self, site: Site) -> dict[str, Any]:
        return super().init(site) | {"idle": nn.Parameter(torch.zeros(3))}


@dataclass(frozen=True)
class Stuck(Gain):
    """g = u·v with both zero: a product that never moves."""

    def init(self, site: Site) -> dict[str, Any]:
        return {"u": nn.Parameter(torch.zeros(site.out_features)), "v": nn.Parameter(torch.zeros(site.out_features))}

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) * (1 + p.u * p.v)


@dataclass(frozen=True)
class Intruder(Gain):
    """Writes into the frozen weight."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        with torch.no_grad():
            base.weight.mul_(1 + 1e-3)
        return super().forward(x, base, p)


@dataclass(frozen=True)
class TwoFaced(Gain):
    """The fast forward scales the bias too."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return (1 + self.strength * p.g) * base(x)


@dataclass(frozen=True)
class HalfBlind(Gain):
    """The fast forward computes the same, with another gradient."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        y = super().forward(x, base, p)
        return y + (p.g.sum() - p.g.sum().detach())


class Forgetful(nn.Module):
    """A body with something that is not in its state dict."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(size))
        self.register_buffer("sign", torch.randn(size).sign(), persistent=False)


@dataclass(frozen=True)
class Forgets(Gain):
    """A tensor that is drawn, used, and not saved."""

    def init(self, site: Site) -> dict[str, Any]:
        return {"body": Forgetful(site.out_features)}

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) * (1 + p.body.g * p.body.sign)


@dataclass(frozen=True)
class Miscounts(Gain):
    """One value more than there is."""

    def count(self, site: Site) -> int:
        return site.out_features + 1


@dataclass(frozen=True)
class Promises(Gain):
    """Says that it merges exactly into codes, and does not."""

    def merge(self, code: Any, p: Any) -> dict[str, Tensor] | None:
        return {}


@dataclass(frozen=True)
class Upcasts(Gain):
    """Computes its branch in fp32."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return (base(x).float() * (1 + p.g)).to(x.dtype)


@dataclass(frozen=True)
class Widens(Gain):
    """Leaves its output in fp32."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) * (1 + p.g.float())


@dataclass(frozen=True)
class Counts(Gain):
    """Depends on how often it was called."""

    def init(self, site: Site) -> dict[str, Any]:
        return super().init(site) | {"calls": torch.zeros(())}

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        p.calls += 1
        return super().forward(x, base, p) * (1 + 0.1 * float(p.calls))


@dataclass(frozen=True)
class Decides(Gain):
    """Branches on a value."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return super().forward(x, base, p) if bool(p.g.sum() < 1e9) else base(x)


@dataclass(frozen=True)
class Bypasses(Gain):
    """Goes past the adapters below it to the frozen layer."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        while hasattr(base, "base"):
            base = base.base
        return super().forward(x, base, p)


@dataclass(frozen=True)
class Mingles(Gain):
    """Lets rows of a batch see each other."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + p.g * x.mean()


@dataclass(frozen=True)
class Gambles(Gain):
    """Draws from a generator of its own choosing."""

    def init(self, site: Site) -> dict[str, Any]:
        return {"g": nn.Parameter(1e-9 * torch.randn(site.out_features, generator=ENTROPY))}


ENTROPY = torch.Generator()


@dataclass(frozen=True)
class Alike(Gain):
    """Every site starts from the same draw."""

    def init(self, site: Site) -> dict[str, Any]:
        torch.manual_seed(0)
        return {"g": nn.Parameter(1e-9 * torch.randn(site.out_features))}


@dataclass(frozen=True)
class Numb(Gain):
    """Has hardly any effect, so it learns nothing."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) * (1 + 0.1 * torch.sin(1e4 * p.g))


class Shared(nn.Module):
    """A body that all of its copies share."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(1))

    def __deepcopy__(self, memo: Any) -> Shared:
        return self

    def __reduce__(self) -> Any:
        return Shared, ()


@dataclass(frozen=True)
class Clings(Gain):
    """A copy of the model would train the original."""

    def init(self, site: Site) -> dict[str, Any]:
        return {"body": Shared()}

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) * (1 + p.body.g)


@dataclass(frozen=True)
class Dense(Gain):
    """Builds the weight in every forward."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base.affine(x, self.weight(base.weight, p), base.bias)


@dataclass(frozen=True)
class Mute(Gain):
    """It scales."""


@dataclass(frozen=True)
class Excused(Gain):
    """An excuse for a law that holds."""

    laws: ClassVar[Mapping[str, str]] = {"identity": "it is hard"}
    shapes: list[int] = field(default_factory=list)


class _AsView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return (1.0 * y).view(y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


@dataclass(frozen=True)
class Views(Gain):
    """gives a view that an autograd function made, which nothing may change in place."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return _AsView.apply(Gain.forward(self, x, base, p))


BREAKERS = [
    (Jumps, "identity"),
    (Idle, "trains_only"),
    (Stuck, "trains_only"),
    (Intruder, "trains_only"),
    (TwoFaced, "merge"),
    (HalfBlind, "merge"),
    (Forgets, "save"),
    (Miscounts, "count"),
    (Promises, "quantized"),
    (Upcasts, "dtype"),
    (Widens, "dtype"),
    (Counts, "checkpointing"),
    (Decides, "compiles"),
    (Bypasses, "stacks"),
    (Mingles, "mixed"),
    (Gambles, "deterministic"),
    (Alike, "deterministic"),
    (TwoFaced, "oracle"),
    (Numb, "recovers"),
    (Clings, "copies"),
    (Dense, "cost"),
    (Mute, "docstring"),
    (Views, "in_place"),
]


@pytest.mark.parametrize("cls, broken", BREAKERS, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_laws_can_be_broken(cls: type[Gain], broken: str) -> None:
    hosts = [host for host in laws.zoo() if host.name == ("decoder" if broken == "deterministic" else "linear")]
    few = [
        one for one in laws.storages() if one.name in {"quantized": ("nf4",), "dtype": ("bf16",)}.get(broken, ("fp32",))
    ]
    verdicts = [law.verdict(case) for law, case in laws.work(cls(), hosts, few, oracle) if law.name == broken]
    assert verdicts
    assert not all(verdicts), f"{broken} holds for a method that {cls.__doc__}"


def test_every_law_is_broken_by_something() -> None:
    assert {law.name for law in laws.LAWS} == {broken for _, broken in BREAKERS} | {"detach", "distributed"}


def test_detach_is_a_law_that_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.core import install

    monkeypatch.setattr(
        "trimtab.core.attach.uninstall",
        lambda module, name: install.uninstall(module, name) or setattr(module, "left", 1),
    )
    (one,) = [law.verdict(case) for law, case in laws.work(Gain(), SINGLE[:1], laws.storages()[:1]) if law.number == 4]
    assert one.status == "fail"
    assert "left" in one.detail


def test_a_stale_excuse_is_a_fault() -> None:
    (one,) = [
        law.verdict(case) for law, case in laws.work(Excused(), SINGLE[:1], laws.storages()[:1]) if law.number == 1
    ]
    assert one.status == "fail"
    assert "delete the exception" in one.detail


def test_a_true_excuse_is_shown_with_its_reason() -> None:
    verdicts = [law.verdict(case) for law, case in laws.work(laws.registered()["houlsby"], SINGLE) if law.number == 3]
    assert {one.status for one in verdicts} == {"excused"}
    assert {one.detail for one in verdicts} == {"the GELU between D and U"}
