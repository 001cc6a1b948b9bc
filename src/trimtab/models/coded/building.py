"""A model around codes: built without memory, then filled tensor by tensor; no dense copy of a coded weight is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trimtab.core.code import Code
from trimtab.core.errors import UserError, listing
from trimtab.core.quantized import describe, quantize, rebuild
from trimtab.core.registry import to_json
from trimtab.models.buffers import fill_buffers, hollow_buffers
from trimtab.models.coded.packed import settings_of, usual_format
from trimtab.models.coded.source import Coded, Source

FIX = "see whether config.json and the weights are of the same model, and whether the task is the right one"
InHead = Callable[[Any, str], bool]


def without_settings(config: Any) -> None:
    """Let transformers take a config for that of a dense model."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


def outlined(loader: Any, config: Any, source: Source | None) -> nn.Module:
    """The model on the meta device with blank codes where the files have codes, or where they usually are."""
    settings = settings_of(config)
    without_settings(config)
    with torch.device("meta"):
        model: nn.Module = loader.from_config(config).eval()
    if source is not None:
        with_codes(model, source, named_alike(model, source))
    elif settings is not None:
        quantize(model, usual_format(settings))
    return model


def built(
    loader: Any, config: Any, source: Source, where: str, dtype: torch.dtype, head_seed: int, in_head: InHead | None
) -> tuple[Any, tuple[str, ...], list[str]]:
    """The model with its codes, the names of newly drawn modules, and notes.

    `in_head` tells which tensors may be new, None that none may. Errors, all at once: tensors that the files lack, that
    have another shape, codes that are damaged or that the model has no plain linear layer for.
    """
    without_settings(config)
    with torch.device("meta"):
        model = loader.from_config(config, dtype=dtype).eval()
    rename = named_alike(model, source)
    coded = with_codes(model, source, rename)
    problems: list[str] = []
    fixes: dict[str, None] = {}
    for path, theirs in coded.items():
        try:
            put(model.get_submodule(path), source.read(theirs))
        except UserError as error:
            problems.append(f"{theirs}: {error.message}")
            fixes.setdefault(error.fix or FIX)
    if problems:
        raise UserError(f"model {where}: {listing(problems, 5)}", fix="; ".join(list(fixes)[:3]))
    used = fill(model, source, rename, dtype)
    fill_all_buffers(model, loader, config)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    new = [name for name in left if in_head is not None and in_head(model, name)]
    if absent := [name for name in left if name not in new]:
        unused = sorted(source.names() - used)
        more = f"; {len(unused)} tensors of the file fit nowhere: {listing(unused, 5)}" if unused else ""
        raise UserError(
            f"model {where}: the weights lack {len(absent)} of the model's tensors, or have them in another shape: "
            f"{listing(absent, 5)}{more}",
            fix=FIX,
        )
    modules = tuple(sorted({name.rpartition(".")[0] for name in new}))
    draw(model, modules, head_seed)
    return model, modules, [*told(source, model, coded), *unused_notes(source, used, coded), *new_notes(new, head_seed)]


def named_alike(model: nn.Module, source: Source) -> Callable[[str], str]:
    """From a name of the model to that of the file, which may have the body's prefix more or less."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = source.names() | source.paths()
    own = [name for name, _ in model.named_parameters()]
    if prefix == "." or any(name in names for name in own if name.startswith(prefix)):
        return lambda name: name
    if any(name.startswith(prefix) for name in own):
        return lambda name: name.removeprefix(prefix)
    return lambda name: prefix + name


def with_codes(model: nn.Module, source: Source, rename: Callable[[str], str]) -> dict[str, str]:
    """Put blank codes into a model on the meta device; returns the paths of its coded layers, ours to the file's."""
    theirs, ours = source.paths(), [name for name, _ in model.named_modules()]
    coded = {path: rename(path) for path in ours if path and rename(path) in theirs}
    tied = tied_names(model)
    if shared := [path for path in coded if f"{path}.weight" in tied]:
        raise UserError(
            f"{listing(shared)} is in codes, but config.json ties its weight to another module's",
            fix="set tie_word_embeddings to false in config.json if the model has both, else get the unquantized model",
        )
    description = {}
    for path, name in coded.items():
        try:
            format, shape = source.format(name)
        except UserError as error:
            raise UserError(f"{name}: {error.message}", fix=error.fix) from None
        kind = str(next(model.parameters()).dtype).removeprefix("torch.")
        description[path] = {"format": to_json(format), "shape": list(shape), "dtype": kind}
    try:
        rebuild(model, description)
    except UserError as error:
        told = error.message.removeprefix("rebuild: ")
        raise UserError(f"its codes do not fit the model of its config.json: {told}", fix=FIX) from None
    return coded


