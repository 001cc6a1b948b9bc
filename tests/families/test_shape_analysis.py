"""Models that no table knows: blocks, roles, heads and embeddings from names and shapes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from trimtab.core.family import family_of
from trimtab.core.guess import guess
from trimtab.core.places import layers, places, stacks
from trimtab.core.rows import Rows
from trimtab.core.select import select

WIDE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def names(model: nn.Module, where: str) -> list[str]:
    return [place.name for place in select(model, where)]


def roles(model: nn.Module) -> Counter[str]:
    return Counter(place.role for place in places(model) if place.role is not None)


def unknown(model_type: str, head: str, **size: object) -> nn.Module:
    with torch.device("meta"):
        model = getattr(transformers, head).from_config(transformers.AutoConfig.for_model(model_type, **size))
    assert family_of(model) is None
    return model


# ------------------------------------------------------------------------------------------------- home-made models


class Attention(nn.Module):
    """nanoGPT's way: one projection whose thirds are q, k and v."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(x.shape[-1], dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Tiny(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.positions = nn.Embedding(128, width)
        self.tokens = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, 64, bias=False)
        if tied:
            self.unembed.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


@pytest.mark.parametrize("tied", [True, False])
def test_a_home_made_transformer(tied: bool) -> None:
    model = Tiny(tied=tied)
    assert family_of(model) is None
    assert layers(model) == 3
    assert roles(model) == Counter(
        qkv=3, q=3, k=3, v=3, o=3, up=3, down=3, attn=3, ffn=3, block=3, norm=7, embed=1, head=1, attention=3
    )
    assert names(model, "q@1, o@1, attn@1") == ["blocks.1.attn.c_attn:q", "blocks.1.attn.c_proj"]
    assert names(model, "up@0, down@0") == ["blocks.0.mlp.0", "blocks.0.mlp.2"]
    assert names(model, "embed, head") == ["tokens", "unembed"]
    assert select(model, "head")[0].tied == ("tokens" if tied else None)
    assert len(names(model, "all-linear")) == 12
    assert {place.features for place in select(model, "attn, ffn, block")} == {32}


def test_the_parts_of_a_guessed_qkv_are_its_thirds() -> None:
    parts = select(Tiny(), "q@0, k@0, v@0")
    assert [place.rows for place in parts] == [Rows(0, 32), Rows(32, 64), Rows(64, 96)]


class Interleaved(nn.Module):
    """A fused projection whose name does not say in which order its rows are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(16, 48)
        self.o_proj = nn.Linear(16, 16)


def test_no_parts_where_the_order_of_the_rows_is_not_known() -> None:
    model = nn.Sequential(*(Interleaved() for _ in range(2)))
    assert names(model, "qkv") == ["0.qkv_proj", "1.qkv_proj"]
    assert [place for place in places(model) if place.part] == []


class Gated(nn.Module):
    """Llama's own names: w1 gates, w3 goes up, w2 down."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(16, 16) for _ in range(4))
        self.w1, self.w3, self.w2 = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)


def test_short_names() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Gated() for _ in range(2))})
    assert names(model, "q@0, o@0, gate@0, up@0, down@0") == [
        "layers.0.wq", "layers.0.wo", "layers.0.w1", "layers.0.w3", "layers.0.w2",
    ]  # fmt: skip


class Experts(nn.Module):
    """Raw experts with the attributes that transformers puts on them."""

    is_transposed, is_concatenated = True, True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 24))
        self.down_proj = nn.Parameter(torch.randn(4, 12, 16))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.moe = nn.ModuleDict({"router": nn.Linear(16, 4), "experts": Experts()})


def test_raw_experts() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Mixture() for _ in range(2))})
    gate, up, down = select(model, "expert_gate@0, expert_up@0, expert_down@0")
    assert gate.name == "layers.0.moe.experts.gate_up_proj:gate"
    assert (gate.rows, up.rows, down.rows) == (Rows(0, 12), Rows(12, 24), None)
    assert gate.transposed
    assert down.transposed
    assert {place.kind for place in (gate, up, down)} == {"raw"}
    assert names(model, "ffn") == ["layers.0.moe", "layers.1.moe"]
    assert not any("experts" in name for name in names(model, "all-linear"))
    assert sum("experts" in name for name in names(model, "all")) == 4


def test_experts_are_not_the_blocks_although_there_are_more_of_them() -> None:
    def layer() -> nn.Module:
        experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 9), "w2": nn.Linear(9, 8)}) for _ in range(6))
        return nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8), "experts": experts})

    model = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(2))})
    assert layers(model) == 2


