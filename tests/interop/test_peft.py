"""What PEFT writes computes the same here, what is written here computes the same in PEFT, and bytes come round."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.conftest import logits, make

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.interop.peft.reading import from_peft
from trimtab.interop.peft.writing import to_peft, write_peft
from trimtab.interop.saved import open_saved, saved_of

peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file

SHAPES = {
    "llama": (
        "CAUSAL_LM",
        ["q_proj", "down_proj"],
        ["down_proj"],
        "input_layernorm",
        "embed_tokens",
        "lm_head",
        "embed_tokens",
    ),
    "tied": ("CAUSAL_LM", ["q_proj", "down_proj"], ["down_proj"], "norm", "embed_tokens", "lm_head", "embed_tokens"),
    "gpt2": ("CAUSAL_LM", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"], "ln_1", "wte", "ln_f", "wte"),
    "bert": (
        "SEQ_CLS",
        ["query", "intermediate.dense"],
        [],
        "LayerNorm",
        "word_embeddings",
        "pooler",
        "word_embeddings",
    ),
    "t5": ("SEQ_2_SEQ_LM", ["q", "wo"], ["wo"], "layer_norm", "encoder.embed_tokens", "lm_head", "shared"),
}
"""Task, modules with two sizes, those whose input IA3 scales, a norm, the embedding, a module to save, the embedding
whose weight others share."""

Made = Callable[[str], Any]


def at_linears(name: str, **settings: Any) -> Made:
    """A config at the linear modules of a shape."""

    def build(shape: str) -> Any:
        task, targets, *_ = SHAPES[shape]
        return getattr(peft, name)(target_modules=list(targets), task_type=task, **settings)

    return build


def of_task(name: str, **settings: Any) -> Made:
    """A config that names no modules."""
    return lambda shape: getattr(peft, name)(task_type=SHAPES[shape][0], **settings)


def named(name: str, key: str, which: int, **settings: Any) -> Made:
    """A config with one of the modules of a shape under a key of its own."""

    def build(shape: str) -> Any:
        row = SHAPES[shape]
        given = {"target_modules": list(row[1]), "task_type": row[0], **settings}
        if key == "trainable_token_indices":
            given[key] = {row[which]: [5, 2, 9]}
        elif key == "feedforward_modules":
            given[key] = list(row[which])
        else:
            given[key] = [row[which]]
        return getattr(peft, name)(**given)

    return build


def patterned(shape: str) -> Any:
    task, (first, second), *_ = SHAPES[shape]
    patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {second: 5}}
    return peft.LoraConfig(r=4, lora_alpha=12, target_modules=[first, second], task_type=task, **patterns)


CASES: dict[str, Made] = {
    "lora": at_linears("LoraConfig", r=4, lora_alpha=12),
    "rslora": at_linears("LoraConfig", r=4, lora_alpha=12, use_rslora=True),
    "dora": at_linears("LoraConfig", r=4, lora_alpha=12, use_dora=True),
    "lora patterns": patterned,
    "lora_bias": at_linears("LoraConfig", r=4, lora_alpha=8, lora_bias=True),
    "bias all": at_linears("LoraConfig", r=4, bias="all"),
    "bias lora_only": at_linears("LoraConfig", r=4, bias="lora_only"),
    "lora embedding": named("LoraConfig", "target_modules", 4, r=4),
    "dora embedding": named("LoraConfig", "target_modules", 4, r=4, use_dora=True),
    "modules_to_save": named("LoraConfig", "modules_to_save", 5, r=4),
    "trainable_token_indices": named("LoraConfig", "trainable_token_indices", -1, r=4),
    "trainable tokens": named("TrainableTokensConfig", "target_modules", -1, token_indices=[2, 5, 9]),
    "adalora": at_linears("AdaLoraConfig", init_r=6, target_r=4, total_step=10),
    "vera": at_linears("VeraConfig", r=4),
    "ia3": named("IA3Config", "feedforward_modules", 2),
    "loha": at_linears("LoHaConfig", r=4, alpha=6),
    "lokr": at_linears("LoKrConfig", r=2, alpha=6),
    "lokr of two factors": at_linears("LoKrConfig", r=1, alpha=3, decompose_both=True),
    "oft": at_linears("OFTConfig", r=0, oft_block_size=8),
    "oft exact": at_linears("OFTConfig", r=0, oft_block_size=8, use_cayley_neumann=False),
    "oft shared": at_linears("OFTConfig", r=0, oft_block_size=8, block_share=True),
    "boft": at_linears("BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=1),
    "hra": at_linears("HRAConfig", r=4),
    "fourier_ft": at_linears("FourierFTConfig", n_frequency=20, scaling=20.0),
    "randlora": at_linears("RandLoraConfig", r=8),
    "vb_lora": at_linears("VBLoRAConfig", r=2, num_vectors=6, vector_length=8),
    "vb_lora top k": at_linears("VBLoRAConfig", r=2, num_vectors=6, vector_length=8, save_only_topk_weights=True),
    "shira": at_linears("ShiraConfig", r=4),
    "c3a": at_linears("C3AConfig", block_size=8),
    "miss": at_linears("MissConfig", r=8),
    "bat": at_linears("MissConfig", r=8, init_weights="bat"),
    "miss mini": at_linears("MissConfig", r=8, mini_r=4, init_weights="mini"),
    "road": at_linears("RoadConfig", variant="road_1", group_size=8),
    "road 2": at_linears("RoadConfig", variant="road_2", group_size=8),
    "road 4": at_linears("RoadConfig", variant="road_4", group_size=8),
    "hira": at_linears("HiraConfig", r=4),
    "gralora": at_linears("GraloraConfig", r=4, gralora_k=2),
    "beft": at_linears("BeftConfig"),
    "ln_tuning": named("LNTuningConfig", "target_modules", 3),
    "prompt_tuning": of_task("PromptTuningConfig", num_virtual_tokens=5),
    "p_tuning": of_task("PromptEncoderConfig", num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix_tuning": of_task("PrefixTuningConfig", num_virtual_tokens=5),
    "prefix_tuning projected": of_task(
        "PrefixTuningConfig", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "llama_adapter": of_task("AdaptionPromptConfig", adapter_len=4, adapter_layers=1),
}
NOT_ON_CONV1D = (
    *("loha", "lokr", "lokr of two factors", "oft", "oft exact", "oft shared", "boft", "hra", "shira", "c3a", "miss"),
    *("bat", "miss mini", "road", "road 2", "road 4", "beft"),
)
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "prefix_tuning projected", "llama_adapter")
REFUSED = {
    **{("bert", name): "prompt tuning of Bert|prefix tuning of Bert" for name in PROMPTS[:4]},
    **{("t5", name): "prompt tuning of T5|prefix tuning of an encoder-decoder" for name in PROMPTS[:4]},
    ("gpt2", "llama_adapter"): "behind the output projection",
}
"""Where the two libraries compute different things: refused, with the reason."""
NOT_THERE = {(shape, "llama_adapter") for shape in ("bert", "t5")} | {("gpt2", name) for name in NOT_ON_CONV1D}
"""Where PEFT has nothing."""
ROUNDED = {"prefix_tuning", "prefix_tuning projected", "randlora", "vb_lora top k", "lora embedding", "dora embedding"}
ROUNDED |= {"trainable_token_indices", "lokr of two factors", "oft shared", "bias all", "trainable tokens"}
"""What comes back equal but not in the same bytes: repeated tensors are left out, rows sorted, keys turned back."""
ALL = [(shape, name) for shape in SHAPES for name in CASES if (shape, name) not in NOT_THERE]
TIED = ("lora", "lora embedding", "modules_to_save", "trainable_token_indices", "trainable tokens")
SHAPED = [one for one in ALL if one not in REFUSED and (one[0] != "tied" or one[1] in TIED)]
CORE = ("lora", "dora", "modules_to_save", "trainable_token_indices", "ia3", "randlora", "ln_tuning", "bias all")
"""Cases that every run of the tests has on all shapes; the others on BERT and T5 are among the slow ones."""


def randomized(model: Any) -> Any:
    """Every trained tensor moved away from its start."""
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=drawn))
    return model


def theirs(shape: str, name: str, directory: Path) -> torch.Tensor:
    """Write a random adapter of PEFT; the logits it gives there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomized(peft.get_peft_model(make(shape), CASES[name](shape)).eval())
        model.save_pretrained(directory)
        return logits(model)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        pytest.param(shape, name, marks=[pytest.mark.slow] if shape in ("bert", "t5") and name not in CORE else [])
        for shape, name in SHAPED
    ],
    ids=lambda value: value.replace(" ", "_"),
)
def test_peft_here_and_ours_in_peft_give_the_same_logits(shape: str, name: str, tmp_path: Path) -> None:
    wanted = theirs(shape, name, tmp_path / "theirs")
    model = make(shape)
    before = logits(model)
    tt.load(model, tmp_path / "theirs")
    assert (logits(model) - wanted).abs().max() < 1e-5
    if (shape, name) not in {("bert", "trainable tokens"), ("llama", "trainable tokens")}:  # ids that may not occur
        assert (wanted - before).abs().max() > 1e-4, "the adapter changes nothing, so this proves nothing"
    ours = saved_of(model)
    write_peft(make(shape), ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(make(shape), tmp_path / "ours").eval()
        assert (logits(there) - wanted).abs().max() < 1e-5
    first, second = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours"))
    if name not in ROUNDED:
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first)
    again = from_peft(make(shape), tmp_path / "ours")
    if name.startswith("prefix"):  # keys are turned by their positions and back
        assert all(torch.allclose(again.tensors[key], ours.tensors[key], atol=1e-6) for key in ours.tensors)
    else:
        assert again.tensors.keys() == ours.tensors.keys()
        assert all(torch.equal(again.tensors[key], ours.tensors[key]) for key in ours.tensors)
        write_peft(make(shape), again, tmp_path / "again")
        assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "ours" / "adapter_model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(("shape", "name"), REFUSED, ids=lambda value: value.replace(" ", "_"))
