"""Loading: a pretrained model and its tokenizer from a directory, a starter's short name or a hub id.

What is wrong with a model directory is said before any weight is read; what transformers would only warn about
(weights that are missing, unused or of another shape) is an error or a note here.
"""

from __future__ import annotations

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
from trimtab.models.files import TASKS, Problem, check_directory, config_problems, first_line, refuse, weights_in
from trimtab.models.starters import fetch, quiet_transformers, starters

if TYPE_CHECKING:
    from trimtab.models.coded.source import Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HEADS = ("classify", "regress")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_PADDING_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


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
    location, directory = located(source, progress)
    if directory is not None:
        check_directory(directory, task=task)
    kind, kind_note = (DTYPES[dtype], None) if dtype != "auto" else auto_dtype(where)
    with quiet_transformers():
        config = config_of(location, source, hub=directory is None)
        check_task(config, source, task)
        notes = [kind_note] if kind_note else []
        if context is not None:
            notes.append(lengthen(config, context, str(source)))
        if task in _HEADS:
            notes += _set_labels(config, source, task, labels)
        tokenizer = tokenizer_of(location, source)
        coded = _coded(location, directory, config, getattr(importlib.import_module("transformers"), TASKS[task][0]))
        if coded is None:
            model, new_modules, weight_notes = _model(location, source, config, task, kind, head_seed)
        else:
            model, new_modules, weight_notes = _coded_model(coded, location, source, config, task, kind, head_seed)
        notes += weight_notes
        notes += set_padding(model, tokenizer, source)
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
        max_length=longest_input(model, tokenizer),
        new_modules=new_modules,
        notes=tuple(notes),
    )


def writing_task(source: str | Path) -> str:
    """How a model that writes is trained: seq2seq where an encoder reads the prompt, else causal."""
    return "causal" if decoder_start_of(source) is None else "seq2seq"


def decoder_start_of(source: str | Path) -> int | None:
    """The first token of what a decoder writes where an encoder reads the prompt; None for models that have none."""
    location, directory = located(source, None)
    if directory is not None and config_problems(directory):
        return None
    with quiet_transformers():
        return decoder_start(config_of(location, source, hub=directory is None))


def decoder_start(config: Any) -> int | None:
    """`decoder_start_of` a model with this configuration."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    start: int | None = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id or 0) if start is None else start


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

    location, directory = located(source, progress)
    if directory is not None:
        refuse(f"model {directory}", config_problems(directory))
    with quiet_transformers():
        config = config_of(location, source, hub=directory is None)
        loader = AutoModel
        writes = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"
        for kind in (writes, "classify") if task is None else (task,):
            try:
                check_task(config, source, kind)
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
    location, directory = located(source, None)
    return directory if directory is not None else _hub_directory(location)


def _choice(kind: str, value: str, choices: Iterable[str]) -> list[Problem]:
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
    refuse(f"model {source}", problems)


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
            f"device {name!r} cannot be used: {first_line(error)}",
            fix="use device auto or cpu, or see what torch supports",
        ) from error
    return device


def auto_dtype(device: torch.device) -> tuple[torch.dtype, str | None]:
    """bfloat16 where the hardware multiplies it natively, else float32; with a note if it is not float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "dtype auto: bfloat16, which this GPU multiplies natively"
    if device.type == "cpu":
        probes = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
        fast = [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
        if fast:
            return torch.bfloat16, f"dtype auto: bfloat16, which this CPU multiplies natively ({listing(fast)})"
    return torch.float32, None


def located(source: str | Path, progress: Callable[[str], None] | None) -> tuple[str, Path | None]:
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
    files, problems = weights_in(directory, "causal")
    if problems:
        return None
    source = Packed(settings, files)
    refuse(f"model {location}", source.damage())
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


def config_of(location: str, source: str | Path, *, hub: bool) -> Any:
    """The configuration, or the error that says why there is none."""
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

    why = "offline mode is on (HF_HUB_OFFLINE) and there is no local copy" if HF_HUB_OFFLINE else first_line(error)
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
        f"model {source}: transformers {__version__} could not load its {part}: {first_line(error)}",
        fix="see whether the files belong together, and whether this version of transformers knows the architecture",
    )


def _mapping(task: str) -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    table: Mapping[str, Any] = getattr(modeling_auto, TASKS[task][1])
    return table


def check_task(config: Any, source: str | Path, task: str) -> None:
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


def tokenizer_of(location: str, source: str | Path) -> Any:
    """The tokenizer, or the error that says why there is none."""
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
    level(model, dtype)
    missing, unexpected = set(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in report["mismatched_keys"]}
    new = {key for key in missing | set(shapes) if task in _HEADS and _in_head(model, key)}
    problems: list[Problem] = []
    unused = f"; {len(unexpected)} tensors of the file fit nowhere: {listing(unexpected, 5)}" if unexpected else ""
    fix = "see whether config.json and the weights are of the same model, and whether the task is the right one"
    if absent := sorted(missing - new - set(shapes)):
        problems.append((f"the weights lack {len(absent)} of the model's tensors: {listing(absent)}{unused}", fix))
    if misshapen := sorted(set(shapes) - new):
        pairs = [f"{key} is {shapes[key][0]}, config.json wants {shapes[key][1]}" for key in misshapen]
        problems.append((f"{len(misshapen)} tensors have another shape: {listing(pairs, 5)}", fix))
    refuse(f"model {source}", problems)
    notes = []
    if new:
        notes.append(f"newly initialized from head seed {head_seed}: {listing(sorted(new))}")
    if unexpected:
        notes.append(f"{len(unexpected)} tensors of the checkpoint are not used: {listing(unexpected)}")
    return model, tuple(sorted({key.rpartition(".")[0] for key in new})), notes


def level(model: Any, dtype: torch.dtype) -> None:
    """Brings to `dtype` what the model makes in float32 without asking to keep it so: DeBERTa's q_bias and v_bias."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not any(re.search(one, name) for one in kept):
            parameter.data = parameter.data.to(dtype)


def _in_head(model: Any, key: str) -> bool:
    """Whether a tensor lies outside the pretrained body, or in its pooler, which many checkpoints leave out."""
    body = f"{model.base_model_prefix}."
    return not key.startswith(body) or key.removeprefix(body).startswith("pooler.")


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


def _hub_directory(location: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(location, "config.json", _raise_exceptions_for_missing_entries=False)
    return Path(os.path.dirname(found)) if found else None
