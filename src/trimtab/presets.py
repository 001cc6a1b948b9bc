"""Presets: named points of the space, one line each. Called like methods and listed beside them."""

from __future__ import annotations

from trimtab.core.errors import UserError
from trimtab.core.method import Parts, Placed
from trimtab.core.registry import find


def DoRA(rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> object:
    """Magnitude over LoRA (arXiv 2402.09353)."""
    return find("magnitude")(inner=find("lora")(rank=rank, alpha=alpha, dropout=dropout))


def HoulsbyNorm(bottleneck: int = 64) -> tuple[Placed, ...]:
    """Houlsby adapters and the trained layer norms of the paper's code (arXiv 1902.00751)."""
    return (find("houlsby")(bottleneck=bottleneck).at("attn, ffn"), find("ln_tuning")().at("norm"))


def LongLoRA(rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, group: int | None = None) -> Parts:
    """LoRA, trained embeddings and norms, tuned with attention in shifted groups (arXiv 2309.12307)."""
    low = find("lora")(rank=rank, alpha=alpha, dropout=dropout).at("q, k, v, o")
    dense = [find("full")().at(where) for where in ("embed", "norm")]
    return Parts([low, *dense], {"attention": "shifted", "group": group})


def FullQGaLore(rank: int = 128, gap: int = 200) -> Parts:
    """Full training in codes of 8 bits with projected gradients, a layer at a time (arXiv 2407.08296)."""
    codes = find("full_int8")().at("all-linear")
    inner = {"name": "q_galore", "rank": rank, "gap": gap}
    return Parts([codes], {"optimizer": "in_backward", "optimizer_settings": {"inner": inner}, "clip": 0.0})


def QLoRA(rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Parts:
    """LoRA on all linears over NF4 with double quantization, AdamW's state paged (arXiv 2305.14314)."""
    low = find("lora")(rank=rank, alpha=alpha, dropout=dropout).at("all-linear")
    return Parts([low], {"quantize": "nf4-double", "optimizer": "paged"})


def UntiedLoReFT(rank: int = 4, first: int = 7, last: int = 7) -> object:
    """LoReFT with tensors of their own for the first and the last tokens of the prompt (arXiv 2404.03592)."""
    return find("untied")(inner=find("loreft")(rank=rank, first=first, last=last))


def UntiedDiReFT(rank: int = 4, first: int = 7, last: int = 7) -> object:
    """DiReFT with tensors of their own for the first and the last tokens of the prompt (arXiv 2404.03592)."""
    return find("untied")(inner=find("direft")(rank=rank, first=first, last=last))


def RsLoRA(rank: int = 64, alpha: float = 16.0, dropout: float = 0.0) -> object:
    """LoRA scaled by alpha / √rank, so that a large rank learns as fast as a small one (arXiv 2312.03732)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, rank_power=0.5)


def PTuningV2(length: int = 20) -> object:
    """Prefix tuning without the reparametrization (arXiv 2110.07602)."""
    return find("prefix_tuning")(length=length, hidden=None)


def PreEmbed(length: int = 256) -> object:
    """Trained embeddings of prefix tokens: prompt tuning from a random start (a baseline of arXiv 2106.09685)."""
    return find("prompt_tuning")(length=length, start="random")


def PiSSA(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, iterations: int | None = 8) -> object:
    """LoRA that starts as the largest singular triplets of W, W0 = W − s·B A; with --quantize QPiSSA (2404.02948)."""
    start = find("pissa", "start")(iterations=iterations)
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=start)


def MiLoRA(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0) -> object:
    """LoRA that starts as the smallest singular triplets of W, W0 = W − s·B A (arXiv 2406.09044)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=find("milora", "start")())


def OLoRA(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0) -> object:
    """LoRA that starts as the first columns of Q R = W, W0 = W − s·B A (arXiv 2406.01775)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=find("olora", "start")())


def EVA(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, spread: float = 1.0) -> object:
    """LoRA whose A starts as the principal directions of a layer's inputs (arXiv 2410.07170)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=find("eva", "start")(spread=spread))


def CorDA(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, part: str = "largest") -> object:
    """LoRA that starts as components of W weighted by the covariance of its inputs (arXiv 2406.05223)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=find("corda", "start")(part=part))


def LoRAGA(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, gamma: float = 16.0) -> object:
    """LoRA that starts from the singular vectors of the gradient (arXiv 2407.05000)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=find("lora_ga", "start")(gamma=gamma))


def LoftQ(rank: int = 16, alpha: float = 16.0, dropout: float = 0.0, rounds: int = 5) -> object:
    """LoRA that starts from what quantizing W loses; needs --quantize (arXiv 2310.08659)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=find("loftq", "start")(rounds=rounds))


def LQLoRA(rank: int = 16, alpha: float = 16.0, dropout: float = 0.0, rounds: int = 10) -> object:
    """LoRA beside quantized W where the loss is most sensitive; needs --quantize (arXiv 2311.12023)."""
    return find("lora")(rank=rank, alpha=alpha, dropout=dropout, start=find("lq_lora", "start")(rounds=rounds))


def MAM(length: int = 30, bottleneck: int = 512, scale: float = 4.0) -> tuple[Placed, ...]:
    """A short prefix at every self-attention and a scaled parallel adapter at every feed-forward (arXiv 2110.04366)."""
    adapter = find("parallel")(bottleneck=bottleneck, scale=scale)
    return (find("prefix_tuning")(length=length, hidden=800).at("k, v"), adapter.at("ffn"))


def UniPELT(rank: int = 8, alpha: float = 16.0, bottleneck: int = 48, length: int = 10) -> tuple[Placed, ...]:
    """LoRA and a serial adapter, each behind a gate per token, and a prefix, which has none (arXiv 2110.07577)."""
    gated, prefix = find("gated"), find("prefix_tuning")(length=length)
    lora, adapter = find("lora")(rank=rank, alpha=alpha), find("pfeiffer")(bottleneck=bottleneck)
    return (gated(inner=lora).at("q, v"), gated(inner=adapter).at("stream"), prefix.at("k, v"))


def CompacterPlusPlus(bottleneck: int = 24, blocks: int = 4, rank: int = 1) -> tuple[Placed, ...]:
    """Compacter behind the feed-forward only (arXiv 2106.04647)."""
    return (find("compacter")(bottleneck=bottleneck, blocks=blocks, rank=rank).at("ffn"),)


def TopLayers(layers: int = 2) -> object:
    """Full training of everything in the last layers (of each stack) and of a new head; nothing below is computed."""
    if layers < 1:
        raise UserError(f"TopLayers: layers={layers!r}", fix="layers of 1 or more")
    return find("full")().at(f"all@-{layers}:")


def HeadOnly() -> object:
    """Full training of the output head alone; a tied head is untied when it is merged."""
    return find("full")().at("head")


def Embedding() -> object:
    """Full training of the input embedding alone; a tied head keeps its frozen weight."""
    return find("full")().at("embed")


def PERP() -> tuple[Placed, ...]:
    """Retraining after pruning: biases, added where there are none, and norms; zeros stay (arXiv 2312.15230)."""
    return (find("output_bias")().at("all-linear"), find("ln_tuning")().at("norm"))