def test_what_the_two_compute_differently_is_refused(shape: str, name: str, tmp_path: Path) -> None:
    theirs(shape, name, tmp_path)
    with pytest.raises(UserError, match=REFUSED[shape, name]):
        tt.load(make(shape), tmp_path)


OURS: dict[str, tuple[Any, str]] = {
    "lora of fused parts": (tt.LoRA(rank=3), "q, v"),
    "lora of several ranks": (tt.LoRA(rank=3, ranks="o=2", alphas="o=5"), "q, o, down"),
    "pissa": (tt.LoRA(rank=3, start=tt.PiSSA()), "o, down"),
    "p_tuning of ours": (tt.PTuning(length=4, hidden=8), "embed"),
    "prefix of ours": (tt.PrefixTuning(length=4, hidden=8), "k, v"),
    "ln_tuning of ours": (tt.LNTuning(), "norm"),
    "fourier of ours": (tt.FourierFT(coefficients=12, alpha=20.0), "o"),
    "lokr of ours": (tt.LoKr(rank=2), "head"),
    "dora of ours": (tt.DoRA(rank=3), "o, down"),
    "shira of ours": (tt.SHiRA(rank=2, mask="magnitude"), "head"),
}


@pytest.mark.parametrize("shape", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("name", OURS)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(name: str, shape: str, tmp_path: Path) -> None:
    model = make(shape)
    method, where = OURS[name]
    tt.attach(model, method, where)
    randomized(model)
    wanted = logits(model)
    write_peft(make(shape), saved_of(model), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(make(shape), tmp_path).eval()
        assert (logits(there) - wanted).abs().max() < 1e-5
    back = make(shape)
    tt.load(back, tmp_path)
    assert (logits(back) - wanted).abs().max() < 1e-5


UNKNOWN = {
    "houlsby": (tt.Houlsby(bottleneck=4), "ffn", "PEFT has no such method"),
    "ia3 of a part": (tt.IA3(), "k", "does not divide a fused weight"),
    "two types": ([tt.LoRA(rank=2).at("o"), tt.IA3().at("down")], None, "one PEFT adapter is of one type"),
    "rows of a tied embedding": (tt.EmbeddingRows(tokens="3, 4"), "embed", "which shares them"),
    "boft on conv1d": (tt.C3A(block_size=8), "o", "PEFT has no C3A for GPT-2's Conv1D"),
    "full alone": (tt.Full(), "head", "beside another method only"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_peft_cannot_represent_is_refused_with_the_reason(name: str) -> None:
    model = make("gpt2")
    method, where, reason = UNKNOWN[name]
    tt.attach(model, method, where)
    with pytest.raises(UserError, match=reason):
        to_peft(make("gpt2"), saved_of(model))


def test_every_mismatch_is_listed_and_nothing_is_attached(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs("llama", "lora", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = [key for key in tensors if "layers.0" in key and key.endswith("lora_A.weight")]
    for key in gone:
        del tensors[key]
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_C"] = torch.zeros(2)
    save_file(tensors, path)
    model = make("llama")
    before = logits(model)
    with pytest.raises(UserError, match="4 problems") as caught:
        tt.load(model, tmp_path)
    assert "layers.7" in str(caught.value)
    assert "nearest" in str(caught.value)
    assert "lora_C" in str(caught.value)
    assert all(key in str(caught.value) for key in gone)
    assert torch.equal(logits(model), before)
    assert not any("delta" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_lora_weights", "pissa"), ("use_qalora", True), ("alora_invocation_tokens", [1]), ("peft_type", "XLORA")],
)
def test_options_that_mean_another_computation_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    import json

    theirs("llama", "lora", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=str(value) if key == "peft_type" else key):
        tt.load(make("llama"), tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    theirs("llama", "lora", tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        tt.load(make("llama"), tmp_path)


def test_a_foreign_adapter_saves_and_loads_as_one_of_ours(tmp_path: Path) -> None:
    wanted = theirs("llama", "randlora", tmp_path / "theirs")
    model = make("llama")
    tt.load(model, tmp_path / "theirs", name="sql", trainable=False)
    assert not any(value.requires_grad for value in model.parameters())
    tt.save(model, tmp_path / "ours", "sql")
    assert open_saved(tmp_path / "ours").record["name"] == "sql"
    again = make("llama")
    tt.load(again, tmp_path / "ours")
    assert (logits(again) - wanted).abs().max() < 1e-5


def experts() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 60, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64}
    return MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.1)).eval()


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
def test_stacked_experts_go_both_ways(parameters: list[str], tmp_path: Path) -> None:
    targets = [f"mlp.experts.{name}" for name in parameters]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = randomized(peft.get_peft_model(experts(), config).eval())
        there.save_pretrained(tmp_path / "theirs")
        wanted = logits(there)
        model = experts()
        tt.load(model, tmp_path / "theirs")
        assert (logits(model) - wanted).abs().max() < 1e-5
        write_peft(experts(), saved_of(model), tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(experts(), tmp_path / "ours").eval()
    assert (logits(again) - wanted).abs().max() < 1e-5
    first, second = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours"))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_parts_of_experts_go_to_peft_as_wholes(tmp_path: Path) -> None:
    model = experts()
    tt.attach(model, tt.LoRA(rank=2), "expert_gate, expert_down")
    randomized(model)
    write_peft(experts(), saved_of(model), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(experts(), tmp_path).eval()
    assert (logits(there) - logits(model)).abs().max() < 1e-5


class Net(torch.nn.Module):
    """Convolutions, an embedding and torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.c2 = torch.nn.Embedding(20, 6), torch.nn.Conv2d(6, 12, 3, padding=1)
        self.c1, self.lin = torch.nn.Conv1d(12, 8, 3, padding=1), torch.nn.Linear(8, 5)
        self.mha = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.c1(self.c2(self.emb(ids).movedim(-1, 1)).flatten(2)).mT
        return self.lin(self.mha(x, x, x)[0])


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_and_embeddings_go_both_ways(dora: bool, tmp_path: Path) -> None:
    ids = torch.arange(20)[None].repeat(2, 1).view(2, 4, 5)
    config = peft.LoraConfig(r=2, use_dora=dora, target_modules=["c2", "c1", "lin", "emb"])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        there = randomized(peft.get_peft_model(Net().eval(), config).eval())
        there.save_pretrained(tmp_path / "theirs")
        wanted, model = there(ids), Net().eval()
        tt.load(model, tmp_path / "theirs")
        assert (model(ids) - wanted).abs().max() < 1e-5
        assert (Net().eval()(ids) - wanted).abs().max() > 1e-3
        write_peft(Net(), saved_of(model), tmp_path / "ours")
        assert (peft.PeftModel.from_pretrained(Net().eval(), tmp_path / "ours").eval()(ids) - wanted).abs().max() < 1e-5


def test_torchs_attention_is_refused_where_peft_counts_its_output_twice(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.get_peft_model(Net().eval(), peft.LoraConfig(r=2, target_modules=["mha"]))
        there.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="twice"):
        tt.load(Net(), tmp_path)
    model = Net()
    tt.attach(model, tt.LoRA(rank=2), "mha.in_proj_weight")
    with pytest.raises(UserError, match="twice"):
        to_peft(Net(), saved_of(model))


def test_the_docs_name_every_type_that_is_read(repository: Path) -> None:
    from trimtab.interop.peft.table import known_types

    page = (repository / "docs" / "interop.md").read_text(encoding="utf-8")
    assert [kind for kind in known_types() if kind not in page] == []


def test_several_adapters_of_peft_go_on_one_model_and_off_again(tmp_path: Path) -> None:
    names = ["lora", "dora", "ln_tuning", "lora embedding", "vera"]
    wanted = {name: theirs("llama", name, tmp_path / name) for name in names}
    model = make("llama")
    before = logits(model)
    for name in names:
        tt.load(model, tmp_path / name, name=name.replace(" ", "_"))
    for name in names:
        tt.activate(model, name.replace(" ", "_"))
        assert (logits(model) - wanted[name]).abs().max() < 1e-5
        write_peft(model, saved_of(model, name.replace(" ", "_")), tmp_path / f"{name} again")
        assert (
            from_peft(make("llama"), tmp_path / f"{name} again").tensors.keys()
            == from_peft(make("llama"), tmp_path / name).tensors.keys()
        )
    tt.detach(model)
    assert torch.equal(logits(model), before)


def test_pruned_ranks_of_adalora_come_back_as_zeros(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = randomized(peft.get_peft_model(make("llama"), CASES["adalora"]("llama")).eval())
        pattern = {}
        for index, (name, value) in enumerate([one for one in there.named_parameters() if "lora_E" in one[0]]):
            keep = [rank % 2 == 0 or rank < index for rank in range(6)]
            with torch.no_grad():
                value[~torch.tensor(keep)] = 0
            pattern[name.removeprefix("base_model.model.")] = keep
        there.peft_config["default"].rank_pattern = pattern
        wanted = logits(there)
        there.save_pretrained(tmp_path)
    assert any(
        len(value) < 6 for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "_A" in key
    )
    model = make("llama")
    tt.load(model, tmp_path)
    assert (logits(model) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["randlora", "vera", "vb_lora", "lora embedding", "trainable_token_indices"])
def test_no_tensor_stands_in_a_file_twice(name: str, tmp_path: Path) -> None:
    theirs("tied", name, tmp_path)
    model = make("tied")
    tt.load(model, tmp_path)
    _, tensors = to_peft(make("tied"), saved_of(model))
    large = [value.contiguous().view(torch.uint8).numpy().tobytes() for value in tensors.values() if value.numel() > 8]
    assert len(large) == len(set(large))
    assert not any(key.endswith("base_layer.weight") for key in tensors)
