"""Presets: named points of the space, one line each. Called like methods and listed beside them."""

from __future__ import annotations

from trimtab.core.method import Placed
from trimtab.core.registry import find


def DoRA(rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> object:
    """Magnitude over LoRA (arXiv 2402.09353)."""
    return find("magnitude")(inner=find("lora")(rank=rank, alpha=alpha, dropout=dropout))


def HoulsbyNorm(bottleneck: int = 64) -> tuple[Placed, ...]:
    """Houlsby adapters and the trained layer norms of the paper's code (arXiv 1902.00751)."""
    return (find("houlsby")(bottleneck=bottleneck).at("attn, ffn"), find("ln_tuning")().at("norm"))


def RsLoRA(rank: int = 64, alpha: float = 16.0, dropout: float = 0.0) -> object:
    """LoRA scaled by alpha / √rank, so that a large rank learns as fast as a small one (arXiv 2312.03732)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, rank_power=0.5)


def PTuningV2(length: int = 20) -> object:
    """Prefix tuning without the reparametrization (arXiv 2110.07602)."""
    return find("prefix_tuning")(length=length, hidden=None)
