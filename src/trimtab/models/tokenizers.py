"""A model's tokenizer, the token it pads with, and the longest input that both take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.errors import UserError
from trimtab.models.sources import asked, not_loadable

_PADDING_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


def tokenizer_of(location: str, source: str | Path) -> Any:
    """The tokenizer, or the error that says why there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**asked(location))
    except Exception as error:
        raise not_loadable(source, "tokenizer", error) from error


def set_padding(model: Any, tokenizer: Any, source: str | Path) -> list[str]:
    """Gives the tokenizer a padding token if it has none, and the model the tokenizer's; notes what changed."""
    notes = []
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        notes.append(f"the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}: the last cannot be used")
    if tokenizer.pad_token is None or tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        known = tokenizer.get_vocab()
        taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        wanted = [*_PADDING_NAMES, tokenizer.unk_token]
        free = [name for name in wanted if name in known and known[name] not in taken and known[name] < rows]
        chosen = free[0] if free else tokenizer.eos_token
        if chosen is None:
            raise UserError(
                f"model {source}: its tokenizer has no padding token, and none that could serve as one",
                fix='name one in tokenizer_config.json: "pad_token": "..."',
            )
        tokenizer.pad_token = chosen
        shared = "" if free else ", which also ends a text: only attention masks tell the two apart"
        notes.append(f"the tokenizer has no usable padding token; {chosen} is used{shared}")
    wanted_id, found_id = tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)
    if found_id is not None and found_id != wanted_id:
        notes.append(f"padding token id {found_id} of the model is replaced by the tokenizer's, {wanted_id}")
    model.config.pad_token_id = wanted_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = wanted_id
    return notes


def longest_input(model: Any, tokenizer: Any) -> int | None:
    """The longest input in tokens: the positions the model has, less those its family reserves; or the tokenizer's."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    limits.append(tokenizer.model_max_length)
    found = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(found) if found else None
