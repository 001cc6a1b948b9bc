"""Virtual tokens in PEFT's format: prompts, prefixes as cached keys and values, and LLaMA-Adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.places import Place, places
from trimtab.core.registry import find
from trimtab.core.select import select
from trimtab.core.stack import stack_of
from trimtab.interop.peft.row import Tensors, refuse
from trimtab.interop.saved import Draft, SavedPart

HALVES = (
    *("llama", "mistral", "ministral", "qwen2", "gemma", "granite", "olmo", "seed_oss", "arcee", "phi3"),
    *("mixtral", "qwen2_moe", "gpt_neox"),
)
"""Model types whose rotary positions turn the first half of a head against the second, with no norm on keys."""


def front(model: nn.Module, place: Place) -> bool:
    """Whether virtual tokens at a place come before the text, as PEFT's always do."""
    stack = stack_of(model, place.module)
    return stack is not None and stack.front


def embeddings(model: nn.Module) -> list[Place]:
    """The input embeddings, encoder first."""
    try:
        found = select(model, "embed", kinds=("embedding",))
    except UserError:
        found = []
    if not found:
        raise refuse("prompt tuning", f"the input embedding of {type(model).__name__} is not known here")
    behind = [place.name for place in found if not front(model, place)]
    if behind:
        raise refuse(
            f"prompt tuning of {type(model).__name__}",
            "PEFT puts virtual tokens before the first token, where this model's pooling and positions start; here "
            "they stand behind the text",
        )
    return found


