"""Small tokenizers made in the process: no file and no network."""

from __future__ import annotations

from functools import cache

import pytest

SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "What is the capital of France? The capital of France is Paris.",
    "Give three tips for staying healthy: eat well, sleep well, move a lot.",
    "name[The Vaults], area[city centre], food[English]",
    "You are a helpful assistant. user assistant system tool Question Answer",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)

INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

THINKING_LAST = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

THINKING_PROMPT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|start|>' + m['content'] }}"
    "{% else %}{{ '<|end|>' + m['content'].split('</think>')[-1] + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|end|><think>\n' }}{% endif %}"
)

END_ONLY_LAST = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% else %}{{ eos_token }}{% endif %}"
)

NO_END = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "[INST]", "[/INST]"]


@cache
def byte_pairs(template: str | None = None, end: str = "</s>", add_start: bool = False, trim: bool = True):
    """A byte-level BPE tokenizer, like those of GPT-2, Llama 3 and Qwen."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    level = processors.ByteLevel(trim_offsets=trim)
    if add_start:
        start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        tokenizer.post_processor = processors.Sequence([level, start])
    else:
        tokenizer.post_processor = level
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made


@cache
def encoder_words():
    """A word-level tokenizer with segments, like that of BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, tokenizer.token_to_id(word)) for word in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def learned(item, tokenizer) -> str:
    """The trained tokens as text."""
    return tokenizer.decode([number for number, on in zip(item.ids, item.trained, strict=True) if on])


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_pairs


@pytest.fixture(scope="session")
def chatml():
    return byte_pairs(CHATML, "<|im_end|>")


@pytest.fixture(scope="session")
def plain():
    return byte_pairs(None)


@pytest.fixture(scope="session")
def plain_with_start():
    return byte_pairs(None, "</s>", True)


@pytest.fixture(scope="session")
def words():
    return encoder_words()


@pytest.fixture(scope="session")
def learned_text():
    return learned


@pytest.fixture(scope="session")
def templates():
    return {
        "chatml": CHATML,
        "default system": DEFAULT_SYSTEM,
        "llama": LLAMA,
        "inst": INST,
        "thinking last": THINKING_LAST,
        "thinking prompt": THINKING_PROMPT,
        "end only last": END_ONLY_LAST,
        "no end": NO_END,
    }
