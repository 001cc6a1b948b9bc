"""Every table against a tiny random model of every model type it claims."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import build, config, outline, run, scramble
from torch import Tensor, nn

import trimtab.families
from trimtab.core.family import family_of, regions, tables
from trimtab.core.places import Place, places, readings, stacks
from trimtab.core.rows import Rows
from trimtab.core.select import select

TYPES = sorted(tables())
PLAIN = Counter(q=2, k=2, v=2, o=2, gate=2, up=2, down=2, attn=2, ffn=2, block=2)
UNGATED = PLAIN - Counter(gate=2)
EXPERTS = Counter(expert_gate_up=2, expert_gate=2, expert_up=2, expert_down=2)
HALF = Counter(expert_gate_up=1, expert_gate=1, expert_up=1, expert_down=1)
T5 = Counter(q=5, k=5, v=5, o=5, up=5, down=5, attn=5, ffn=5, block=5)
T5 += Counter({"cross.q": 3, "cross.k": 3, "cross.v": 3, "cross.o": 3, "cross.attn": 3})
SAM = Counter(qkv=3, q=5, k=5, v=5, o=5, up=5, down=5, attn=5, ffn=5, block=5)
SAM += Counter({"cross.q": 5, "cross.k": 5, "cross.v": 5, "cross.o": 5, "cross.attn": 5})
GROUPS = (
    (PLAIN, "llama mistral ministral ministral3 qwen2 qwen3 gemma smollm3 granite olmo cohere cohere2 helium"),
    (PLAIN, "seed_oss ernie4_5 gemma2 gemma3_text olmo2 olmo3 exaone4"),
    (UNGATED, "nemotron arcee apertus megatron-bert vit deit ijepa vit_msn"),
    (UNGATED + Counter(stream=2), "bert roberta camembert xlm-roberta electra ernie data2vec-text"),
    (UNGATED + Counter(stream=2), "deberta-v2 mpnet distilbert"),
    (UNGATED + Counter(qkv=2), "gpt2 imagegpt gpt_neox bloom falcon"),
    (UNGATED + Counter(qkv=2, stream=2), "deberta"),
    (PLAIN + Counter(gate_up=2), "glm glm4"),
    (PLAIN + Counter(gate_up=2, qkv=2), "phi3"),
    (UNGATED - Counter(up=2, down=2) + EXPERTS, "mixtral olmoe minimax_m2 phimoe"),
    (UNGATED - Counter(up=2, down=2) + Counter(expert_gate_up=2, expert_down=2), "gpt_oss"),
    (PLAIN + HALF, "qwen2_moe dots1 glm4_moe"),
    (PLAIN - Counter(gate=1, up=1, down=1) + HALF, "qwen3_moe"),
    (T5, "t5"),
    (T5 + Counter(gate=5), "mt5 umt5"),
    (SAM, "sam sam_hq"),
    (Counter(qkv=3, q=3, k=3, v=3, o=3, up=3, down=3, attn=3, ffn=3, block=3), "sam_vision_model sam_hq_vision_model"),
)
COUNTS = {model_type: counts for counts, types in GROUPS for model_type in types.split()}


def names(model: nn.Module, where: str) -> list[str]:
    return [place.name for place in select(model, where)]


def by_role(model: nn.Module, *roles: str) -> list[Place]:
    return [place for place in places(model) if place.role in roles]


# ----------------------------------------------------------------------------------------------------- the tables


def test_a_table_is_a_file_of_data_with_its_own_name() -> None:
    for info in pkgutil.iter_modules(trimtab.families.__path__):
        module = importlib.import_module(f"trimtab.families.{info.name}")
        assert module.FAMILY.name == info.name
        assert {name for name in vars(module) if not name.startswith("_")} == {"FAMILY", "Family", "annotations"}
        for model_type in module.FAMILY.model_types:
            assert model_type in transformers.CONFIG_MAPPING, model_type


def test_every_type_has_its_expected_counts_written_down() -> None:
    assert set(COUNTS) == set(TYPES)


@pytest.mark.parametrize("model_type", TYPES)
def test_roles_are_found_as_often_as_the_architecture_has_them(model_type: str) -> None:
    model = outline(model_type)
    family = family_of(model)
    assert family is not None
    assert model_type in family.model_types
    found = Counter(place.role for place in places(model) if place.role not in ("embed", "norm", "head", None))
    assert found == COUNTS[model_type] + Counter(attention=COUNTS[model_type]["q"])
    blocks = by_role(model, "block")
    assert sum(stacks(model).values()) == len(blocks)
    assert len(select(model, "embed")) == (2 if family.name == "t5" else 1)


@pytest.mark.parametrize("model_type", TYPES)
def test_embed_is_what_the_forward_looks_up_in_and_features_is_what_comes_out(model_type: str) -> None:
    model = build(model_type)
    widths: dict[str, set[int]] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, out, path=path: widths.setdefault(path, set()).add(width(out))
        )
    run(model)
    for place in by_role(model, "embed"):
        assert widths[place.module]
    for place in by_role(model, "attn", "ffn", "cross.attn", "block"):
        assert place.kind == "opaque"
        assert widths[place.module] == {place.features}, place


def width(out: Any) -> int:
    out = out[0] if isinstance(out, tuple) else out
    return out.shape[-1] if isinstance(out, Tensor) else -1


# ------------------------------------------------------------------------ sub-layers: what is added to the residual


def replace_output(model: nn.Module, path: str, value: Tensor) -> None:
    """Make a module return `value` (expanded) whatever it computes."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        fake = value.expand_as(first).clone()
        return (fake, *out[1:]) if isinstance(out, tuple) else fake

    model.get_submodule(path).register_forward_hook(hook)


