"""Loading: a pretrained model and its tokenizer from a directory, a starter's short name or a hub id.

What is wrong with a model directory is said before any weight is read; what transformers would only warn about
(weights that are missing, unused or of another shape) is an error or a note here.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.core.errors import UserError, listing, nearest
from trimtab.models.context import lengthen
from trimtab.models.starters import fetch, quiet_transformers, starters

if TYPE_CHECKING:
    from trimtab.models.coded.source import Source

TASKS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "classify": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "regress": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
}
"""Task -> (the transformers class that loads it, the table of model types that have it)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FULL_HASH_BYTES = 1 << 30
"""Weights up to this size in all are hashed whole for a fingerprint; bigger ones are sampled."""
SAMPLE_BYTES = 1 << 16

_HEADS = ("classify", "regress")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LFS = b"version https://git-lfs"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.txt", "vocab.json")
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".safetensors")
_TOKENIZER_ENDINGS = (".model", ".tiktoken")
_TOKENIZERS_WITHOUT_FILES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
_PADDING_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_INESSENTIAL = frozenset(
    "_name_or_path architectures auto_map bos_token_id dtype eos_token_id finetuning_task id2label label2id num_labels "
    "pad_token_id problem_type task_specific_params torch_dtype transformers_version use_cache".split()
)
_Problem = tuple[str, str]
"""What is wrong, and the fix."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer, and how they were loaded.

    `directory` is where the files are (for a hub id: the hub's local copy, `None` if that cannot be told).
    `max_length` is the longest input in tokens, `None` when the model sets no limit. `new_modules` are the modules
    whose weights the checkpoint does not have (a fresh head), by name; `notes` tells in words what was decided.
    """

    model: Any
    tokenizer: Any
    source: str
    directory: Path | None
    task: str
    dtype: torch.dtype
    device: torch.device
    max_length: int | None = None
    new_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        """Name of the model's class, such as `LlamaForCausalLM`."""
        return type(self.model).__name__


def load(
    source: str | Path,
    *,
    task: str = "causal",
    labels: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    head_seed: int = 0,
    context: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Loaded:
    """The model and tokenizer of `source`: a directory, a starter's short name, or a hub id, looked up in this order.

    `task` is causal, seq2seq, classify or regress. `labels` names the classes in the order of their ids; without it,
    classify takes the checkpoint's own. `dtype` auto is float32, or bfloat16 where the device is fast at it (a GPU
    from compute capability 8.0, a CPU with AMX or AVX512-BF16). `device` auto is cuda, else mps, else cpu. Weights of
    a head that the checkpoint does not have are drawn from `head_seed`: equal seeds, dtypes and versions of
    transformers give equal heads, and the global random state stays as it was. `context` lengthens what the model reads
    to so many tokens (`trimtab.models.context`). `progress` gets a line of text per
    step of fetching a starter. `requires_grad` is left as transformers sets it. Pickled weights and code that comes
    with a model are never run. Errors: `UserError`, before the weights are read wherever that is possible.
    """
    _check_request(source, task, labels, dtype)
    where = _device(device)
    location, directory = _locate(source, progress)
    if directory is not None:
        check_directory(directory, task=task)
    kind, kind_note = (DTYPES[dtype], None) if dtype != "auto" else _auto_dtype(where)
    with quiet_transformers():
        config = _config(location, source, hub=directory is None)
        _check_task(config, source, task)
        notes = [kind_note] if kind_note else []
        if context is not None:
            notes.append(lengthen(config, context, str(source)))
        if task in _HEADS:
            notes += _set_labels(config, source, task, labels)
        tokenizer = _tokenizer(location, source)
        coded = _coded(location, directory, config, getattr(importlib.import_module("transformers"), TASKS[task][0]))
        if coded is None:
            model, new_modules, weight_notes = _model(location, source, config, task, kind, head_seed)
        else:
            model, new_modules, weight_notes = _coded_model(coded, location, source, config, task, kind, head_seed)
        notes += weight_notes
        notes += _set_padding(model, tokenizer, source)
        if context is not None:
            tokenizer.model_max_length = max(tokenizer.model_max_length, context)
        model = model.to(where).eval()
        if directory is None:
            directory = _hub_directory(location)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        source=str(source),
        directory=directory,
        task=task,
        dtype=kind,
        device=where,
        max_length=_max_length(model, tokenizer),
        new_modules=new_modules,
        notes=tuple(notes),
    )


