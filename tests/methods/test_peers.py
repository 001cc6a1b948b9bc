"""The same tensors in PEFT give the same outputs and gradients, wherever both implement the same equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

RTOL = 1e-5


class Tiny(nn.Module):
    """One layer, with an embedding in front where the layer wants vectors of ids."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 31, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def twins(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """Two equal models, biases included."""
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        made.append(model)
    return made[0], made[1]


def moved(model: Any, scale: float = 0.1) -> dict[str, nn.Parameter]:
    """Our trained tensors, moved off their start."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in found.values():
            parameter.add_(scale * torch.randn_like(parameter))
    return found


def agree(found: Tensor, wanted: Tensor, what: str) -> None:
    assert found.shape == wanted.shape, what
    assert (found - wanted).abs().max() <= RTOL * wanted.abs().max().clamp(min=1e-6), what


def compare(
    ours: Any, theirs: Any, pairs: Mapping[Any, Any], run: Callable[[Any], Tensor], view: Callable[..., Tensor]
) -> None:
    """Copy our tensors into theirs, then compare outputs and gradients; `view` brings ours to the shape of theirs."""
    with torch.no_grad():
        for mine, other in pairs.items():
            other.copy_(view(mine, other))
    y, z = run(ours), run(theirs)
    agree(y, z, "outputs")
    y.square().mean().backward()
    z.square().mean().backward()
    for mine, other in pairs.items():
        agree(view(mine.grad, other), other.grad, f"gradient of {tuple(other.shape)}")


def as_theirs(mine: Tensor, other: Tensor) -> Tensor:
    return mine.reshape(other.shape)


LAYERS = {
    "linear": (lambda: Tiny(nn.Linear(24, 20)), lambda: torch.randn(3, 5, 24)),
    "embedding": (lambda: Tiny(nn.Embedding(31, 24)), lambda: torch.randint(0, 31, (3, 5))),
    "conv2d": (lambda: Tiny(nn.Conv2d(4, 20, 3, padding=1, stride=2)), lambda: torch.randn(3, 4, 7, 7)),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", LAYERS)
def test_lora_and_dora(name: str, dora: bool) -> None:
    make, draw = LAYERS[name]
    ours, theirs = twins(make)
    method = tt.DoRA(rank=4, alpha=12.0) if dora else tt.LoRA(rank=4, alpha=12.0)
    tt.attach(ours, method, "layer")
    moved(ours)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["layer"], use_dora=dora))
    delta = ours.layer.delta["default"]
    low = delta.inner if dora else delta
    layer = theirs.base_model.model.layer
    if name == "embedding":
        pairs = {low.A: layer.lora_embedding_A["default"], low.B: layer.lora_embedding_B["default"]}
    else:
        pairs = {low.A: layer.lora_A["default"].weight, low.B: layer.lora_B["default"].weight}
    if dora:
        pairs[delta.m] = layer.lora_magnitude_vector["default"].weight
    x = draw()
    compare(ours, theirs, pairs, lambda model: model(x), as_theirs)


def test_lora_on_conv1d() -> None:
    ours, theirs = twins(gpt2)
    tt.attach(ours, tt.LoRA(rank=4, alpha=12.0), "qkv, o, up")
    moved(ours)
    wanted = ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=wanted, fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs, config)
    pairs = {}
    for path, module in ours.named_modules():
        if "delta" in module._modules:
            layer = theirs.base_model.model.get_submodule(path)
            delta = module.delta["default"]
            pairs |= {delta.A: layer.lora_A["default"].weight, delta.B: layer.lora_B["default"].weight}
    assert len(pairs) == 12
    ids = torch.randint(0, 31, (2, 9))
    compare(ours, theirs, pairs, lambda model: model(ids).logits, as_theirs)


def test_ia3() -> None:
    ours, theirs = twins(llama)
    tt.attach(ours, tt.IA3())
    moved(ours)
    names = ["k_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.IA3Config(target_modules=names, feedforward_modules=["down_proj"]))
    pairs = {}
    for path, module in ours.named_modules():
        if "delta" in module._modules:
            delta = module.delta["default"]
            mine = delta.l_in if hasattr(delta, "l_in") else delta.l
            pairs[mine] = theirs.base_model.model.get_submodule(path).ia3_l["default"]
    assert len(pairs) == 6
    ids = torch.randint(0, 31, (2, 9))
    compare(ours, theirs, pairs, lambda model: model(ids).logits, as_theirs)


def test_ln_tuning() -> None:
    ours, theirs = twins(gpt2)
    frozen = dict(gpt2().named_parameters())
    tt.attach(ours, tt.LNTuning())
    moved(ours)
    theirs = peft.get_peft_model(theirs, peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]))
    pairs, base = {}, {}
    for path, module in ours.named_modules():
        if "delta" in module._modules:
            norm = theirs.base_model.model.get_submodule(path).ln_tuning_layers["default"]
            delta = module.delta["default"]
            for mine, name in ((delta.g, "weight"), (delta.d, "bias")):
                pairs[mine] = getattr(norm, name)
                base[id(mine)] = module._parameters[name]
    assert len(pairs) == 10
    assert len(frozen) > 10
    ids = torch.randint(0, 31, (2, 9))

    def shifted(mine: Tensor, other: Tensor) -> Tensor:
        """Ours are offsets; theirs are the values. Gradients are the same."""
        return mine.reshape(other.shape) + base.get(id(mine), 0.0)

    compare(ours, theirs, pairs, lambda model: model(ids).logits, shifted)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_prefix_tuning(make: Callable[[], nn.Module]) -> None:
    """Direct prefixes. PEFT hands over keys that are rotated already, so ours are rotated for it on Llama."""
    ours, theirs = twins(make)
    length = 5
    tt.attach(ours, tt.PrefixTuning(length=length, hidden=None))
    moved(ours, 0.5)
    theirs = peft.get_peft_model(theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    table = theirs.prompt_encoder["default"].embedding.weight
    deltas = [d for m in ours.modules() if "delta" in m._modules for d in m.delta.values()]
    if make is gpt2:
        order = [delta.P for delta in deltas]
        assert [delta.rows.start for delta in deltas] == [24, 48] * 2
    else:
        order = [rotated(ours, delta.P) if n % 2 == 0 else delta.P for n, delta in enumerate(deltas)]
    with torch.no_grad():
        table.copy_(torch.cat(order, 1))
    ids = torch.randint(0, 31, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    y, z = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs))
    agree(y, z, "outputs")
    y.square().mean().backward()
    z.square().mean().backward()
    mine = [delta.P.grad for delta in deltas]
    if make is llama:
        mine = [rotated(ours, grad) if n % 2 == 0 else grad for n, grad in enumerate(mine)]
    agree(torch.cat(mine, 1), table.grad, "gradient of the prefix")


def rotated(model: Any, P: Tensor) -> Tensor:
    """Rows of P turned by their positions; a rotation, so gradients turn alike."""
    heads = P.unflatten(1, (-1, 6))
    cos, sin = model.model.rotary_emb(P, torch.arange(len(P))[None])
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
    return (heads * cos[0][:, None] + turned * sin[0][:, None]).flatten(1)