def blocks_seen(model: nn.Module, root: str) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of every block below `root`, as the model runs."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        y = out[0] if isinstance(out, tuple) else out
        seen.append((x.clone(), y.clone()))

    for place in by_role(model, "block"):
        if place.module.startswith(root):
            model.get_submodule(place.module).register_forward_hook(hook, with_kwargs=True)
    return seen


POST_NORM = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "deberta": ("attention.output.LayerNorm", "output.LayerNorm"),
    "mpnet": ("attention.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
}


@pytest.mark.parametrize("model_type", [name for name in TYPES if name != "megatron-bert"])
def test_attn_and_ffn_are_exactly_what_is_added_to_the_residual_stream(model_type: str) -> None:
    """With the outputs of `attn` and `ffn` replaced by constants, a block adds those constants and nothing else."""
    model = build(model_type)
    family = tables()[model_type].name
    root = "vision_encoder" if family == "sam" else ""
    constants = {}
    for index, role in enumerate(("attn", "cross.attn", "ffn")):
        for place in by_role(model, role):
            if place.module.startswith(root):
                constants[role] = torch.randn(place.features or 0, generator=torch.Generator().manual_seed(index))
                replace_output(model, place.module, constants[role])
    seen = blocks_seen(model, root)
    run(model)
    assert seen
    scale = model.config.residual_multiplier if model_type == "granite" else 1.0
    for place, (x, y) in zip(by_role(model, "block"), seen, strict=False):
        block = model.get_submodule(place.module)
        added = {role: scale * value for role, value in constants.items()}
        if family in POST_NORM:
            first, second = (block.get_submodule(path) for path in POST_NORM[family])
            expected = second(first(x + added["attn"]) + added["ffn"])
        else:
            crossed = added.get("cross.attn", 0) if place.stack == "decoder" else 0
            expected = x + added["attn"] + crossed + added["ffn"]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["sam", "sam_hq"])
def test_the_mask_decoder_adds_attn_cross_attn_and_ffn(model_type: str) -> None:
    """Tokens attend to themselves (no residual in the first block), to the image, then the MLP; a norm after each."""
    model = build(model_type)
    constants = {}
    for index, role in enumerate(("attn", "cross.attn", "ffn")):
        for place in by_role(model, role):
            if place.stack == "decoder":
                constants[role] = torch.randn(place.features or 0, generator=torch.Generator().manual_seed(index))
                replace_output(model, place.module, constants[role])
    seen: list[tuple[Tensor, Tensor]] = []
    for place in by_role(model, "block"):
        if place.stack == "decoder":
            model.get_submodule(place.module).register_forward_hook(
                lambda module, args, kwargs, out: seen.append((kwargs["queries"].clone(), out[0].clone())),
                with_kwargs=True,
            )
    run(model)
    assert len(seen) == 2
    for index, (x, y) in enumerate(seen):
        block = model.get_submodule(f"mask_decoder.transformer.layers.{index}")
        first = constants["attn"].expand_as(x) + (x if index else 0)
        second = block.layer_norm2(block.layer_norm1(first) + constants["cross.attn"])
        torch.testing.assert_close(y, block.layer_norm3(second + constants["ffn"]), rtol=1e-4, atol=1e-4)


