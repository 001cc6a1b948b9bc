"""Forgetting: how much worse a tuned model predicts a text that has nothing to do with what it was tuned on."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.data.encode import encode_all
from trimtab.data.examples import Text
from trimtab.evaluate.rows import each_row

BUILT_IN, NONE = "built-in", "none"
PIECE = 256
"""Tokens of a piece that is predicted by itself."""


def reference_text(asked: str) -> str:
    """The text of a file, or for `built-in` some 850 words of plain English that come with this package."""
    if asked == BUILT_IN:
        return resources.files("trimtab.evaluate").joinpath("reference.txt").read_text("utf-8")
    try:
        return Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"reference text: {asked} cannot be read: {error}", fix=f"a UTF-8 text file, {BUILT_IN} or {NONE}"
        ) from None


def reference_loss(model: Any, tokenizer: Any, asked: str, *, batch_size: int = 8) -> float:
    """Loss per token of a causal model on a reference text, in pieces of 256 tokens."""
    rows = encode_all([Text(text=reference_text(asked))], tokenizer, max_length=PIECE, truncation="split")
    return each_row(model, rows, "causal", int(tokenizer.pad_token_id), batch_size=batch_size).loss
