"""The files of a model directory: what they hold, and what keeps them from loading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing
from trimtab.models.starters import starters

TASKS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "classify": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "regress": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
}
"""Task -> (the transformers class that loads it, the table of model types that have it)."""

LFS = b"version https://git-lfs"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.txt", "vocab.json")

_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".safetensors")

_TOKENIZER_ENDINGS = (".model", ".tiktoken")

_TOKENIZERS_WITHOUT_FILES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")

Problem = tuple[str, str]
"""What is wrong, and the fix."""


def check_directory(directory: str | Path, *, task: str = "causal") -> None:
    """Raises one `UserError` naming everything that keeps `directory` from being a loadable model."""
    from trimtab.models.coded.gguf_file import is_gguf
    from trimtab.models.coded.gguf_file import problems_of as gguf_problems

    directory = Path(directory)
    if is_gguf(directory):
        refuse(f"model {directory}", gguf_problems(directory))
        return
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist", fix="give the path of a directory")
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise UserError(
            f"model {directory}: this is an adapter (adapter_config.json), not a model",
            fix="load its base model, then load the adapter onto it",
        )
    problems = [*config_problems(directory), *weights_in(directory, task)[1], *tokenizer_problems(directory)]
    if directory.name in starters() and any("no config.json" in what for what, _ in problems):
        problems.append((f"it hides the starter {directory.name}", "rename the directory to get the starter"))
    refuse(f"model {directory}", problems)


def is_coded(directory: Path) -> bool:
    """Whether the files of a model hold codes of another tool instead of dense weights."""
    from trimtab.models.coded.gguf_file import is_gguf
    from trimtab.models.coded.packed import settings_of

    if is_gguf(directory):
        return True
    if config_problems(directory):
        return False
    return settings_of(json.loads((directory / "config.json").read_text(encoding="utf-8"))) is not None


def refuse(where: str, problems: Sequence[Problem]) -> None:
    """Raises one error for all `problems`, or nothing when there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(f"{where}: {problems[0][0]}", fix=problems[0][1])
    lines = "".join(f"\n  - {what}\n    fix: {fix}" for what, fix in problems)
    raise UserError(f"{where}: {len(problems)} problems{lines}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def config_problems(directory: Path) -> list[Problem]:
    """What `config.json` says, and what is wrong with it."""
    from trimtab.models.coded.gguf_file import is_gguf, problems_of

    if is_gguf(directory):
        return problems_of(directory)
    path = directory / "config.json"
    if not path.is_file():
        return [("there is no config.json", "give the directory that save_pretrained wrote, with config.json in it")]
    fix = "copy config.json again from where the model came from"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [(f"config.json cannot be read as JSON: {first_line(error)}", fix)]
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return [("config.json has no model_type", fix)]
    return _method_problems(config)


def _method_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Whether the weights are quantized by a method that is not read."""
    from trimtab.models.coded.packed import layout_of, settings_of

    try:
        settings = settings_of(config)
        if settings is not None:
            layout_of(settings)
    except UserError as error:
        return [(error.message, error.fix or "give the model as it was before")]
    return []


def weights_in(directory: Path, task: str) -> tuple[list[Path], list[Problem]]:
    """The safetensors files of a directory, and what is wrong with them."""
    again = "copy the file again from where the model came from (with git: git lfs pull)"
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [], [(f"{index.name} cannot be read: {first_line(error)}", again)]
        strange = [name for name in named if Path(name).name != name]
        if strange:
            return [], [(f"{index.name} names files outside the directory: {listing(strange)}", again)]
        files = [directory / name for name in named]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            what = f"{len(absent)} of {len(files)} weight files named in {index.name} are missing: {listing(absent)}"
            return files, [(what, "copy the missing files too")]
    else:
        return [], [_no_weights(directory, task)]
    return files, [(f"{file.name} {damage}", again) for file in files if (damage := _damage(file))]


def _no_weights(directory: Path, task: str) -> Problem:
    pickles = [*directory.glob("pytorch_model*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
    if pickles:
        convert = (
            f'python -c "from transformers import {TASKS[task][0]} as M; '
            f'M.from_pretrained({str(directory)!r}, use_safetensors=False).save_pretrained({str(directory)!r})"'
        )
        names = listing(sorted(file.name for file in pickles))
        return (
            f"its weights are a pickle ({names}), which can run any code when loaded",
            f"if you trust where it came from, convert it once: {convert}",
        )
    if quantized := sorted(file.name for file in directory.glob("*.gguf")):
        return (
            f"its weights are GGUF ({listing(quantized)})",
            f"name the file to keep its codes as a frozen base: --model {directory / quantized[0]}",
        )
    other = sorted(file.name for file in directory.iterdir() if file.suffix in _OTHER_WEIGHTS)
    found = f" (found {listing(other)})" if other else ""
    return f"there is no model.safetensors{found}", "save the model with save_pretrained, or copy its weights here too"


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begin; a ValueError says what is wrong."""
    with file.open("rb") as opened:
        start = opened.read(32)
        if start.startswith(LFS):
            raise ValueError("is a Git LFS pointer, not the weights")
        size, total = int.from_bytes(start[:8], "little"), file.stat().st_size
        if len(start) < 8 or 8 + size > total:
            raise ValueError("is cut off or not a safetensors file")
        opened.seek(8)
        try:
            header = json.loads(opened.read(size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError("is not a safetensors file") from error
    expected = 8 + size + max(ends, default=0)
    if expected != total:
        raise ValueError(f"has {total:,} bytes, its header says {expected:,}: it is cut off or damaged")
    return header, 8 + size


def _damage(file: Path) -> str:
    try:
        header_of(file)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def tokenizer_problems(directory: Path) -> list[Problem]:
    """What keeps the tokenizer of a model directory from loading, each with its fix."""
    names = {file.name for file in directory.iterdir()}
    if names.intersection(_TOKENIZER_FILES) or any(name.endswith(_TOKENIZER_ENDINGS) for name in names):
        return []
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") in _TOKENIZERS_WITHOUT_FILES:
            return []
    except (OSError, ValueError, AttributeError):
        pass
    return [
        (
            "there are no tokenizer files (tokenizer.json, tokenizer.model, vocab.txt or the like)",
            "copy the tokenizer here too, or write it with tokenizer.save_pretrained",
        )
    ]