def test_megatron_bert_norms_before_its_sub_layers() -> None:
    model = build("megatron-bert")
    for index, role in enumerate(("attn", "ffn")):
        for place in by_role(model, role):
            replace_output(model, place.module, torch.full((32,), float(index + 1)))
    seen = blocks_seen(model, "")
    run(model)
    for x, y in seen:
        torch.testing.assert_close(y, x + 3.0, rtol=1e-4, atol=1e-4)


BESIDE = ("cohere", "cohere2", "falcon", "gpt_neox")
"""Attention and feed-forward take in the same stream."""


@pytest.mark.parametrize("model_type", [name for name in TYPES if tables()[name].name != "sam"])
def test_enters_is_where_the_residual_stream_goes_into_a_sub_layer(model_type: str) -> None:
    """What is read for `attn` is the block's input, for `ffn` that and what the attentions added, normed if post-norm.

    In post-norm models `stream` is the norm behind the feed-forward: what it puts out is the block's output.
    """
    model = build(model_type)
    family = tables()[model_type].name
    post = family in POST_NORM and model_type != "megatron-bert"
    places = [place for role in ("attn", "cross.attn", "ffn") for place in by_role(model, role)]
    entered: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}

    def entering(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        entered[name] = args[0] if args else kwargs["hidden_states"]

    for place, reading in zip(places, readings(model, places, "stream"), strict=True):
        assert reading is not None
        assert reading.entering
        read, adds = model.get_submodule(reading.module), model.get_submodule(place.module)
        read.register_forward_pre_hook(functools.partial(entering, name=place.module), with_kwargs=True)
        adds.register_forward_hook(
            lambda module, args, out, name=place.module: added.__setitem__(name, out[0] if type(out) is tuple else out)
        )
    seen = blocks_seen(model, "")
    run(model)
    scale = model.config.residual_multiplier if model_type == "granite" else 1.0
    for block, (x, y) in zip(by_role(model, "block"), seen, strict=True):
        at = {place.role: place.module for place in places if place.module.startswith(block.module + ".")}
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
        close(entered[at["attn"]], x)
        expected = x if model_type in BESIDE else x + scale * added[at["attn"]]
        if "cross.attn" in at:
            close(entered[at["cross.attn"]], expected)
            expected = expected + added[at["cross.attn"]]
        if post:
            first, second = (model.get_submodule(block.module).get_submodule(path) for path in POST_NORM[family])
            expected = first(expected)
            (stream,) = select(model, f"stream@{block.layer}")
            assert model.get_submodule(stream.module) is second
            close(second(expected + added[at["ffn"]]), y)
        else:
            assert select(model, f"stream@{block.layer}") == select(model, f"block@{block.layer}")
        close(entered[at["ffn"]], expected)


def test_the_queries_of_an_attention_are_read_where_they_come_out() -> None:
    for model_type, names in {
        "llama": ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"],
        "gpt2": ["h.0.attn.c_attn", "h.1.attn.c_attn"],
    }.items():
        model = outline(model_type)
        found = readings(model, select(model, "o"), "q")
        assert [one.module for one in found if one is not None and not one.entering] == names
        assert {one.rows for one in found if one is not None} == {Rows(0, 32) if model_type == "gpt2" else None}
    model = outline("t5")
    crossed = readings(model, select(model, "cross.o@0"), "q")
    assert [one.module for one in crossed if one is not None] == ["decoder.block.0.layer.1.EncDecAttention.q"]
    bloom = readings(outline("bloom"), select(outline("bloom"), "o"), "q")
    assert {one.rows for one in bloom if one is not None} == {Rows(0, 8, 4)}


# ----------------------------------------------------------------------------------------- fused weights and slices


def rows_applied(model: nn.Module, place: Place, x: Tensor) -> Tensor:
    """What the rows of a part give for an input: W[rows] x + b[rows], from the stored tensors."""
    module = model.get_submodule(place.module)
    W, b = module.weight, module.bias
    W = W.T if type(module).__name__ == "Conv1D" else W
    rows = torch.arange(W.shape[0]) if place.rows is None else place.rows.of(torch.arange(W.shape[0]))
    return F.linear(x, W[rows], None if b is None else b[rows])


SHARED = {"multi_query": False, "new_decoder_architecture": True, "num_kv_heads": 2}
"""Falcon's newer layout: two query heads share a key head, and each such group has its rows together."""


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((one, {}) for one in ("gpt2", "phi3", "sam_vision_model", "sam_hq_vision_model", "glm", "llama", "vit")),
        *((one, {}) for one in ("gpt_neox", "falcon")),
        ("falcon", {"multi_query": False}),
        ("falcon", {"multi_query": False, "bias": True, "alibi": True}),
        ("falcon", SHARED),
    ],
)
def test_parts_q_k_v_are_the_rows_attention_uses(
    model_type: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first position (where rotary embeddings do nothing) q, k and v reach attention as W[rows] x + b[rows]."""
    model = build(model_type, **changes)
    used: list[tuple[Tensor, Tensor, Tensor]] = []
    attention = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        used.append((query, key, value))
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    inputs: dict[str, Tensor] = {}
    for place in by_role(model, "q", "k", "v"):
        module = model.get_submodule(place.module)
        module.register_forward_pre_hook(lambda module, args, at=place.module: inputs.__setitem__(at, args[0]))
    run(model)
    for index, part in enumerate("qkv"):
        found = by_role(model, part)
        assert len(found) == len(used)
        for place, tensors in zip(found, used, strict=True):
            x = inputs[place.module].reshape(-1, inputs[place.module].shape[-1])[0]
            mine, theirs = rows_applied(model, place, x), tensors[index][0, :, 0]
            repeats = theirs.numel() // mine.numel()
            assert place.rows is None or mine.numel() == len(place.rows)
            expected = mine.view(-1, theirs.shape[-1]).repeat_interleave(repeats, dim=0)
            torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["phi3", "glm", "glm4"])
def test_the_parts_of_gate_up_are_in_the_order_the_activation_reads_them(model_type: str) -> None:
    model = build(model_type)
    seen: dict[str, Tensor] = {}
    mlp = model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0]))
    mlp.activation_fn.register_forward_pre_hook(lambda module, args: seen.__setitem__("gate", args[0]))
    run(model)
    gate, up = (select(model, f"{role}@0")[0] for role in ("gate", "up"))
    assert (gate.rows, up.rows) == (Rows(0, 48), Rows(48, 96))
    torch.testing.assert_close(seen["gate"], rows_applied(model, gate, seen["x"]), rtol=1e-4, atol=1e-4)


def test_phi3_divides_its_rows_by_heads() -> None:
    model = outline("phi3")
    assert [place.rows for place in select(model, "q@0, k@0, v@0")] == [Rows(0, 32), Rows(32, 48), Rows(48, 64)]
    assert names(model, "qkv@0") == ["layers.0.self_attn.qkv_proj"]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "dots1", "glm4_moe"])
def test_expert_rows_and_orientation(model_type: str) -> None:
    """What reaches the activation is x times the `gate` rows of one expert's (out, in) matrix."""
    model = build(model_type)
    model.set_experts_implementation("eager")
    gate, up, down = (select(model, f"expert_{role}")[-1] for role in ("gate", "up", "down"))
    experts = model.get_submodule(gate.module)
    assert (gate.kind, gate.parameter, gate.transposed) == ("raw", "gate_up_proj", False)
    W = experts.gate_up_proj
    assert gate.rows == Rows(0, W.shape[1] // 2)
    assert up.rows == Rows(W.shape[1] // 2, W.shape[1])
    assert experts.down_proj.shape == (4, 32, W.shape[1] // 2)
    assert down.name == f"{gate.module}.down_proj"
    seen: list[Tensor] = []
    experts.register_forward_pre_hook(lambda module, args: seen.insert(0, args[0]))
    experts.act_fn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(model)
    x, first = seen[0], seen[1]
    possible = torch.einsum("tn,eon->teo", x, gate.rows.of(W, 1)).flatten(0, 1)
    assert torch.cdist(first, possible).amin(1).max() < 1e-2


def test_gpt_oss_stores_its_experts_transposed_and_interleaved() -> None:
    model = build("gpt_oss")
    whole, down = select(model, "expert_gate_up@0, expert_down@0")
    experts = model.get_submodule(whole.module)
    assert whole.transposed
    assert down.transposed
    assert experts.is_transposed
    assert not experts.is_concatenated
    assert experts.gate_up_proj.shape == (4, 32, 96)
    assert [place for place in places(model) if place.part] == []


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2", "phimoe", "dots1"])
def test_the_attributes_of_expert_modules_agree_with_the_table(model_type: str) -> None:
    model = outline(model_type)
    for place in by_role(model, "expert_gate_up"):
        experts = model.get_submodule(place.module)
        assert (experts.is_transposed, experts.is_concatenated) == (False, True)


@pytest.mark.parametrize("model_type", ["deberta", "bloom"])
def test_q_k_and_v_of_every_head_are_found_where_attention_is_the_models_own(model_type: str) -> None:
    """Every head's rows are its q, its k, its v; without values nothing is left for the output projection."""
    model = build(model_type)
    for index, part in enumerate("qkv"):
        for place in by_role(model, part):
            assert place.rows is not None
            every = torch.arange(96)
            assert torch.equal(place.rows.of(every), every.view(4, 3, 8)[:, index].flatten())
    for place in select(model, "v"):
        value = model.get_submodule(place.module)
        assert place.rows is not None
        value.weight.data = place.rows.put(value.weight.data, torch.zeros(32, 32), 0)
        if value.bias is not None:
            value.bias.data = place.rows.put(value.bias.data, torch.zeros(32))
    for name, parameter in model.named_parameters():
        if name.endswith("v_bias"):
            parameter.data.zero_()
    seen: list[Tensor] = []
    for place in select(model, "o"):
        model.get_submodule(place.module).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(model)
    assert len(seen) == 2
    assert all(not x.any() for x in seen)


def test_a_width_that_no_heads_divide_offers_no_parts() -> None:
    with torch.device("meta"):
        model = transformers.GPTNeoXModel(config("gpt_neox"))
        model.layers[0].attention.query_key_value = torch.nn.Linear(32, 104)
    assert len(names(model, "qkv")) == 2
    assert len(names(model, "q")) == 1


def test_the_bert_family_reads_q_k_v_where_the_table_says() -> None:
    """Zeroed value projections leave nothing for the output projection; zeroed queries make attention uniform."""
    model = build("bert")
    for place in select(model, "v"):
        value = model.get_submodule(place.module)
        value.weight.data.zero_()
        value.bias.data.zero_()
    seen: list[Tensor] = []
    for place in select(model, "o"):
        model.get_submodule(place.module).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(model)
    assert all(not x.any() for x in seen)


# -------------------------------------------------------------------------------------------------- names in full


def test_names_of_llama() -> None:
    model = outline("llama", "AutoModelForCausalLM")
    assert names(model, "q, v@1") == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert names(model, "attn@0, ffn@0, block@0") == [
        "model.layers.0",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp",
    ]
    assert names(model, "embed, head") == ["model.embed_tokens", "lm_head"]
    assert names(model, "norm") == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    assert len(names(model, "all-linear")) == 14
    assert len(names(model, "all")) == 14 + 1 + 5 + 1


def test_names_of_gemma() -> None:
    model = outline("gemma3_text", "AutoModelForCausalLM")
    assert names(model, "attn@0, ffn@0") == [
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.post_feedforward_layernorm",
    ]
    assert {place.kind for place in select(model, "attn, ffn")} == {"opaque"}
    assert "model.layers.0.self_attn.q_norm" in names(model, "norm")


def test_names_of_gpt2() -> None:
    model = outline("gpt2", "AutoModelForCausalLM")
    q, k, v = select(model, "q@1, k@1, v@1")
    assert (q.name, q.rows) == ("transformer.h.1.attn.c_attn:q", Rows(0, 32))
    assert (k.name, k.rows) == ("transformer.h.1.attn.c_attn:k", Rows(32, 64))
    assert (v.name, v.rows) == ("transformer.h.1.attn.c_attn:v", Rows(64, 96))
    assert names(model, "o@0, up@0, down@0") == [
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ]
    assert names(model, "attn@0, ffn@0") == ["transformer.h.0.attn.resid_dropout", "transformer.h.0.mlp.dropout"]
    assert len(names(model, "all-linear")) == 8


def test_gpt2_with_cross_attention() -> None:
    model = outline("gpt2", add_cross_attention=True)
    assert [place.rows for place in select(model, "cross.k@0, cross.v@0")] == [Rows(0, 32), Rows(32, 64)]
    assert names(model, "cross.q@0, cross.attn@0") == ["h.0.crossattention.q_attn", "h.0.crossattention.resid_dropout"]
    assert [place.rows for place in select(model, "q@0, k@0, v@0")] == [Rows(0, 32), Rows(32, 64), Rows(64, 96)]


def test_names_of_bert() -> None:
    model = outline("bert", "AutoModelForSequenceClassification")
    assert names(model, "q@0, o@0, up@0, down@0, attn@0, ffn@0") == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.attention.output.dropout",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.0.output.dropout",
    ]
    assert names(model, "embed") == ["bert.embeddings.word_embeddings"]
    assert names(model, "head") == ["classifier"]
    assert len(names(model, "all-linear")) == 13
    assert names(model, "all-linear")[-1] == "bert.pooler.dense"


def test_a_bert_decoder_has_cross_attention() -> None:
    model = outline("bert", is_decoder=True, add_cross_attention=True)
    assert names(model, "cross.q@0, cross.attn@0") == [
        "encoder.layer.0.crossattention.self.query",
        "encoder.layer.0.crossattention.output.dropout",
    ]


def test_names_of_mpnet_and_distilbert() -> None:
    model = outline("mpnet")
    assert names(model, "q@0, attn@0, ffn@0") == [
        "encoder.layer.0.attention.attn.q",
        "encoder.layer.0.attention.dropout",
        "encoder.layer.0.output.dropout",
    ]
    model = outline("distilbert")
    assert names(model, "q@0, attn@0, ffn@0") == [
        "transformer.layer.0.attention.q_lin",
        "transformer.layer.0.attention.out_lin",
        "transformer.layer.0.ffn",
    ]


def test_names_of_t5() -> None:
    model = outline("t5", "AutoModelForSeq2SeqLM", feed_forward_proj="gated-gelu")
    assert stacks(model) == {"encoder": 2, "decoder": 3}
    assert names(model, "encoder/q@1, decoder/v@-1, cross.q@0") == [
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.2.layer.0.SelfAttention.v",
    ]
    assert names(model, "attn@0, cross.attn@0, ffn@0") == [
        "encoder.block.0.layer.0.dropout",
        "encoder.block.0.layer.1.dropout",
        "decoder.block.0.layer.0.dropout",
        "decoder.block.0.layer.1.dropout",
        "decoder.block.0.layer.2.dropout",
    ]
    assert names(model, "decoder/gate@0, decoder/up@0, decoder/down@0") == [
        "decoder.block.0.layer.2.DenseReluDense.wi_0",
        "decoder.block.0.layer.2.DenseReluDense.wi_1",
        "decoder.block.0.layer.2.DenseReluDense.wo",
    ]
    assert names(model, "embed") == ["encoder.embed_tokens", "decoder.embed_tokens"]
    assert len(names(model, "all-linear")) == 2 * 7 + 3 * 11


def test_a_t5_encoder_alone_is_one_stack_by_name() -> None:
    model = transformers.T5EncoderModel(outline("t5").config)
    assert stacks(model) == {"encoder": 2}
    assert names(model, "q@0") == ["encoder.block.0.layer.0.SelfAttention.q"]


def test_names_of_vit() -> None:
    model = outline("vit", "AutoModelForImageClassification")
    assert names(model, "q@0, attn@0, ffn@0") == [
        "vit.layers.0.attention.q_proj",
        "vit.layers.0.attention.o_proj",
        "vit.layers.0.mlp",
    ]
    (embed,) = select(model, "embed")
    assert (embed.name, embed.kind) == ("vit.embeddings.patch_embeddings.projection", "conv")
    assert names(model, "head") == ["classifier"]


def test_names_of_sam() -> None:
    model = outline("sam")
    assert stacks(model) == {"vision": 3, "decoder": 2}
    assert [(place.name, place.rows) for place in select(model, "vision/q@0, decoder/q@0")] == [
        ("vision_encoder.layers.0.attn.qkv:q", Rows(0, 32)),
        ("mask_decoder.transformer.layers.0.self_attn.q_proj", None),
    ]
    cross = select(model, "cross.q")
    assert [place.layer for place in cross] == [0, 0, 1, 1, None]
    assert {place.stack for place in cross} == {"decoder"}
    assert {place.features for place in select(model, "decoder/attn, cross.attn")} == {24}
    assert {place.features for place in select(model, "vision/attn, vision/block")} == {32}


# ----------------------------------------------------------------------------------------- heads and tied weights


@pytest.mark.parametrize(
    "model_type,head,expected",
    [
        ("llama", "AutoModelForSequenceClassification", ["score"]),
        ("llama", "AutoModelForTokenClassification", ["score"]),
        ("gpt2", "AutoModelForSequenceClassification", ["score"]),
        ("roberta", "AutoModelForSequenceClassification", ["classifier.dense", "classifier.out_proj"]),
        ("distilbert", "AutoModelForSequenceClassification", ["pre_classifier", "classifier"]),
        ("mpnet", "AutoModelForSequenceClassification", ["classifier.dense", "classifier.out_proj"]),
        ("electra", "AutoModelForSequenceClassification", ["classifier.dense", "classifier.out_proj"]),
        ("deberta-v2", "AutoModelForSequenceClassification", ["pooler.dense", "classifier"]),
        ("bert", "AutoModelForMaskedLM", ["cls.predictions.decoder"]),
        ("bert", "AutoModelForQuestionAnswering", ["qa_outputs"]),
        ("bert", "AutoModelForTokenClassification", ["classifier"]),
        ("t5", "AutoModelForSeq2SeqLM", ["lm_head"]),
        ("mixtral", "AutoModelForCausalLM", ["lm_head"]),
    ],
)
def test_head_is_what_is_put_on_top_of_the_base_model(model_type: str, head: str, expected: list[str]) -> None:
    model = outline(model_type, head)
    assert names(model, "head") == expected
    assert not set(names(model, "all-linear")) & set(expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads(model_type: str, tied: bool) -> None:
    model = build(model_type, "AutoModelForCausalLM", tie_word_embeddings=tied)
    (head,), (embed,) = select(model, "head"), select(model, "embed")
    assert head.tied == (embed.name if tied else None)
    assert embed.tied == (head.name if tied else None)
    assert (head.name in names(model, "all")) is not tied
    assert head.name not in names(model, "all-linear")


def test_the_transform_in_front_of_a_masked_head_is_an_ordinary_linear() -> None:
    model = outline("bert", "AutoModelForMaskedLM")
    assert "cls.predictions.transform.dense" in names(model, "all-linear")
    assert len(names(model, "all-linear")) == 13


def test_a_router_is_no_linear() -> None:
    for model_type in ("mixtral", "phimoe", "qwen2_moe"):
        model = outline(model_type)
        assert not [name for name in names(model, "all-linear") if name.endswith((".router", ".gate"))]


# ------------------------------------------------------------------------------------- wrappers and composite models


class Classifier(nn.Module):
    """A user's own module around a known model."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = outline("bert")
        self.classifier = nn.Linear(32, 3)


def test_a_known_model_inside_a_users_module() -> None:
    model = Classifier()
    family = family_of(model)
    assert family is not None
    assert family.name == "bert"
    assert names(model, "q@0") == ["backbone.encoder.layer.0.attention.self.query"]
    assert names(model, "head") == ["classifier"]


def test_a_composite_model_has_roles_in_its_known_parts() -> None:
    text = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    text.num_attention_heads = text.num_key_value_heads = 4
    image = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=image, text_config=text)
        )
    assert [path for path, _, _ in regions(model)] == ["model.language_model"]
    assert all(name.startswith("model.language_model.") for name in names(model, "q, v, ffn"))
    assert any(".vision_tower." in name for name in names(model, "all-linear"))
    assert len(names(model, "*.vision_tower.*.q_proj")) == 3


def test_two_known_models_become_an_encoder_and_a_decoder() -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    first = transformers.BertConfig(**size, num_attention_heads=4)
    second = transformers.BertConfig(**size, num_attention_heads=4, is_decoder=True, add_cross_attention=True)
    joint = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(first, second)
    model = transformers.EncoderDecoderModel(joint)
    assert stacks(model) == {"encoder": 2, "decoder": 2}
    assert names(model, "decoder/cross.q@1") == ["decoder.bert.encoder.layer.1.crossattention.self.query"]
    assert names(model, "encoder/embed") == ["encoder.embeddings.word_embeddings"]


def test_scrambling_keeps_ties() -> None:
    model = scramble(build("gpt2", "AutoModelForCausalLM"))
    assert model.lm_head.weight is model.transformer.wte.weight