def writing_task(source: str | Path) -> str:
    """How a model that writes is trained: seq2seq where an encoder reads the prompt, else causal."""
    location, directory = _locate(source, None)
    if directory is not None and _config_problems(directory):
        return "causal"
    with quiet_transformers():
        config = _config(location, source, hub=directory is None)
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"


def outline(
    source: str | Path,
    *,
    task: str | None = None,
    outputs: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """The model of `source` on the meta device, from its `config.json` alone: every shape, no weight.

    Its class is the one that `load` would take for `task`: without one, a class that writes where the architecture
    does, else a classifier. A head that gives a number has one output, one that gives classes `outputs`, or as many
    as the config names.
    """
    from transformers import AutoModel

    location, directory = _locate(source, progress)
    if directory is not None:
        _refuse(f"model {directory}", _config_problems(directory))
    with quiet_transformers():
        config = _config(location, source, hub=directory is None)
        loader = AutoModel
        writes = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"
        for kind in (writes, "classify") if task is None else (task,):
            try:
                _check_task(config, source, kind)
            except UserError:
                if task is not None:
                    raise
                continue
            loader = getattr(importlib.import_module("transformers"), TASKS[kind][0])
            if kind in _HEADS and (task == "regress" or outputs is not None):
                config.num_labels = 1 if task == "regress" else outputs
            break
        try:
            from trimtab.models.coded.building import outlined

            return outlined(loader, config, _coded(location, directory, config, loader))
        except UserError as error:
            raise UserError(f"model {source}: {error.message}", fix=error.fix) from None
        except Exception as error:
            raise _not_loadable(source, "architecture", error) from error


def of_shape(config: str | Path, *, dtype: str = "auto", device: str = "auto", seed: int = 0) -> Any:
    """A model in evaluation mode of the shape a `config.json` gives, with random weights; `dtype` auto is float32.

    Its class is that of `outline`; the global random state stays as it was.
    """
    _check_request(config, "causal", None, dtype)
    where = _device(device)
    shape: Any = outline(Path(config).parent)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = type(shape)(shape.config)
    return made.to(where, DTYPES["float32" if dtype == "auto" else dtype]).eval()


def directory_of(source: str | Path) -> Path | None:
    """Where the files of a model are: a directory, a starter's, or the hub's local copy; None if that is not known."""
    location, directory = _locate(source, None)
    return directory if directory is not None else _hub_directory(location)


def check_directory(directory: str | Path, *, task: str = "causal") -> None:
    """Raises one `UserError` naming everything that keeps `directory` from being a loadable model."""
    from trimtab.models.coded.gguf_file import is_gguf
    from trimtab.models.coded.gguf_file import problems_of as gguf_problems

    directory = Path(directory)
    if is_gguf(directory):
        _refuse(f"model {directory}", gguf_problems(directory))
        return
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist", fix="give the path of a directory")
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise UserError(
            f"model {directory}: this is an adapter (adapter_config.json), not a model",
            fix="load its base model, then load the adapter onto it",
        )
    problems = [*_config_problems(directory), *_weights(directory, task)[1], *tokenizer_problems(directory)]
    if directory.name in starters() and any("no config.json" in what for what, _ in problems):
        problems.append((f"it hides the starter {directory.name}", "rename the directory to get the starter"))
    _refuse(f"model {directory}", problems)


def is_coded(directory: Path) -> bool:
    """Whether the files of a model hold codes of another tool instead of dense weights."""
    from trimtab.models.coded.gguf_file import is_gguf
    from trimtab.models.coded.packed import settings_of

    if is_gguf(directory):
        return True
    if _config_problems(directory):
        return False
    return settings_of(json.loads((directory / "config.json").read_text(encoding="utf-8"))) is not None


def fingerprint(model: str | Path | Loaded | nn.Module) -> str:
    """A sha256 (64 hexadecimal digits) that tells one base model from another; it binds an adapter to its base.

    Of a directory (or a `Loaded`, which has one): over the fields of `config.json` that change what the model
    computes, and the weight files. Up to 1 GiB in all the files are hashed whole; beyond that each counts with its
    size, its header (every tensor's name, dtype, shape and place) and the first and last 64 KiB of every tensor, so
    a change in the middle of a big tensor alone goes unseen. Of a GGUF file likewise: all of it, or a thousand pieces
    of 64 KiB. Copies of a directory have equal fingerprints; other
    shards or another dtype of the same weights do not.

    Of a module: over its model type and the names, dtypes, shapes and content of its state dict, without attached
    deltas. It is a different number than that of the directory it was loaded from: compare like with like.
    Errors: `UserError` for a directory without config or safetensors weights.
    """
    if isinstance(model, Loaded):
        model = model.model if model.directory is None else model.directory
    if isinstance(model, nn.Module):
        return _module_fingerprint(model)
    directory = Path(model).expanduser()
    if directory.suffix == ".gguf" and directory.is_file():
        return _file_fingerprint(directory)
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist", fix="give the path of a directory")
    files, problems = _weights(directory, "causal")
    _refuse(f"model {directory}", [*_config_problems(directory), *problems])
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    essential = {key: value for key, value in config.items() if key not in _INESSENTIAL}
    digest = hashlib.sha256(json.dumps(essential, sort_keys=True).encode())
    whole = sum(file.stat().st_size for file in files) <= FULL_HASH_BYTES
    for file in files:
        digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        _hash_file(file, digest, whole=whole)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- what was asked for


def _refuse(where: str, problems: Sequence[_Problem]) -> None:
    """Raises one error for all `problems`, or nothing when there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(f"{where}: {problems[0][0]}", fix=problems[0][1])
    lines = "".join(f"\n  - {what}\n    fix: {fix}" for what, fix in problems)
    raise UserError(f"{where}: {len(problems)} problems{lines}")


def _reason(error: BaseException) -> str:
    """The first line of an error's text, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _choice(kind: str, value: str, choices: Iterable[str]) -> list[_Problem]:
    names = list(choices)
    if value in names:
        return []
    close = nearest(str(value), names, n=1)
    return [(f"unknown {kind} {value!r}", (f"did you mean {close[0]}? " if close else "") + f"one of {listing(names)}")]


def _check_request(source: str | Path, task: str, labels: Sequence[str] | None, dtype: str) -> None:
    problems = _choice("task", task, TASKS) + _choice("dtype", dtype, ("auto", *DTYPES))
    if labels is not None and task in TASKS and task != "classify":
        problems.append((f"labels do not apply to task {task}", "leave labels out, or use task classify"))
    elif labels is not None:
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            problems.append(("labels must be a list of strings", 'for example labels=["negative", "positive"]'))
        elif len(labels) < 2:
            problems.append(
                (f"classify needs two labels or more, found {len(labels)}", "for a number use task regress")
            )
        elif len(set(labels)) < len(labels):
            twice = sorted({label for label in labels if list(labels).count(label) > 1})
            problems.append((f"labels occur twice: {listing(twice)}", "name every class once"))
    _refuse(f"model {source}", problems)


def _device(name: str) -> torch.device:
    """The device of that name, proven by putting a tensor there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("the meta device holds no weights")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"device {name!r} cannot be used: {_reason(error)}",
            fix="use device auto or cpu, or see what torch supports",
        ) from error
    return device


def _auto_dtype(device: torch.device) -> tuple[torch.dtype, str | None]:
    """bfloat16 where the hardware multiplies it natively, else float32; with a note if it is not float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "dtype auto: bfloat16, which this GPU multiplies natively"
    if device.type == "cpu":
        probes = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
        fast = [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
        if fast:
            return torch.bfloat16, f"dtype auto: bfloat16, which this CPU multiplies natively ({listing(fast)})"
    return torch.float32, None


def _locate(source: str | Path, progress: Callable[[str], None] | None) -> tuple[str, Path | None]:
    """What transformers is given, and the directory if it is one already here (`None`: a hub id)."""
    path = Path(source).expanduser()
    text = str(source)
    if text and path.is_dir():
        return str(path), path
    if path.is_file() and path.suffix == ".gguf":
        return str(path), path
    if path.is_file():
        raise UserError(
            f"model {text} is a file; a model is a directory, or a GGUF file",
            fix=f"give a directory, {_names_of_starters()}",
        )
    if text in starters():
        directory = fetch(text, progress=progress)
        return str(directory), directory
    looks_local = text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text
    if isinstance(source, Path) or path.is_absolute() or looks_local:
        raise UserError(
            f"model directory {text} does not exist", fix=f"give the path of a directory, {_names_of_starters()}"
        )
    if not _HUB_ID.fullmatch(text):
        raise UserError(
            f"model {text!r} is neither a directory, nor a starter, nor in the form of a hub id (owner/name)",
            fix=f"give the path of a directory, {_names_of_starters()}",
        )
    return text, None


def _names_of_starters() -> str:
    return f"or one of the starters, which need no hub: {listing(starters())}"


# ------------------------------------------------------------------------------------ what is in a directory


def _config_problems(directory: Path) -> list[_Problem]:
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
        return [(f"config.json cannot be read as JSON: {_reason(error)}", fix)]
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return [("config.json has no model_type", fix)]
    return _method_problems(config)


def _method_problems(config: Mapping[str, Any]) -> list[_Problem]:
    """Whether the weights are quantized by a method that is not read."""
    from trimtab.models.coded.packed import layout_of, settings_of

    try:
        settings = settings_of(config)
        if settings is not None:
            layout_of(settings)
    except UserError as error:
        return [(error.message, error.fix or "give the model as it was before")]
    return []


def _coded(location: str, directory: Path | None, config: Any, loader: Any) -> Source | None:
    """The files of a model whose weights another tool has quantized; None for a dense one, or where no files are."""
    from trimtab.models.coded.building import without_settings
    from trimtab.models.coded.gguf_file import GGUFFile, is_gguf
    from trimtab.models.coded.packed import Packed, settings_of

    if directory is not None and is_gguf(directory):
        without_settings(config)
        with torch.device("meta"):
            blank = loader.from_config(config)
        try:
            return GGUFFile(directory, config, blank)
        except UserError as error:
            raise UserError(f"model {location}: {error.message}", fix=error.fix) from None
    settings = settings_of(config)
    if settings is None:
        return None
    if directory is None:
        directory = _all_of_hub(location)
    files, problems = _weights(directory, "causal")
    if problems:
        return None
    source = Packed(settings, files)
    _refuse(f"model {location}", source.damage())
    return source


def _all_of_hub(location: str) -> Path:
    """The local copy of a hub model with all its weights, fetched where it is not here."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:
        raise _no_hub(location, error) from error


def _coded_model(
    coded: Source, location: str, source: str | Path, config: Any, task: str, dtype: torch.dtype, head_seed: int
) -> tuple[Any, tuple[str, ...], list[str]]:
    """The model around its codes, as `_model` gives a dense one."""
    import transformers

    from trimtab.models.coded.building import built

    loader = getattr(transformers, TASKS[task][0])
    in_head = _in_head if task in _HEADS else None
    try:
        model, new, notes = built(loader, config, coded, str(source), dtype, head_seed, in_head)
    except UserError as error:
        told = error.message if error.message.startswith("model ") else f"model {source}: {error.message}"
        raise UserError(told, fix=error.fix) from None
    except Exception as error:
        raise _not_loadable(source, "weights", error) from error
    if (Path(location) / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(location)
    return model, new, notes


def _weights(directory: Path, task: str) -> tuple[list[Path], list[_Problem]]:
    """The safetensors files of a directory, and what is wrong with them."""
    again = "copy the file again from where the model came from (with git: git lfs pull)"
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [], [(f"{index.name} cannot be read: {_reason(error)}", again)]
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


def _no_weights(directory: Path, task: str) -> _Problem:
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


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begin; a ValueError says what is wrong."""
    with file.open("rb") as opened:
        start = opened.read(32)
        if start.startswith(_LFS):
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
        _header(file)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def tokenizer_problems(directory: Path) -> list[_Problem]:
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


# ------------------------------------------------------------------------------------------- configuration


def _config(location: str, source: str | Path, *, hub: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**asked(location))
    except Exception as error:
        if hub and isinstance(error, OSError):
            raise _no_hub(str(source), error) from error
        raise _not_loadable(source, "configuration", error) from error


def asked(location: str) -> dict[str, str]:
    """What transformers is asked for: a directory or id, and the file of it where that is a GGUF file."""
    path = Path(location)
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": location}


def _no_hub(source: str, error: BaseException) -> UserError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    why = "offline mode is on (HF_HUB_OFFLINE) and there is no local copy" if HF_HUB_OFFLINE else _reason(error)
    close = nearest(source, starters(), n=1)
    return UserError(
        f"model {source!r} is no directory and no starter, and the model hub did not give it: {why}",
        fix=(f"did you mean {close[0]}? " if close else "")
        + f"give a directory, {_names_of_starters()}; for the hub, check the id, the network and your access",
    )


def _not_loadable(source: str | Path, part: str, error: BaseException) -> UserError:
    from transformers import __version__

    if "trust_remote_code" in str(error):
        return UserError(
            f"model {source}: its {part} needs Python code that comes with the model, which Trimtab does not run",
            fix="use a model whose architecture is part of transformers",
        )
    if "safetensors" in str(error) and "does not appear to have a file" in str(error):
        return UserError(
            f"model {source}: it has no safetensors weights, and a pickle can run any code when loaded",
            fix="use a model or revision with safetensors weights, or convert it and give the directory",
        )
    return UserError(
        f"model {source}: transformers {__version__} could not load its {part}: {_reason(error)}",
        fix="see whether the files belong together, and whether this version of transformers knows the architecture",
    )


def _mapping(task: str) -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    table: Mapping[str, Any] = getattr(modeling_auto, TASKS[task][1])
    return table


def _check_task(config: Any, source: str | Path, task: str) -> None:
    """The architecture can do the task; one that reads both ways is not taken for a causal model."""
    kind = config.model_type
    possible = [name for name in TASKS if kind in _mapping(name)]
    saved = list(config.architectures or [])
    if task not in possible:
        raise UserError(
            f"model {source}: a {kind} model ({listing(saved) or 'no architecture named'}) cannot do task {task}",
            fix=f"use task {' or '.join(possible)}" if possible else "use a text model that generates or classifies",
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    name = _mapping(task)[kind]
    names = {name} if isinstance(name, str) else set(name)
    both_ways = task == "causal" and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both_ways and not getattr(config, "is_decoder", False) and not names.intersection(saved):
        others = [other for other in possible if other != "causal"]
        raise UserError(
            f"model {source}: this {kind} model reads text in both directions, so it cannot generate it (task causal)",
            fix=f"use task {' or '.join(others)}, or a causal model such as smollm2-135m-instruct",
        )


def _set_labels(config: Any, source: str | Path, task: str, labels: Sequence[str] | None) -> list[str]:
    """Writes the head's size and label names into `config`; notes where the checkpoint's own head says otherwise."""
    own: list[str] | None = None
    if any(str(name).endswith("ForSequenceClassification") for name in config.architectures or []):
        own = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if task == "regress":
        config.num_labels = 1
        config.problem_type = "regression"
        if own is None or len(own) == 1:
            return []
        return [f"the checkpoint's own head has {len(own)} outputs; it is replaced by one output"]
    config.problem_type = "single_label_classification"
    if labels is None:
        if own is None or len(own) < 2:
            raise UserError(
                f"model {source}: task classify needs labels, since the checkpoint has no head of its own",
                fix='name the classes in the order of their ids: labels=["negative", "positive"]',
            )
        return [f"labels of the checkpoint: {listing(own)}"]
    names, notes = list(labels), []
    named = own is not None and not all(re.fullmatch(r"LABEL_\d+", label) for label in own)
    if own is not None and len(own) != len(names):
        notes.append(
            f"the checkpoint's own head is for {len(own)} labels ({listing(own)}); it is replaced by {len(names)}"
        )
    elif own is not None and named and own != names:
        if sorted(own) == sorted(names):
            raise UserError(
                f"model {source}: the checkpoint's own head has these labels in another order: {listing(own)}; "
                f"asked for {listing(names)}",
                fix=f"use labels={json.dumps(own)}",
            )
        pairs = [f"{old} -> {new}" for old, new in zip(own, names, strict=True) if old != new]
        notes.append(f"the checkpoint's own head is kept and its labels renamed: {listing(pairs)}")
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    return notes


# ------------------------------------------------------------------------------------- tokenizer and weights


def _tokenizer(location: str, source: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**asked(location))
    except Exception as error:
        raise _not_loadable(source, "tokenizer", error) from error


def _model(
    location: str, source: str | Path, config: Any, task: str, dtype: torch.dtype, head_seed: int
) -> tuple[Any, tuple[str, ...], list[str]]:
    """The model, the names of its newly drawn modules, and notes; other missing or misshapen weights are an error."""
    import transformers

    loader = getattr(transformers, TASKS[task][0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(head_seed)
        try:
            model, report = loader.from_pretrained(
                location,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise _not_loadable(source, "weights", error) from error
    missing, unexpected = set(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in report["mismatched_keys"]}
    new = {key for key in missing | set(shapes) if task in _HEADS and _in_head(model, key)}
    problems: list[_Problem] = []
    unused = f"; {len(unexpected)} tensors of the file fit nowhere: {listing(unexpected, 5)}" if unexpected else ""
    fix = "see whether config.json and the weights are of the same model, and whether the task is the right one"
    if absent := sorted(missing - new - set(shapes)):
        problems.append((f"the weights lack {len(absent)} of the model's tensors: {listing(absent)}{unused}", fix))
    if misshapen := sorted(set(shapes) - new):
        pairs = [f"{key} is {shapes[key][0]}, config.json wants {shapes[key][1]}" for key in misshapen]
        problems.append((f"{len(misshapen)} tensors have another shape: {listing(pairs, 5)}", fix))
    _refuse(f"model {source}", problems)
    notes = []
    if new:
        notes.append(f"newly initialized from head seed {head_seed}: {listing(sorted(new))}")
    if unexpected:
        notes.append(f"{len(unexpected)} tensors of the checkpoint are not used: {listing(unexpected)}")
    return model, tuple(sorted({key.rpartition(".")[0] for key in new})), notes


def _in_head(model: Any, key: str) -> bool:
    """Whether a tensor lies outside the pretrained body, or in its pooler, which many checkpoints leave out."""
    body = f"{model.base_model_prefix}."
    return not key.startswith(body) or key.removeprefix(body).startswith("pooler.")


def _set_padding(model: Any, tokenizer: Any, source: str | Path) -> list[str]:
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


def _max_length(model: Any, tokenizer: Any) -> int | None:
    """The longest input in tokens: the positions the model has, less those its family reserves; or the tokenizer's."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    limits.append(tokenizer.model_max_length)
    found = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(found) if found else None


def _hub_directory(location: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(location, "config.json", _raise_exceptions_for_missing_entries=False)
    return Path(os.path.dirname(found)) if found else None


# --------------------------------------------------------------------------------------------- fingerprints


def _hash_file(file: Path, digest: Any, *, whole: bool) -> None:
    with file.open("rb") as opened:
        if whole:
            while block := opened.read(1 << 20):
                digest.update(block)
            return
        header, begin = _header(file)
        digest.update(opened.read(begin))
        for entry in (value for name, value in sorted(header.items()) if name != "__metadata__"):
            first, last = entry["data_offsets"]
            for offset in (first, max(first, last - SAMPLE_BYTES)):
                opened.seek(begin + offset)
                digest.update(opened.read(min(SAMPLE_BYTES, last - offset)))


def _file_fingerprint(file: Path) -> str:
    """Of one file that is a whole model: all of it, or beyond 1 GiB pieces of 64 KiB, a thousand at even distances."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    with file.open("rb") as opened:
        if size <= FULL_HASH_BYTES:
            while block := opened.read(1 << 20):
                digest.update(block)
        for place in range(1000 if size > FULL_HASH_BYTES else 0):
            opened.seek((size - SAMPLE_BYTES) * place // 999)
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _module_fingerprint(model: nn.Module) -> str:
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    digest = hashlib.sha256(kind.encode())
    state = {key: value for key, value in model.state_dict().items() if "delta" not in key.split(".")}
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    whole = sum(value.nbytes for value in tensors.values()) <= FULL_HASH_BYTES
    for key, value in sorted(tensors.items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if whole or len(raw) <= 2 * SAMPLE_BYTES:
            digest.update(raw.data)
        else:
            digest.update(raw[:SAMPLE_BYTES].data)
            digest.update(raw[-SAMPLE_BYTES:].data)
    return digest.hexdigest()
