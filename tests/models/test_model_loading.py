"""Loading: what comes back, what is said before weights are read, and what transformers would only have warned of."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.core.errors import UserError
from trimtab.models import devices, fingerprints, loading, sources, tokenizers
from trimtab.models.files import check_directory
from trimtab.models.fingerprints import fingerprint
from trimtab.models.loading import Loaded, load

Make = Callable[..., Path]


def refusal(*parts: str, call: Callable[[], Any]) -> str:
    """The text of the UserError that `call` raises; holds every one of `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    return text


@pytest.fixture(autouse=True)
def a_plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtype auto means float32, whatever this machine's CPU is fast at."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)


def edit_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    for key, value in fields.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def state(loaded: Loaded) -> dict[str, torch.Tensor]:
    return dict(loaded.model.state_dict())


# ---------------------------------------------------------------------------------------------- what comes back


def test_causal_model_from_a_directory(model_directory: Make) -> None:
    directory = model_directory("LlamaForCausalLM")
    loaded = load(str(directory), dtype="float32", device="cpu")
    assert (loaded.model_class, loaded.task, loaded.source) == ("LlamaForCausalLM", "causal", str(directory))
    assert (loaded.directory, loaded.dtype, loaded.device) == (directory, torch.float32, torch.device("cpu"))
    assert (loaded.max_length, loaded.new_modules, loaded.notes) == (48, (), ())
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    saved = load_file(directory / "model.safetensors")
    assert saved
    assert all(torch.equal(state(loaded)[key], value) for key, value in saved.items())
    assert loaded.tokenizer("the capital of France").input_ids == [5, 7, 8, 9]


def test_a_path_object_is_a_directory(model_directory: Make) -> None:
    assert load(model_directory("GPT2LMHeadModel"), device="cpu").model_class == "GPT2LMHeadModel"


def test_sharded_weights(model_directory: Make) -> None:
    directory = model_directory("LlamaForCausalLM", max_shard_size="8KB")
    assert (directory / "model.safetensors.index.json").exists()
    assert load(directory, device="cpu").notes == ()


def test_seq2seq(model_directory: Make) -> None:
    loaded = load(model_directory("T5ForConditionalGeneration"), task="seq2seq", device="cpu")
    assert loaded.model_class == "T5ForConditionalGeneration"
    assert loaded.max_length == 64


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype(model_directory: Make, name: str) -> None:
    loaded = load(model_directory("LlamaForCausalLM"), dtype=name, device="cpu")
    assert loaded.dtype == getattr(torch, name)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {loaded.dtype}


def test_what_a_model_makes_in_float32_unasked_follows_the_dtype(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = transformers.DebertaModel(transformers.DebertaConfig(vocab_size=30, **sizes))
    made.save_pretrained(tmp_path)
    read = transformers.DebertaModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert read.encoder.layer[0].attention.self.q_bias.dtype == torch.float32
    devices.level(read, torch.bfloat16)
    assert {one.dtype for one in read.parameters()} == {torch.bfloat16}
    read(input_ids=torch.arange(3, 9)[None])
    keeps = transformers.T5EncoderModel(transformers.T5Config(d_model=16, d_ff=24, d_kv=4, num_heads=2, num_layers=1))
    devices.level(keeps, torch.float16)
    kept = {name for name, one in keeps.named_parameters() if one.dtype == torch.float32}
    assert kept == {"encoder.block.0.layer.1.DenseReluDense.wo.weight"}


@pytest.mark.parametrize("probe", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_dtype_auto_on_a_cpu(model_directory: Make, monkeypatch: pytest.MonkeyPatch, probe: str | None) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda fast=name == probe: fast, raising=False)
    loaded = load(model_directory("LlamaForCausalLM"), device="cpu")
    assert loaded.dtype == (torch.bfloat16 if probe else torch.float32)
    assert any("dtype auto: bfloat16" in note for note in loaded.notes) == bool(probe)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_dtype_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kind, note = devices.auto_dtype(torch.device("cuda"))
    assert kind == (torch.bfloat16 if capability >= (8, 0) else torch.float32)
    assert (note is None) == (kind == torch.float32)


def test_max_length_leaves_out_positions_a_family_reserves(model_directory: Make) -> None:
    loaded = load(model_directory("RobertaForMaskedLM"), task="regress", device="cpu")
    assert loaded.max_length == 40


def test_loading_is_quiet_and_restores_what_was_set(
    model_directory: Make, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    directory = model_directory("BertModel")
    transformers.logging.set_verbosity_info()
    transformers.logging.enable_progress_bar()
    capfd.readouterr()
    try:
        load(directory, task="classify", labels=["no", "yes"], device="cpu")
        assert capfd.readouterr() == ("", "")
        (directory / "tokenizer.json").write_text("{}")
        refusal("tokenizer", call=lambda: load(directory, task="classify", labels=["no", "yes"], device="cpu"))
        assert transformers.logging.get_verbosity() == logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
        transformers.logging.disable_progress_bar()
        with loading.quiet_transformers():
            pass
        assert not transformers.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------- heads and labels


def classify(directory: Path, **settings: Any) -> Loaded:
    return load(directory, task="classify", **{"device": "cpu", "dtype": "float32", **settings})


@pytest.mark.parametrize(
    "architecture", ["BertModel", "RobertaModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_a_new_head_depends_on_its_seed_alone(model_directory: Make, architecture: str) -> None:
    directory = model_directory(architecture)
    first = classify(directory, labels=["no", "yes", "maybe"], head_seed=3)
    torch.randn(7)
    before = torch.get_rng_state()
    second = classify(directory, labels=["no", "yes", "maybe"], head_seed=3)
    assert torch.equal(before, torch.get_rng_state())
    other = classify(directory, labels=["no", "yes", "maybe"], head_seed=4)
    assert first.new_modules
    assert any("newly initialized from head seed 3" in note for note in first.notes)
    differs = [key for key in state(first) if not torch.equal(state(first)[key], state(other)[key])]
    assert all(torch.equal(state(first)[key], state(second)[key]) for key in state(first))
    assert differs
    assert all(key.startswith(first.new_modules) for key in differs)
    config = first.model.config
    assert (config.num_labels, config.id2label, config.problem_type) == (
        3,
        {0: "no", 1: "yes", 2: "maybe"},
        "single_label_classification",
    )
    assert config.label2id == {"no": 0, "yes": 1, "maybe": 2}


def test_a_pooler_that_the_checkpoint_lacks_is_part_of_the_head(model_directory: Make) -> None:
    loaded = classify(model_directory("BertForMaskedLM"), labels=["no", "yes"])
    assert loaded.new_modules == ("bert.pooler.dense", "classifier")
    assert any("not used: cls.predictions" in note for note in loaded.notes)


def test_regress_has_one_output(model_directory: Make) -> None:
    loaded = load(model_directory("BertModel"), task="regress", device="cpu")
    assert loaded.model.config.num_labels == 1
    assert loaded.model.config.problem_type == "regression"
    assert loaded.model(**loaded.tokenizer("a good film", return_tensors="pt")).logits.shape == (1, 1)


def test_classify_without_labels_needs_a_head_of_its_own(model_directory: Make) -> None:
    directory = model_directory("BertModel")
    refusal("needs labels", "labels=[", call=lambda: classify(directory))


OWN = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


def test_the_checkpoints_own_head_is_kept(model_directory: Make) -> None:
    directory = model_directory("BertForSequenceClassification", **OWN)
    loaded = classify(directory)
    assert loaded.new_modules == ()
    assert loaded.model.config.id2label == {0: "bad", 1: "good"}
    assert loaded.notes == ("labels of the checkpoint: bad, good",)
    assert classify(directory, labels=["bad", "good"]).notes == ()


def test_labels_in_another_order_are_refused(model_directory: Make) -> None:
    directory = model_directory("BertForSequenceClassification", **OWN)
    refusal("another order", 'labels=["bad", "good"]', call=lambda: classify(directory, labels=["good", "bad"]))


def test_renamed_labels_are_noted(model_directory: Make) -> None:
    loaded = classify(model_directory("BertForSequenceClassification", **OWN), labels=["no", "good"])
    assert loaded.notes == ("the checkpoint's own head is kept and its labels renamed: bad -> no",)
    assert loaded.model.config.id2label == {0: "no", 1: "good"}


def test_unnamed_labels_of_a_head_are_simply_named(model_directory: Make) -> None:
    loaded = classify(model_directory("BertForSequenceClassification"), labels=["no", "yes"])
    assert (loaded.notes, loaded.new_modules) == ((), ())


def test_a_head_of_another_size_is_replaced_and_noted(model_directory: Make) -> None:
    directory = model_directory("BertForSequenceClassification", **OWN)
    loaded = classify(directory, labels=["a", "b", "c"])
    assert loaded.new_modules == ("classifier",)
    assert "the checkpoint's own head is for 2 labels (bad, good); it is replaced by 3" in loaded.notes
    regress = load(directory, task="regress", device="cpu")
    assert "the checkpoint's own head has 2 outputs; it is replaced by one output" in regress.notes
    assert regress.new_modules == ("classifier",)


# ------------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"task": "clasify"}, ["unknown task 'clasify'", "did you mean classify?"]),
        ({"dtype": "bf16"}, ["unknown dtype 'bf16'", "float32, bfloat16, float16"]),
        ({"labels": ["a", "b"]}, ["labels do not apply to task causal"]),
        ({"task": "classify", "labels": "ab"}, ["labels must be a list of strings"]),
        ({"task": "classify", "labels": [0, 1]}, ["labels must be a list of strings"]),
        ({"task": "classify", "labels": ["a"]}, ["two labels or more, found 1", "task regress"]),
        ({"task": "classify", "labels": ["a", "b", "a"]}, ["labels occur twice: a"]),
        ({"task": "clasify", "dtype": "int8"}, ["2 problems", "unknown task", "unknown dtype"]),
        ({"device": "nonsense"}, ["device 'nonsense' cannot be used"]),
        ({"device": "meta"}, ["device 'meta' cannot be used", "holds no weights"]),
    ],
)
def test_wrong_requests(settings: dict[str, Any], parts: list[str]) -> None:
    refusal(*parts, call=lambda: load("minilm-l6", **settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that is asked for")
def test_a_device_that_is_not_there() -> None:
    refusal("device 'cuda:7' cannot be used", call=lambda: load("minilm-l6", device="cuda:7"))


@pytest.mark.parametrize("source", ["./nowhere", "~/no/where/at/all", "a/b/c", Path("nowhere")])
def test_a_directory_that_is_not_there(source: str | Path) -> None:
    refusal("does not exist", "minilm-l6", call=lambda: load(source))


@pytest.mark.parametrize("source", ["", "two words", "-x/y"])
def test_a_source_of_no_known_form(source: str) -> None:
    refusal("neither a directory, nor a starter, nor in the form of a hub id", call=lambda: load(source))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.bin").write_bytes(b"")
    refusal("m.gguf", "could not load its configuration", call=lambda: load(tmp_path / "m.gguf"))
    refusal("is a file; a model is a directory, or a GGUF file", call=lambda: load(str(tmp_path / "m.bin")))


def test_a_hub_id_in_offline_mode_names_the_starters() -> None:
    refusal("offline mode is on", "smollm2-135m-instruct, minilm-l6, mpnet-base", call=lambda: load("some/model"))
    refusal("did you mean minilm-l6?", call=lambda: load("minilm-l12"))


def test_a_hub_that_fails_is_one_message() -> None:
    import huggingface_hub.constants

    was = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    try:
        error = sources.no_hub("some/model", OSError("We couldn't connect\nmore lines"))
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = was
    assert "did not give it: We couldn't connect\n  fix:" in str(error)


@pytest.mark.slow
def test_a_hub_id_with_a_local_copy(model_directory: Make, tmp_path: Path, source_environment: dict[str, str]) -> None:
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.move(model_directory("LlamaForCausalLM"), repository / "snapshots" / revision)
    script = (
        "from trimtab.models.fingerprints import fingerprint\nfrom trimtab.models.loading import load\n"
        "loaded = load('some/model', device='cpu', dtype='float32')\n"
        "print(loaded.directory.name, loaded.notes, len(fingerprint(loaded)))\n"
    )
    environment = {**source_environment, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [revision, "()", "64"], result.stderr


# ------------------------------------------------------------------------------------------- damaged directories


@pytest.fixture
def llama(model_directory: Make) -> Path:
    return model_directory("LlamaForCausalLM")


def test_no_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    refusal("there is no config.json", "save_pretrained", call=lambda: load(llama))


@pytest.mark.parametrize(
    "content, part", [("{", "cannot be read as JSON"), ("[]", "has no model_type"), ("{}", "has no model_type")]
)
def test_a_broken_config(llama: Path, content: str, part: str) -> None:
    (llama / "config.json").write_text(content)
    refusal(f"config.json {part}", call=lambda: load(llama))


def test_a_config_that_transformers_refuses(llama: Path) -> None:
    edit_json(llama / "config.json", hidden_size="wide")
    refusal("could not load its configuration", call=lambda: load(llama))


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "other.safetensors")
    refusal("there is no model.safetensors (found other.safetensors)", call=lambda: load(llama))


def test_missing_shards(model_directory: Make) -> None:
    directory = model_directory("LlamaForCausalLM", max_shard_size="8KB")
    victim = sorted(directory.glob("model-*.safetensors"))[1]
    victim.unlink()
    refusal("weight files named in model.safetensors.index.json are missing", victim.name, call=lambda: load(directory))


@pytest.mark.parametrize(
    "index, part",
    [
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "names files outside the directory"),
    ],
)
def test_a_broken_index(llama: Path, index: str, part: str) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(index)
    refusal(f"model.safetensors.index.json {part}", call=lambda: load(llama))


def test_a_pickle_is_refused_with_the_command_that_converts_it(llama: Path, model_directory: Make) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refusal(
        "its weights are a pickle (pytorch_model.bin)",
        "AutoModelForCausalLM as M",
        f"M.from_pretrained({str(llama)!r}, use_safetensors=False).save_pretrained",
        call=lambda: load(llama),
    )
    refusal("AutoModelForSeq2SeqLM as M", call=lambda: check_directory(llama, task="seq2seq"))


def test_gguf_weights(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "m.Q4_1.gguf")
    refusal("its weights are GGUF (m.Q4_1.gguf)", f"--model {llama / 'm.Q4_1.gguf'}", call=lambda: load(llama))


@pytest.mark.parametrize(
    "content, part",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
        (b"\x10\x00", "is cut off or not a safetensors file"),
        (b"\xff" * 64, "is cut off or not a safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "is not a safetensors file"),
    ],
)
def test_a_weights_file_that_is_none(llama: Path, content: bytes, part: str) -> None:
    (llama / "model.safetensors").write_bytes(content)
    refusal(f"model.safetensors {part}", "git lfs pull", call=lambda: load(llama))


def test_weights_cut_off(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refusal("cut off or damaged", call=lambda: load(llama))


def test_no_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    refusal("there are no tokenizer files", "tokenizer.save_pretrained", call=lambda: load(llama))


def test_a_tokenizer_that_needs_no_files(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    check_directory(llama)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    refusal(
        "3 problems",
        "there is no config.json",
        "there is no model.safetensors",
        "there are no tokenizer files",
        call=lambda: load(tmp_path),
    )


def test_a_directory_that_hides_a_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "minilm-l6").mkdir()
    monkeypatch.chdir(tmp_path)
    refusal("hides the starter minilm-l6", call=lambda: load("minilm-l6"))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refusal("this is an adapter", "load its base model", call=lambda: load(tmp_path))
    refusal("does not exist", call=lambda: check_directory(tmp_path / "nothing"))


# ----------------------------------------------------------------------- architectures, weights that do not fit


def test_code_that_comes_with_a_model_is_not_run(llama: Path) -> None:
    edit_json(llama / "config.json", model_type="own", auto_map={"AutoConfig": "evil.Config"})
    (llama / "evil.py").write_text("raise SystemExit('was run')")
    refusal("needs Python code that comes with the model", call=lambda: load(llama))


def test_an_unknown_architecture(llama: Path) -> None:
    edit_json(llama / "config.json", model_type="nonesuch")
    refusal("could not load its configuration", "nonesuch", call=lambda: load(llama))


def test_a_task_the_architecture_cannot_do(model_directory: Make, llama: Path) -> None:
    encoder_decoder = model_directory("T5ForConditionalGeneration", name="t5")
    refusal("a t5 model", "cannot do task causal", "use task seq2seq", call=lambda: load(encoder_decoder))
    refusal("a llama model", "use task causal or classify or regress", call=lambda: load(llama, task="seq2seq"))


def test_an_encoder_is_not_taken_for_a_causal_model(model_directory: Make) -> None:
    for architecture in ("BertModel", "BertForMaskedLM"):
        directory = model_directory(architecture, name=architecture)
        refusal("both directions", "use task classify or regress", call=lambda d=directory: load(d))
    causal = model_directory("BertLMHeadModel", name="causal", is_decoder=True)
    assert load(causal, device="cpu").model_class == "BertLMHeadModel"


def test_missing_weights_are_an_error_that_lists_them(llama: Path) -> None:
    edit_weights(llama, lambda weights: [weights.pop(f"model.layers.{i}.self_attn.q_proj.weight") for i in (0, 1)])  # type: ignore[arg-type, return-value]
    for task in ("causal", "regress"):
        refusal(
            "lack 2 of the model's tensors",
            "model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight",
            call=lambda task=task: load(llama, task=task),
        )


def test_a_head_for_generation_is_never_made_up(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.pop("lm_head.weight"))  # type: ignore[arg-type, return-value]
    refusal("lack 1 of the model's tensors: lm_head.weight", call=lambda: load(llama))


def test_weights_under_other_names_are_an_error(llama: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for key in list(weights):
            weights[f"wrapped.{key}"] = weights.pop(key)

    edit_weights(llama, rename)
    refusal("tensors of the file fit nowhere: wrapped.", call=lambda: load(llama))


def test_weights_of_another_shape_are_an_error(llama: Path) -> None:
    edit_json(llama / "config.json", intermediate_size=64)
    refusal(
        "6 tensors have another shape",
        "model.layers.0.mlp.down_proj.weight is (16, 32), config.json wants (16, 64)",
        call=lambda: load(llama),
    )


def test_unused_weights_are_noted(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    assert load(llama, device="cpu").notes == ("1 tensors of the checkpoint are not used: extra.weight",)


def test_weights_that_transformers_refuses(llama: Path) -> None:
    edit_json(llama / "config.json", num_attention_heads=3, head_dim=None)
    refusal("could not load its", call=lambda: load(llama))


# ------------------------------------------------------------------------------------------------------- padding


def test_a_free_padding_token_of_the_vocabulary_is_used(model_directory: Make) -> None:
    loaded = load(model_directory("GPT2LMHeadModel", tokenizer={"eos_token": "</s>"}, pad_token_id=None), device="cpu")
    assert loaded.tokenizer.pad_token == "<pad>"
    assert loaded.model.config.pad_token_id == loaded.model.generation_config.pad_token_id == 1
    assert loaded.notes == ("the tokenizer has no usable padding token; <pad> is used",)


@pytest.mark.parametrize("special", [{"eos_token": "</s>", "unk_token": "<unk>"}, {"eos_token": "</s>"}])
def test_the_unknown_token_then_the_end_token_pad(
    model_directory: Make, special: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "_PADDING_NAMES", ())
    loaded = load(model_directory("LlamaForCausalLM", tokenizer=special), device="cpu")
    assert loaded.tokenizer.pad_token == special.get("unk_token", "</s>")
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    assert any("also ends a text" in note for note in loaded.notes) == ("unk_token" not in special)
    assert any("padding token id 1 of the model is replaced" in note for note in loaded.notes)


def test_no_token_to_pad_with(model_directory: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_PADDING_NAMES", ())
    directory = model_directory("LlamaForCausalLM", tokenizer={"bos_token": "<s>"})
    refusal("no padding token", "tokenizer_config.json", call=lambda: load(directory))


def test_a_padding_token_the_model_does_not_embed(model_directory: Make) -> None:
    directory = model_directory("LlamaForCausalLM", tokenizer={"pad_token": "<new>", "eos_token": "</s>"})
    loaded = load(directory, device="cpu")
    assert loaded.tokenizer.pad_token == "<pad>"
    assert any("the model embeds 21: the last cannot be used" in note for note in loaded.notes)


# -------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_binds_to_the_weights_and_what_they_compute(llama: Path, tmp_path: Path) -> None:
    original = fingerprint(llama)
    assert len(original) == 64
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    assert fingerprint(str(copy)) == original == fingerprint(load(llama, device="cpu"))
    edit_json(copy / "config.json", pad_token_id=0, transformers_version="4.0", id2label={"0": "x"}, use_cache=False)
    assert fingerprint(copy) == original
    edit_json(copy / "config.json", rms_norm_eps=0.5)
    assert fingerprint(copy) != original
    shutil.copy(llama / "config.json", copy / "config.json")
    edit_weights(copy, lambda weights: weights["model.norm.weight"].__setitem__(0, 2.0))
    assert fingerprint(copy) != original


def test_the_fingerprint_of_big_weights_samples_every_tensor(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fingerprint(llama)
    monkeypatch.setattr(fingerprints, "FULL_HASH_BYTES", 0)
    monkeypatch.setattr(fingerprints, "SAMPLE_BYTES", 64)
    sampled = fingerprint(llama)
    assert sampled not in (whole, "")

    def after(change: Callable[[torch.Tensor], None]) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(llama, copy, dirs_exist_ok=True)
        edit_weights(copy, lambda weights: change(weights["model.embed_tokens.weight"]))
        return fingerprint(copy)

    assert after(lambda weight: weight[0, 0].fill_(9)) != sampled
    assert after(lambda weight: weight[-1, -1].fill_(9)) != sampled
    assert after(lambda weight: weight[10, 5].fill_(9)) == sampled, "documented: the middle of a big tensor goes unseen"


def test_the_fingerprint_of_a_module(llama: Path) -> None:
    first, second = load(llama, device="cpu").model, load(llama, device="cpu").model
    assert fingerprint(first) == fingerprint(second)
    second.model.norm.delta = torch.nn.Linear(2, 2)
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.model.norm.weight[0] = 2.0
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(load(llama, dtype="bfloat16", device="cpu").model) != fingerprint(first)


def test_the_fingerprint_of_a_big_module(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "FULL_HASH_BYTES", 0)
    monkeypatch.setattr(fingerprints, "SAMPLE_BYTES", 64)
    model = load(llama, device="cpu").model
    before = fingerprint(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[-1, -1] = 9
    assert fingerprint(model) != before


def test_a_fingerprint_needs_a_model(tmp_path: Path, llama: Path) -> None:
    refusal("does not exist", call=lambda: fingerprint(tmp_path / "nothing"))
    os.remove(llama / "model.safetensors")
    refusal("there is no model.safetensors", call=lambda: fingerprint(llama))
