"""The `where` language on small models: every form of a term, and every error."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.places import Place, layers, places, stacks
from trimtab.core.rows import Rows
from trimtab.core.select import KINDS, ROLES, select

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=12, n_head=4))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_hidden_layers=32))


@pytest.fixture(scope="module")
def t5() -> nn.Module:
    with torch.device("meta"):
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4)
        return transformers.T5ForConditionalGeneration(config)


def names(model: nn.Module, where: str | list[str], **options: set[str]) -> list[str]:
    return [place.name for place in select(model, where, **options)]


def at(model: nn.Module, where: str) -> list[int | None]:
    return [place.layer for place in select(model, where)]


def complaint(model: nn.Module, where: str | list[str], **options: set[str]) -> str:
    with pytest.raises(UserError) as error:
        select(model, where, **options)
    assert error.value.message.startswith("where: ")
    assert error.value.fix
    return error.value.message.removeprefix("where: ")


# ------------------------------------------------------------------------------------------------------------ terms


def test_the_name_of_a_place() -> None:
    assert Place("").name == ""
    assert Place("a.b").name == "a.b"
    assert Place("a.b", "weight").name == "a.b.weight"
    assert Place("a.b", part="q", rows=(0, 4)).name == "a.b:q"
    assert Place("a", "in_proj_weight", "q").name == "a.in_proj_weight:q"
    assert Place("", "in_proj_weight").name == "in_proj_weight"
    assert len({Place("a"), Place("a"), Place("b")}) == 2


def test_roles_come_in_model_order_each_once(llama: nn.Module) -> None:
    found = names(llama, "v, q, q, q_proj")
    assert len(found) == 64
    assert found[:3] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert found == names(llama, ["q", "v"]) == names(llama, ["q, v"])


def test_all_linear_leaves_out_head_embeddings_and_norms(llama: nn.Module, gpt2: nn.Module) -> None:
    assert len(names(llama, "all-linear")) == 32 * 7
    assert {place.kind for place in select(llama, "all-linear")} == {"linear"}
    assert len(names(gpt2, "all-linear")) == 12 * 4


def test_all_is_every_weight(llama: nn.Module, gpt2: nn.Module) -> None:
    assert len(names(llama, "all")) == 32 * 7 + 65 + 1 + 1
    assert len(names(gpt2, "all")) == 12 * 4 + 25 + 2
    assert names(gpt2, "all", kinds={"embedding"}) == ["transformer.wte", "transformer.wpe"]


def test_paths_suffixes_and_globs(llama: nn.Module) -> None:
    assert names(llama, "model.layers.3.mlp.up_proj") == ["model.layers.3.mlp.up_proj"]
    assert len(names(llama, "q_proj")) == len(names(llama, "self_attn.q_proj")) == 32
    assert len(names(llama, "*.mlp.*")) == len(names(llama, "*.mlp.*", kinds={"linear"})) == 96
    assert len(names(llama, "model.layers.1?.self_attn.[qk]_proj")) == 20
    assert len(names(llama, "layers.0.*")) == 9
    assert names(llama, "embed_tokens") == ["model.embed_tokens"]


def test_a_path_can_name_any_module(llama: nn.Module) -> None:
    (place,) = select(llama, "layers.3.mlp.act_fn")
    assert (place.kind, place.role, place.layer) == ("opaque", None, 3)
    (place,) = select(llama, "model.layers.3.mlp")
    assert (place.kind, place.role, place.features) == ("opaque", "ffn", 32)


def test_the_same_module_as_a_weight_or_as_a_sub_layer(llama: nn.Module) -> None:
    assert select(llama, "o@0")[0].kind == "linear"
    assert select(llama, "attn@0")[0].kind == "opaque"
    assert names(llama, "o@0") == names(llama, "attn@0") == names(llama, "o@0, attn@0")
    assert select(llama, "layers.0.self_attn.o_proj", kinds={"opaque"})[0].role == "attn"


def test_parts(gpt2: nn.Module) -> None:
    assert names(gpt2, "c_attn:q@0") == ["transformer.h.0.attn.c_attn:q"]
    assert names(gpt2, "*.c_attn:v@-1") == ["transformer.h.11.attn.c_attn:v"]
    assert names(gpt2, "qkv:k@0, q@0") == ["transformer.h.0.attn.c_attn:q", "transformer.h.0.attn.c_attn:k"]


@pytest.mark.parametrize(
    "term,expected",
    [
        ("q@8:", range(8, 32)),
        ("q@-4:", range(28, 32)),
        ("ffn@0:6", range(6)),
        ("block@-1", [31]),
        ("block@0", [0]),
        ("q@::2", range(0, 32, 2)),
        ("q@1:9:4", [1, 5]),
        ("q@:-30", [0, 1]),
        ("q@30:99", [30, 31]),
        ("q_proj@-2:", [30, 31]),
    ],
)
def test_ranges_mean_what_python_means(llama: nn.Module, term: str, expected: range | list[int]) -> None:
    assert at(llama, term) == list(expected)


def test_stacks_count_their_own_layers(t5: nn.Module) -> None:
    assert layers(t5) == 8
    assert stacks(t5) == {"encoder": 4, "decoder": 4}
    assert [(place.stack, place.layer) for place in select(t5, "q@-1")] == [("encoder", 3), ("decoder", 3)]
    assert len(names(t5, "encoder/q")) == len(names(t5, "decoder/q")) == 4
    assert names(t5, "encoder/norm") == names(t5, "encoder/*norm*")
    assert names(t5, "encoder/embed") == ["encoder.embed_tokens"]


def test_taking_away(llama: nn.Module, gpt2: nn.Module, t5: nn.Module) -> None:
    assert len(names(llama, "all-linear, !down")) == 32 * 6
    assert names(llama, "!down, all-linear") == names(llama, "all-linear, !down")
    assert at(llama, "q, !q@2:") == [0, 1]
    assert names(t5, "q, !encoder/q") == names(t5, "decoder/q")
    assert names(gpt2, "c_attn@0, !q") == ["transformer.h.0.attn.c_attn:k", "transformer.h.0.attn.c_attn:v"]
    assert names(gpt2, "q@0, o@0, !c_attn") == ["transformer.h.0.attn.c_proj"]
    assert len(names(gpt2, "all-linear, !v")) == 12 * 5


def test_a_part_beside_its_whole_is_in_it(gpt2: nn.Module) -> None:
    assert names(gpt2, "all-linear, q") == names(gpt2, "all-linear")


def test_a_fused_role_means_its_parts_where_nothing_is_fused(llama: nn.Module, gpt2: nn.Module) -> None:
    assert names(llama, "qkv") == names(llama, "q, k, v")
    assert names(llama, "gate_up") == names(llama, "gate, up")
    assert names(gpt2, "qkv") == names(gpt2, "c_attn")


def test_kinds_filter(llama: nn.Module) -> None:
    assert len(names(llama, "*.layers.0.*", kinds={"norm"})) == 2
    assert names(llama, "model.layers.0", kinds={"opaque"}) == ["model.layers.0"]
    with pytest.raises(ValueError, match="unknown kinds"):
        select(llama, "q", kinds={"linears"})


def test_every_role_and_kind_in_use_is_a_documented_one(llama: nn.Module, gpt2: nn.Module, t5: nn.Module) -> None:
    for model in (llama, gpt2, t5):
        for place in places(model):
            assert place.role in (None, *ROLES)
            assert place.kind in KINDS


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_typo_names_the_count_and_the_nearest(llama: nn.Module) -> None:
    assert complaint(llama, "q_prj").startswith('"q_prj" matched 0 of 225 linears; nearest: q_proj')
    assert "nearest: attn" in complaint(llama, "atn")
    assert "nearest: self_attn.q_proj" in complaint(llama, "*.self_attn.q_prj")
    assert complaint(llama, "xyzzy123") == '"xyzzy123" matched 0 of 225 linears'
    assert "of 1 embeddings" in complaint(llama, "embd_tokens", kinds={"embedding"})
    assert "of 225 linears and 65 norms" in complaint(llama, "q_prj", kinds={"linear", "norm"})


def test_all_problems_are_told_at_once(llama: nn.Module) -> None:
    told = complaint(llama, "q, q_prj, v@40, !head, x@, gate:q")
    assert [line[4:].split('"')[1] for line in told.splitlines()[1:]] == ["x@", "q_prj", "v@40", "gate:q"]


def test_a_layer_that_does_not_exist(llama: nn.Module, t5: nn.Module) -> None:
    assert complaint(llama, "q@32") == '"q@32": this model has 32 layers (0 to 31)'
    assert complaint(llama, "q@40:") == '"q@40:": this model has 32 layers (0 to 31)'
    assert complaint(llama, "q@-33") == '"q@-33": this model has 32 layers (0 to 31)'
    both = "the encoder has 4 layers (0 to 3) and the decoder has 4 layers (0 to 3)"
    assert complaint(t5, "q@4") == f'"q@4": {both}'
    assert complaint(t5, "decoder/q@4") == '"decoder/q@4": the decoder has 4 layers (0 to 3)'
    assert complaint(llama, "head@0") == '"head@0": lm_head is outside the blocks, so it has no layer'


@pytest.mark.parametrize("term", ["q@1:2:3:4", "q@::0", "q@--1", "q@1-2"])
def test_a_range_that_is_none(llama: nn.Module, term: str) -> None:
    assert f'"{term}": @{term[2:]} is not a range of layers' in complaint(llama, term)


def test_a_role_in_layers_that_do_not_have_it() -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.Qwen3MoeConfig(
        **size, num_hidden_layers=3, num_key_value_heads=2, head_dim=8, num_experts=4, mlp_only_layers=[1]
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    assert at(model, "gate") == [1]
    assert complaint(model, "gate@0") == '"gate@0": gate is only in layers 1'


def test_a_role_the_family_lacks(gpt2: nn.Module, t5: nn.Module) -> None:
    told = complaint(gpt2, "gate")
    assert told.startswith('"gate": gpt2 has no gate; its roles are q, k, v, o, qkv, up, down, attn, ffn, block, norm')
    assert complaint(t5, "qkv:q").endswith("has no parts")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1
    )
    with torch.device("meta"):
        mixtral = transformers.MixtralModel(config)
        neox = transformers.GPTNeoXModel(
            transformers.GPTNeoXConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1
            )
        )
    assert complaint(mixtral, "gate") == '"gate": mixtral has no gate; its experts have expert_gate'
    with torch.device("meta"):
        neox.layers[0].attention.query_key_value = nn.Linear(32, 104)  # no heads of 8 divide it into q, k and v
    assert "only the fused qkv, whose rows interleave its parts" in complaint(neox, "q")
    assert "interleave q, k, v" in complaint(neox, "query_key_value:q")


def test_a_part_that_does_not_exist(gpt2: nn.Module) -> None:
    assert complaint(gpt2, "c_attn:r") == '"c_attn:r": transformer.h.0.attn.c_attn has the parts q, k, v, no r'
    assert complaint(gpt2, "c_fc:q") == '"c_fc:q": transformer.h.0.mlp.c_fc has no parts'


def test_a_stack_that_does_not_exist(llama: nn.Module, t5: nn.Module) -> None:
    assert complaint(llama, "encoder/q") == '"encoder/q": this model is one stack, no encoder'
    assert complaint(t5, "vision/q") == '"vision/q": this model has the stacks decoder, encoder, no vision'
    assert complaint(t5, "encoder/cross.q") == '"encoder/cross.q": cross.q is not in the encoder'


def test_a_kind_the_method_does_not_support(llama: nn.Module) -> None:
    assert complaint(llama, "embed", kinds={"linear"}) == (
        '"embed" names only embeddings (model.embed_tokens), and the method sits on linears'
    )
    told = complaint(llama, "attn", kinds={"linear", "conv"})
    assert "names only opaque modules" in told
    assert "sits on linears and convolutions; the projections are q, k, v, o" in told
    assert "names only opaque modules" in complaint(llama, "layers.0.mlp.act_fn", kinds={"linear"})


def test_taking_away_nothing(llama: nn.Module) -> None:
    assert complaint(llama, "q, !v").startswith('"!v" takes nothing away: none of model.layers.0.self_attn.v_proj')
    assert '"!q_prj" matched 0 of 225 linears' in complaint(llama, "q, !q_prj")
    assert "nothing to take away from" in complaint(llama, "!q")
    assert "takes away all that it selects" in complaint(llama, "q, !q")


@pytest.mark.parametrize("where", ["", " , ,", []])
def test_nothing_at_all(llama: nn.Module, where: str | list[str]) -> None:
    assert complaint(llama, where) == "no term at all, nothing is selected"


@pytest.mark.parametrize("term", ["q q", "a/b/c", "!", "@3", "q@", "q:", "!!q"])
def test_what_is_not_a_term(llama: nn.Module, term: str) -> None:
    assert "is not a term" in complaint(llama, term)


def test_what_is_not_text(llama: nn.Module) -> None:
    assert "is not text" in complaint(llama, ["q", 3])  # type: ignore[list-item]


def test_no_layers_to_count() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert "no list of blocks was found" in complaint(model, "all-linear@0")


def test_all_linear_of_a_model_with_a_head_only() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "fc": nn.Linear(4, 2)})
    assert complaint(model, "all-linear") == '"all-linear" matched 0 of 1 linears: the output head is left out'


# ------------------------------------------------------------------------------------ modules that are not as usual


class Packed(nn.Module):
    """A quantized layer of another library: packed integers, and both feature counts."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 16, 8
        self.register_buffer("qweight", torch.zeros(2, 8, dtype=torch.int32))


