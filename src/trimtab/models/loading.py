"""Loading: a pretrained model and its tokenizer from a directory, a starter's short name or a hub id.

What is wrong with a model directory is said before any weight is read; what transformers would only warn about
(weights that are missing, unused or of another shape) is an error or a note here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.core.errors import UserError, listing, nearest
from trimtab.models.context import lengthen
from trimtab.models.devices import DTYPES, auto_dtype, device_of, level
from trimtab.models.files import TASKS, Problem, check_directory, config_problems, refuse, weights_in
from trimtab.models.sources import all_of_hub, config_of, hub_directory, located, not_loadable
from trimtab.models.starters import quiet_transformers
from trimtab.models.tasks import HEADED, check_task, set_labels
from trimtab.models.tokenizers import longest_input, set_padding, tokenizer_of

if TYPE_CHECKING:
    from trimtab.models.coded.source import Source


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
    where = device_of(device)
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
        if task in HEADED:
            notes += set_labels(config, source, task, labels)
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
            directory = hub_directory(location)
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
            if kind in HEADED and (task == "regress" or outputs is not None):
                config.num_labels = 1 if task == "regress" else outputs
            break
        try:
            from trimtab.models.coded.building import outlined

            return outlined(loader, config, _coded(location, directory, config, loader))
        except UserError as error:
            raise UserError(f"model {source}: {error.message}", fix=error.fix) from None
        except Exception as error:
            raise not_loadable(source, "architecture", error) from error


def of_shape(config: str | Path, *, dtype: str = "auto", device: str = "auto", seed: int = 0) -> Any:
    """A model in evaluation mode of the shape a `config.json` gives, with random weights; `dtype` auto is float32.

    Its class is that of `outline`; the global random state stays as it was.
    """
    _check_request(config, "causal", None, dtype)
    where = device_of(device)
    shape: Any = outline(Path(config).parent)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = type(shape)(shape.config)
    return made.to(where, DTYPES["float32" if dtype == "auto" else dtype]).eval()


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
        directory = all_of_hub(location)
    files, problems = weights_in(directory, "causal")
    if problems:
        return None
    source = Packed(settings, files)
    refuse(f"model {location}", source.damage())
    return source


def _coded_model(
    coded: Source, location: str, source: str | Path, config: Any, task: str, dtype: torch.dtype, head_seed: int
) -> tuple[Any, tuple[str, ...], list[str]]:
    """The model around its codes, as `_model` gives a dense one."""
    import transformers

    from trimtab.models.coded.building import built

    loader = getattr(transformers, TASKS[task][0])
    in_head = _in_head if task in HEADED else None
    try:
        model, new, notes = built(loader, config, coded, str(source), dtype, head_seed, in_head)
    except UserError as error:
        told = error.message if error.message.startswith("model ") else f"model {source}: {error.message}"
        raise UserError(told, fix=error.fix) from None
    except Exception as error:
        raise not_loadable(source, "weights", error) from error
    if (Path(location) / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(location)
    return model, new, notes


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
            raise not_loadable(source, "weights", error) from error
    level(model, dtype)
    missing, unexpected = set(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in report["mismatched_keys"]}
    new = {key for key in missing | set(shapes) if task in HEADED and _in_head(model, key)}
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


def _in_head(model: Any, key: str) -> bool:
    """Whether a tensor lies outside the pretrained body, or in its pooler, which many checkpoints leave out."""
    body = f"{model.base_model_prefix}."
    return not key.startswith(body) or key.removeprefix(body).startswith("pooler.")
