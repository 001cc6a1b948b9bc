"""Replacing parts of a model by faster ones that compute the same, each only where a trial shows that it does.

Which layer is an RMS norm or a gated feed-forward is not read off its name: the fast version is run beside the layer's
own forward on a few numbers and takes its place only if both agree. Layers that are trained or edited stay.
Leaving the context puts every class back; weights that were moved to begin at a cache line stay there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.frozen import frozen_product, frozen_weight
from trimtab.core.mapped import align
from trimtab.core.modes import evaluating
from trimtab.core.product import LARGE
from trimtab.core.scratch import release
from trimtab.core.site import LinearBase
from trimtab.core.swap import swap, unswap
from trimtab.engine.attention import segments_in
from trimtab.engine.checkpointing import checkpointing
from trimtab.engine.encoder import Seam, first_tokens
from trimtab.engine.kernels import GATES, gated, gated_product, rms_norm
from trimtab.engine.regional import compiled
from trimtab.engine.remembered import few_shapes_remembered
from trimtab.engine.rotary import turning
from trimtab.engine.shifted_attention import shifted_in
from trimtab.engine.siblings import panel_of, together

PIECES = ("aligned", "norms", "gates", "siblings", "rotary", "linears", "varlen")
EXACT = 1e-5


@contextmanager
def faster(model: nn.Module, pieces: tuple[str, ...] = PIECES) -> Iterator[list[str]]:
    """Run the model with the fast versions of these pieces inside; yields what was replaced, by path."""
    replaced: list[tuple[str, nn.Module]] = []
    moved = align(model) if "aligned" in pieces else []
    if "norms" in pieces:
        replaced += [(path, module) for path, module in model.named_modules() if quick_norm(module)]
    if "gates" in pieces:
        replaced += [(path, module) for path, module in model.named_modules() if quick_gate(module)]
    if "linears" in pieces:
        replaced += [(path, module) for path, module in model.named_modules() if quick_linear(module)]
    try:
        with ExitStack() as stack:
            groups = stack.enter_context(together(model)) if "siblings" in pieces else []
            turns = stack.enter_context(turning(model)) if "rotary" in pieces else []
            yield moved + [path for path, _ in replaced] + [path for group in groups for path in group] + turns
    finally:
        release()
        for _, module in reversed(replaced):
            unswap(module)


@contextmanager
def running(
    model: nn.Module,
    *,
    packed: bool,
    seam: Seam | None = None,
    pieces: tuple[str, ...] = PIECES,
    policy: str = "off",
    group: int | None = None,
    compile: str = "off",
) -> Iterator[None]:
    """What a model is trained and measured in: attention for packed rows or in shifted groups, fast pieces, compiled
    blocks, checkpointing."""
    few_shapes_remembered()
    segments = segments_in(model, "varlen" in pieces) if packed else nullcontext()
    attention = shifted_in(model, group) if group else segments
    with ExitStack() as stack:
        stack.enter_context(attention)
        stack.enter_context(first_tokens(model, seam))
        stack.enter_context(faster(model, pieces))
        stack.enter_context(compiled(model, compile))
        stack.enter_context(checkpointing(model, policy))
        yield


def quick_norm(module: nn.Module) -> bool:
    """Swap a frozen RMS norm, told by its behaviour, for `rms_norm`; whether it was one."""
    w = module._parameters.get("weight")
    if w is None or w.ndim != 1 or w.requires_grad or w.is_meta or set(module._parameters) != {"weight"}:
        return False
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if module._modules or isinstance(module, nn.Embedding) or not isinstance(epsilon, float):
        return False
    for plus in (0.0, 1.0):  # Gemma keeps the weight less one
        if same(module, lambda x, plus=plus: rms_norm(x, w + plus if plus else w, epsilon), w.shape[0], w):
            swap(module, norm_namespace, epsilon, plus)
            return True
    return False


def norm_namespace(cls: type, epsilon: float, plus: float) -> dict[str, Any]:
    """Namespace of the fast subclass of a norm."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        w: Any = self.weight
        return rms_norm(x, w + plus if plus else w, epsilon)

    return {"forward": forward}


def quick_gate(module: nn.Module) -> bool:
    """Swap a gated feed-forward down(act(gate(x)) ∘ up(x)), told by its behaviour, for one that keeps less."""
    parts = {"gate_proj", "up_proj", "down_proj"}
    width = getattr(module._modules.get("gate_proj"), "in_features", None)
    if not parts <= set(module._modules) or "delta" in module._modules or width is None or module._parameters:
        return False
    w = next(iter(module.gate_proj.parameters()))  # type: ignore[union-attr]
    if w.is_meta:
        return False
    gate = activation(module)
    if gate is None or not same(module, lambda x: gate_forward(module, x, gate), width, w):
        return False
    swap(module, gate_namespace, gate)
    return True


def quick_linear(module: nn.Module) -> bool:
    """Swap a frozen linear that nothing is attached to for one that takes the faster library, forward and backward."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "delta" in module._modules:
        return False
    if module.weight.requires_grad or module.weight.is_meta or module.weight.numel() < LARGE:
        return False
    swap(module, linear_namespace)
    return True


def linear_namespace(cls: type) -> dict[str, Any]:
    """Namespace of the fast subclass of a frozen linear."""

    def forward(self: Any, x: Tensor) -> Tensor:
        W = frozen_weight(LinearBase(self, nn.Linear.forward), x)
        return nn.Linear.forward(self, x) if W is None else frozen_product(x, W, self.bias)

    return {"forward": forward, "_transparent": True}


def activation(module: Any) -> str | None:
    """Name in `GATES` of the activation of a gated feed-forward."""
    function = getattr(module, "act_fn", None)
    if not callable(function) or (isinstance(function, nn.Module) and "delta" in function._modules):
        return None
    x = torch.linspace(-6, 6, 201)
    return next((name for name, (ours, _) in GATES.items() if torch.allclose(ours(x), function(x), 0, 1e-6)), None)


def gate_namespace(cls: type, gate: str) -> dict[str, Any]:
    """Namespace of the fast subclass of a gated feed-forward."""
    return {"forward": lambda self, x: gate_forward(self, x, gate)}


def gate_forward(module: Any, x: Tensor, gate: str) -> Tensor:
    """down(act(gate(x)) ∘ up(x))."""
    g, u = module.gate_proj(x), module.up_proj(x)
    down = panel_of(module.down_proj, g)
    return module.down_proj(gated(g, u, gate)) if down is None else gated_product(g, u, gate, down)


@torch.no_grad()
def same(module: nn.Module, fast: Any, width: int, like: Tensor) -> bool:
    """Whether both give the same on a few numbers, spread widely enough to tell activations apart."""
    kind = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    x = torch.linspace(-3, 3, 2 * width, device=like.device).sin().mul(2).view(1, 2, width).to(kind)
    try:
        with evaluating(module):
            ours, theirs = fast(x), module(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    apart, size = (ours - theirs).abs().double(), theirs.abs().double().max().clamp(min=1e-6)
    rounding = torch.finfo(kind).eps
    return bool(apart.max() <= max(EXACT, rounding) * size and apart.mean() <= max(EXACT, rounding / 32) * size)