class Conv1D(nn.Module):
    """What GPT-2's layer is made of, under its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.zeros(nx, nf))


def test_linear_like_modules_are_recognised_by_what_they_are_made_of() -> None:
    model = nn.ModuleDict({"a": Packed(), "b": Conv1D(8, 4), "c": nn.Linear(4, 4), "d": nn.Bilinear(4, 4, 4)})
    assert names(model, "all-linear") == ["a", "b", "c"]


def test_norms_are_modules_with_one_vector() -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(4), "b": nn.RMSNorm(4), "c": nn.GroupNorm(2, 4), "d": nn.BatchNorm1d(4)})
    model.update({"e": nn.LayerNorm(4, elementwise_affine=False), "f": nn.PReLU(4)})
    assert names(model, "norm") == ["a", "b", "c", "d"]


def test_a_weight_that_is_an_embeddings_is_no_ordinary_linear() -> None:
    model = nn.ModuleDict({"lookup": nn.Embedding(8, 4), "mix": nn.Linear(4, 4), "out": nn.Linear(4, 8, bias=False)})
    model["out"].weight = model["lookup"].weight
    assert names(model, "all-linear") == ["mix"]
    assert names(model, "all") == ["lookup", "mix"]
    assert names(model, "out") == ["out"]


def test_a_module_reached_by_two_paths_is_one_place() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "third": nn.Linear(4, 4)})
    assert names(model, "all-linear") == ["first", "third"]
    assert names(model, "second") == ["first"]


def test_blocks_that_are_one_module_several_times_are_one_layer() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"layers": nn.ModuleList([block, block])})
    assert layers(model) == 1
    assert names(model, "up@0") == ["layers.0.linear1"]


def test_selection_does_not_touch_the_model() -> None:
    model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    before = copy.deepcopy(model.state_dict())
    select(model, "all, attn, !norm")
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_parametrized_modules_are_as_before() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    before = sorted(place.name for place in places(model))
    torch.nn.utils.parametrize.register_parametrization(model.layers[0].linear1, "weight", nn.Identity())
    torch.nn.utils.parametrize.register_parametrization(model.layers[0].self_attn, "in_proj_weight", nn.Identity())
    assert sorted(place.name for place in places(model)) == before
    assert [place.rows for place in select(model, "q@0, v@0")] == [Rows(0, 8), Rows(16, 24)]


@pytest.mark.parametrize("where", ["q, v", "all-linear", "attn, ffn", "block", "norm", "embed"])
def test_attached_adapters_are_invisible(where: str) -> None:
    from trimtab.core.attach import attach
    from trimtab.methods.hidden.houlsby import Houlsby
    from trimtab.methods.weight.ln_tuning import LNTuning
    from trimtab.methods.weight.lora import LoRA

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    before = places(model)
    method = {"attn, ffn": Houlsby(), "block": Houlsby(), "norm": LNTuning()}.get(where, LoRA(rank=2))
    attach(model, method, where)
    assert places(model) == before
