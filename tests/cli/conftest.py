"""A tiny model directory and data files, made once, for tests that run whole commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli.main import main

WORDS = "red green blue black white small large old new round square cat dog bird fish tree house river stone".split()
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat: bool, positions: int = 128) -> Any:
    """A byte-level tokenizer with a few merges, with or without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def save_model(directory: Path, chat: bool, architecture: str = "llama", seed: int = 0, positions: int = 128) -> Path:
    """A random two-layer model with its tokenizer, as `save_pretrained` writes them."""
    import torch
    import transformers

    torch.manual_seed(seed)
    words = tokenizer(chat, positions)
    sizes = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": positions, "intermediate_size": 48}
    if architecture == "llama":
        ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
        config = transformers.LlamaConfig(**sizes, **ids, num_key_value_heads=2, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    elif architecture == "t5":
        start = {"decoder_start_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
        sizes = {"vocab_size": len(words), "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(**sizes, **start, pad_token_id=words.pad_token_id, dropout_rate=0.0)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes, pad_token_id=words.pad_token_id))
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-chat", chat=True)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-plain", chat=False)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-bert", chat=False, architecture="bert")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"say {one} {two}", "completion": f"{two} {one}"} for one in WORDS[:6] for two in WORDS[6:12]]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"text": f"{one} {two}", "label": "colour" if one in WORDS[:5] else "other"}
        for one in WORDS
        for two in WORDS[:3]
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "labels.jsonl", rows)


@dataclass
class Outcome:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def trimtab(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Outcome]]:
    """Run a command line in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        sys.stdout.flush()
        found = capfd.readouterr()
        return Outcome(code, found.out, found.err)

    yield run
    for name in set(os.environ) - set(before):
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    chat_model: Path,
    plain_model: Path,
    encoder: Path,
    prompts: Path,
    labelled: Path,
) -> dict[str, Path]:
    """Finished runs: `chat` and `plain` (causal, with and without a chat template), `classes` and `numbers`."""
    folder = tmp_path_factory.mktemp("runs")
    values = write_rows(folder / "values.jsonl", [{"text": " ".join(WORDS[:n]), "label": n / 4} for n in range(1, 17)])
    common = ["--steps", "12", "--learning-rate", "1e-2", "--json"]
    causal = ["--data", prompts, *common]
    wanted: dict[str, list[Any]] = {
        "chat": ["--model", chat_model, *causal, "--rank", "4"],
        "plain": ["--model", plain_model, *causal, "--method", "prefix_tuning", "--length", "4"],
        "quantized": ["--model", chat_model, *causal, "--quantize", "nf4"],
        "classes": ["--model", encoder, "--data", labelled, *common],
        "numbers": ["--model", encoder, "--data", values, *common],
    }
    found = {name: folder / name for name in wanted}
    for name, arguments in wanted.items():
        assert main(["tune", *map(str, arguments), "--output", str(found[name])]) == 0
    return found