def refuse_encoder(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise refuse(
            f"prompt tuning of {type(model).__name__}",
            "PEFT lets the decoder attend to what the encoder makes of the prompt; here these positions are taken off",
        )


def read_prompt(model: nn.Module, config: Mapping[str, Any], prompt: Tensor) -> list[Draft]:
    """Prompt tuning and P-tuning, whose network is baked into the file."""
    refuse_encoder(model)
    length = int(config["num_virtual_tokens"])
    place = embeddings(model)[0]
    if prompt.shape[0] != length:
        raise refuse(f"prompt_embeddings {tuple(prompt.shape)}", f"they are no {length} tokens")
    method = find("prompt_tuning")(length=length, start="random", among=max(5000, length))
    return [Draft(place, method, {"P": prompt})]


def write_prompt(model: nn.Module, part: SavedPart) -> tuple[dict[str, Any], Tensors]:
    refuse_encoder(model)
    embeddings(model)
    prompt = part.sites[0].tensors["P"]
    sizes = {"num_virtual_tokens": part.method.length, "token_dim": prompt.shape[1], "num_transformer_submodules": 1}
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    depth = {"num_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads}
    return sizes | depth | {"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": prompt}


def layers_of(model: nn.Module, *, cached: bool = True) -> list[tuple[Place, Place]]:
    """k and v of every layer, in order; `cached` where they have to be ones of a cache."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise refuse("prefix tuning of an encoder-decoder", "PEFT hands one prefix to self- and cross-attention alike")
    found: dict[int, dict[str, Place]] = {}
    for place in places(model):
        if place.role in ("k", "v") and place.layer is not None and place.kind == "linear":
            found.setdefault(place.layer, {})[place.role] = place
    if not found or any(len(pair) != 2 for pair in found.values()):
        raise refuse("prefix tuning", f"k and v of {type(model).__name__} are not known here")
    if cached and not all(front(model, pair["k"]) for pair in found.values()):
        raise refuse(
            f"prefix tuning of {type(model).__name__}", "PEFT's prefix is a cache of keys and values, which it has none"
        )
    return [(found[layer]["k"], found[layer]["v"]) for layer in sorted(found)]


def rotation(model: nn.Module, length: int) -> tuple[Tensor, Tensor] | None:
    """cos and sin (length, size) of the first positions, or None where keys are not rotated."""
    config: Any = model.config
    text = config.get_text_config()
    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        return None
    if text.model_type not in HALVES:
        raise refuse(
            f"prefix tuning of {text.model_type}",
            "PEFT keeps keys as its attention made them, in an order unknown here",
        )
    made: Any = type(rotary)(config=text)
    cos, sin = made(torch.zeros(1, 1), torch.arange(length)[None])
    return cos[0].float(), sin[0].float()


def turned(P: Tensor, heads: int, turn: tuple[Tensor, Tensor] | None, *, back: bool) -> Tensor:
    """Keys (length, heads·size) rotated by their positions, or back."""
    if turn is None:
        return P
    cos, sin = turn[0][:, None], turn[1][:, None]
    size = cos.shape[-1]
    whole = P.unflatten(-1, (heads, -1))
    x, rest = whole[..., :size], whole[..., size:]
    first, second = x.chunk(2, -1)
    across = torch.cat([second, -first] if back else [-second, first], -1)
    scale = (cos.square() + sin.square()) if back else 1.0
    return torch.cat([(x * cos + across * sin) / scale, rest], -1).flatten(-2)


def read_prefix(model: nn.Module, config: Mapping[str, Any], prompt: Tensor) -> list[Draft]:
    """A row of the file holds K and V of every layer as the cache has them: keys rotated already."""
    length, pairs = int(config["num_virtual_tokens"]), layers_of(model)
    heads = int(config.get("num_attention_heads") or 1)
    if prompt.shape[0] != length or prompt.shape[1] % (2 * len(pairs)):
        raise refuse(f"prompt_embeddings {tuple(prompt.shape)}", f"they are no keys and values of {len(pairs)} layers")
    cache = prompt.unflatten(1, (2 * len(pairs), -1))
    turn = rotation(model, length)
    method = find("prefix_tuning")(length=length, hidden=None)
    drafts = []
    for index, (k, v) in enumerate(pairs):
        key = turned(cache[:, 2 * index].float(), heads, turn, back=True).to(cache.dtype)
        drafts += [Draft(k, method, {"P": key}), Draft(v, method, {"P": cache[:, 2 * index + 1]})]
    return drafts


def write_prefix(model: nn.Module, part: SavedPart) -> tuple[dict[str, Any], Tensors]:
    pairs = layers_of(model)
    held = {site.place.name: site.tensors["P"] for site in part.sites}
    wanted = [place.name for pair in pairs for place in pair]
    if set(held) != set(wanted):
        raise refuse("a prefix at some layers", "PEFT's prefix has keys and values for every layer")
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    turn = rotation(model, part.method.length)
    flat = []
    for k, v in pairs:
        P = held[k.name]
        flat += [turned(P.float(), heads, turn, back=False).to(P.dtype), held[v.name]]
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": part.method.length,
        "num_layers": len(pairs),
        "num_attention_heads": heads,
        "token_dim": flat[0].shape[1],
        "num_transformer_submodules": 1,
        "encoder_hidden_size": flat[0].shape[1],
        "prefix_projection": False,
    }
    return config, {"prompt_embeddings": torch.cat(flat, 1)}


def read_adaption(model: nn.Module, found: Mapping[str, Tensors]) -> list[Draft]:
    """PEFT has one gate a layer and no tanh, so g = artanh(gate) at every head."""
    refuse_gpt2(model)
    known = {place.module: place for place in places(model) if place.kind == "attention"}
    drafts = []
    for path, tensors in found.items():
        gate, prompt = tensors["adaption_gate"].float(), tensors["adaption_prompt"][0]
        if path not in known:
            raise refuse(f"ADAPTION_PROMPT at {path}", "it is no attention that is known here")
        if float(gate.abs()) >= 1:
            raise refuse(f"ADAPTION_PROMPT at {path}", f"its gate is {float(gate):.3g}; here a gate is a tanh, below 1")
        heads = heads_at(model, path)
        method = find("llama_adapter")(length=prompt.shape[0])
        drafts.append(Draft(known[path], method, {"P": prompt, "g": torch.atanh(gate).expand(heads).clone()}))
    return drafts


def refuse_gpt2(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "model_type", None) == "gpt2":
        raise refuse("ADAPTION_PROMPT of GPT-2", "PEFT adds the prompt's part behind the output projection there")


def heads_at(model: nn.Module, path: str) -> int:
    """Query heads of an attention module."""
    from trimtab.core.attention import heads_of

    return heads_of(model.get_submodule(path))


def write_adaption(model: nn.Module, part: SavedPart) -> tuple[dict[str, Any], dict[str, Tensors]]:
    refuse_gpt2(model)
    known = [place.module for place in places(model) if place.kind == "attention"]
    paths = [site.place.module for site in part.sites]
    if paths != known[len(known) - len(paths) :]:
        raise refuse("LLaMAAdapter", "PEFT has it in the top layers, all of them from some layer on")
    tensors: dict[str, Tensors] = {}
    for site in part.sites:
        g = site.tensors["g"]
        if not torch.equal(g, g[:1].expand_as(g)):
            raise refuse(f"LLaMAAdapter at {site.place.name}", "PEFT has one gate for all heads, and these differ")
        tensors[site.place.module] = {"adaption_prompt": site.tensors["P"][None], "adaption_gate": torch.tanh(g[:1])}
    names = {path.rpartition(".")[2] for path in paths}
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": part.method.length,
        "adapter_layers": len(paths),
        "target_modules": names.pop(),
    }
    return config, tensors


def only(parts: Sequence[SavedPart], what: str) -> SavedPart:
    """The single part of a kind that PEFT can hold once."""
    if len(parts) != 1:
        raise refuse(what, f"a PEFT adapter holds one, and here are {len(parts)}")
    return parts[0]