def tied_names(model: nn.Module) -> set[str]:
    """Names of parameters that two modules or more hold."""
    owners: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(value), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def put(module: nn.Module, coded: Coded) -> None:
    """Fill a blank code, which takes the tensors as they are."""
    blank: Any = module._modules["code"]
    held = {name: coded.tensors[name] for name in blank.names}
    odd = [name for name, value in blank.tensors().items() if value.shape != held[name].shape]
    odd += [name for name, value in blank.tensors().items() if value.dtype != held[name].dtype]
    if odd:
        raise UserError(f"its {listing(odd)} are not of the size that {blank.format} has")
    module._modules["code"] = Code(blank.format, held, blank.shape, blank.dtype).eval()


def fill(model: nn.Module, source: Source, rename: Callable[[str], str], dtype: torch.dtype) -> set[str]:
    """Put every dense tensor of the file into its place; returns the file's names that were used."""
    used, names = set(), source.names()
    for path, module in model.named_modules():
        if isinstance(module, Code):
            continue
        for kind in (module._parameters, module._buffers):
            for key, old in list(kind.items()):
                name = rename(f"{path}.{key}" if path else key)
                if old is None or name not in names:
                    continue
                value = source.dense(name)
                if tuple(value.shape) != tuple(old.shape):
                    continue
                used.add(name)
                value = value.to(dtype) if value.is_floating_point() else value.clone()
                new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                kind[key] = new
    return used


def fill_all_buffers(model: nn.Module, loader: Any, config: Any) -> None:
    """Give modules the tensors that their configuration makes; if they cannot say, from a dense model made for it."""
    if fill_buffers(model):
        return
    with torch.random.fork_rng(devices=[]):
        whole = dict(loader.from_config(config).named_buffers())
    for path, module in hollow_buffers(model):
        for key, value in module._buffers.items():
            if value is not None and value.is_meta:
                module._buffers[key] = whole[f"{path}.{key}" if path else key]


def draw(model: Any, modules: Sequence[str], seed: int) -> None:
    """Draw the weights of new modules from a seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for path in modules:
            module = model.get_submodule(path)
            for key, value in list(module._parameters.items()):
                if value is not None and value.is_meta:
                    module._parameters[key] = nn.Parameter(torch.zeros(value.shape, dtype=value.dtype))
            model._init_weights(module)


def told(source: Source, model: nn.Module, coded: dict[str, str]) -> list[str]:
    """What the base is kept in."""
    kinds: dict[str, int] = {}
    for entry in describe(model).values():
        name = short(entry["format"])
        kinds[name] = kinds.get(name, 0) + 1
    formats = listing([f"{count} as {name}" for name, count in kinds.items()], 4)
    return [f"base: {source.kind}, the codes of {len(coded)} layers taken over as they are: {formats}", *source.notes()]


def short(format: dict[str, Any]) -> str:
    """A format in a few letters."""
    inner = format.get("inner") or format
    settings = [f"{key} {value}" for key, value in inner.items() if key in ("code_bits", "group_size", "block_size")]
    permuted = ", columns in another order" if format is not inner else ""
    doubled = ", scales in 8 bits" if inner.get("scale") else ""
    return f"{inner['storage']} ({', '.join(settings)}{doubled}{permuted})".replace("block_size None", "by row")


def unused_notes(source: Source, used: set[str], coded: dict[str, str]) -> Iterator[str]:
    """Tensors that nothing takes; a bias that is not zero is one that would be missed."""
    left = sorted(source.names() - used)
    biases = [name for name in left if name.endswith(".bias") and name.removesuffix(".bias") in coded.values()]
    if missed := [name for name in biases if bool(source.dense(name).any())]:
        raise UserError(f"the files have biases that the model of config.json has not: {listing(missed, 5)}", fix=FIX)
    left = [*(name for name in left if name not in biases), *sorted(source.paths() - set(coded.values()))]
    if left:
        yield f"{len(left)} tensors of the checkpoint are not used: {listing(left)}"


def new_notes(new: Sequence[str], seed: int) -> Iterator[str]:
    if new:
        yield f"newly initialized from head seed {seed}: {listing(sorted(new))}"