# ----------------------------------------------------------------------------------------------------- torch's own


def test_torchs_encoder_reads_its_attention_weights_raw() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    assert layers(model) == 2
    whole = select(model, "qkv@0")[0]
    assert (whole.module, whole.parameter, whole.kind) == ("layers.0.self_attn", "in_proj_weight", "raw")
    q, k, v = select(model, "q@0, k@0, v@0")
    assert [place.rows for place in (q, k, v)] == [Rows(0, 32), Rows(32, 64), Rows(64, 96)]
    assert q.name == "layers.0.self_attn.in_proj_weight:q"
    (o,) = select(model, "o@0")
    assert (o.module, o.parameter, o.kind) == ("layers.0.self_attn.out_proj", "weight", "raw")
    assert names(model, "attn@1, ffn@1") == ["layers.1.dropout1", "layers.1.dropout2"]
    assert names(model, "up@1, down@1") == ["layers.1.linear1", "layers.1.linear2"]
    assert names(model, "all-linear@0") == [
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.out_proj.weight",
        "layers.0.linear1",
        "layers.0.linear2",
    ]
    assert len(select(model, "all-linear", kinds={"linear"})) == 4
    assert {place.features for place in select(model, "attn, ffn, block")} == {32}


def test_the_query_rows_of_in_proj_weight_are_what_attention_uses() -> None:
    """With those rows and their bias zeroed, attention is uniform; with the value rows zeroed, only biases come out."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    places_of = {place.part: place.rows for place in places(model) if place.part}
    x = torch.randn(1, 5, 32)
    assert places_of["q"] == Rows(0, 32)
    with torch.no_grad():
        model.in_proj_weight[:32] = 0
        model.in_proj_bias[:32] = 0
    torch.testing.assert_close(model(x, x, x)[1], torch.full((1, 5, 5), 0.2))
    assert places_of["v"] == Rows(64, 96)
    with torch.no_grad():
        model.in_proj_weight[64:] = 0
        model.in_proj_bias[64:] = 0
    torch.testing.assert_close(model(x, x, x)[0], model.out_proj.bias.expand(1, 5, 32))


def test_torchs_sub_layers_are_the_dropouts_before_the_addition() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).train()
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for index, role in enumerate(("attn", "ffn")):
        module = model.get_submodule(select(model, role)[0].module)
        module.register_forward_hook(lambda module, args, out, c=index + 1.0: torch.full_like(out, c))
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(model(x), x + 3)


def test_torchs_transformer_has_two_stacks_and_cross_attention() -> None:
    model = nn.Transformer(32, 4, 2, 3, 48, batch_first=True)
    assert stacks(model) == {"encoder": 2, "decoder": 3}
    assert layers(model) == 5
    assert names(model, "cross.q@0") == ["decoder.layers.0.multihead_attn.in_proj_weight:q"]
    assert names(model, "decoder/attn@0, cross.attn@0, decoder/ffn@0") == [
        "decoder.layers.0.dropout1",
        "decoder.layers.0.dropout2",
        "decoder.layers.0.dropout3",
    ]
    assert names(model, "encoder/v@-1") == ["encoder.layers.1.self_attn.in_proj_weight:v"]


def test_attention_whose_key_and_value_have_other_widths_keeps_three_raw_weights() -> None:
    model = nn.MultiheadAttention(32, 4, kdim=16, vdim=24)
    assert names(model, "q, k, v, o") == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


# ------------------------------------------------------------------------------------------- no transformer at all


def test_a_plain_mlp_has_linears_and_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert layers(model) == 0
    assert names(model, "all-linear") == ["0", "2", "4"]
    assert roles(model) == Counter()


def test_a_root_that_is_a_linear() -> None:
    (place,) = select(nn.Linear(4, 3), "all-linear")
    assert (place.name, place.module, place.kind) == ("", "", "linear")


def test_a_list_of_linears_counts_as_layers() -> None:
    model = nn.ModuleDict({"hidden": nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), "head": nn.Linear(8, 3)})
    assert layers(model) == 4
    assert names(model, "all-linear@-1") == ["hidden.3"]
    assert names(model, "head") == ["head"]


def test_a_convnet() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU())

    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "body": nn.ModuleList(block() for _ in range(3))})
    model["fc"] = nn.Linear(8, 10)
    assert layers(model) == 3
    assert [place.kind for place in select(model, "all")] == ["conv", *["conv", "norm"] * 3, "linear"]
    assert names(model, "norm@1") == ["body.1.1"]
    assert names(model, "head") == ["fc"]
    assert len(select(model, "all", kinds={"conv"})) == 4


def test_stages_count_as_the_blocks_in_them() -> None:
    model = unknown(
        "swin", "AutoModelForImageClassification", embed_dim=16, depths=[1, 2], num_heads=[2, 4], image_size=32
    )
    assert layers(model) == 3
    assert names(model, "q@1") == ["swin.encoder.layers.1.blocks.0.attention.q_proj"]
    assert [place.features for place in select(model, "block")] == [16, 32, 32]
    model = unknown("resnet", "AutoModelForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3])
    assert layers(model) == 5


# -------------------------------------------------------------------------------- architectures without a table


def test_bart() -> None:
    model = unknown(
        "bart", "AutoModelForSeq2SeqLM", vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    assert stacks(model) == {"encoder": 2, "decoder": 3}
    assert names(model, "cross.v@0") == ["model.decoder.layers.0.encoder_attn.v_proj"]
    assert names(model, "encoder/up@0, encoder/ffn@0") == ["model.encoder.layers.0.fc1", "model.encoder.layers.0.fc2"]
    assert names(model, "embed") == ["model.encoder.embed_tokens", "model.decoder.embed_tokens"]
    assert len(names(model, "all-linear")) == 2 * 6 + 3 * 10


def test_a_decoder_alone_is_one_stack() -> None:
    model = unknown("opt", "AutoModelForCausalLM", **WIDE, ffn_dim=48, word_embed_proj_dim=32)
    assert stacks(model) == {None: 2}
    assert names(model, "embed") == ["model.decoder.embed_tokens"]
    assert names(model, "q@0, attn@0") == [
        "model.decoder.layers.0.self_attn.q_proj",
        "model.decoder.layers.0.self_attn.out_proj",
    ]


@pytest.mark.parametrize("model_type", ["codegen", "gpt_bigcode", "persimmon"])
def test_fused_projections_that_are_not_thirds(model_type: str) -> None:
    size = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    model = unknown(model_type, "AutoModelForCausalLM", **(WIDE if model_type == "persimmon" else size))
    assert len(names(model, "qkv")) == 2
    assert [place for place in places(model) if place.part] == []


def test_mpt_and_modernbert_have_thirds() -> None:
    model = unknown("mpt", "AutoModelForCausalLM", vocab_size=64, d_model=32, n_layers=2, n_heads=4)
    assert names(model, "v@0") == ["transformer.blocks.0.attn.Wqkv:v"]
    model = unknown("modernbert", "AutoModelForMaskedLM", **WIDE, pad_token_id=0)
    assert names(model, "q@0, gate_up@0, down@0") == [
        "model.layers.0.attn.Wqkv:q",
        "model.layers.0.mlp.Wi",
        "model.layers.0.mlp.Wo",
    ]


def test_clip_has_a_vision_stack_beside_the_text() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 8}
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=WIDE, vision_config=vision))
    assert stacks(model) == {"vision": 3, None: 2}
    assert len(names(model, "vision/q")) == 3
    assert names(model, "embed") == ["text_model.embeddings.token_embedding"]


def test_albert_shares_one_block() -> None:
    model = unknown("albert", "AutoModelForMaskedLM", **WIDE, embedding_size=16)
    assert layers(model) == 1
    assert [name.rsplit(".", 1)[-1] for name in names(model, "up, down")] == ["ffn", "ffn_output"]


def test_the_mixture_of_deepseek_is_its_ffn() -> None:
    model = unknown(
        "deepseek_v3", "AutoModelForCausalLM", **WIDE, n_routed_experts=4, num_local_experts=4, n_group=1,
        topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    assert names(model, "ffn") == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp"]
    assert names(model, "expert_gate") == ["model.layers.1.mlp.experts.gate_up_proj:gate"]


def test_a_head_is_as_wide_as_the_vocabulary_not_as_a_table_of_positions() -> None:
    model = nn.ModuleDict({"positions": nn.Embedding(128, 32), "tokens": nn.Embedding(64, 32)})
    model.update({"widen": nn.Linear(32, 128), "out": nn.Linear(128, 64), "aside": nn.Linear(32, 5)})
    assert names(model, "head") == ["out"]
    assert names(model, "all-linear") == ["widen", "aside"]


def test_a_guess_is_a_table_too() -> None:
    family = guess(Tiny())
    assert family.name == "Tiny"
    assert family.blocks == {"blocks": None}
    assert family.roles["q"] == ("attn.c_attn:q",)
    assert family.fused == {"attn.c_attn": {"q": 1, "k": 1, "v": 1}}
