"""The bottleneck family beyond the laws: published counts, where the stream is read, dropping and pruning, gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import trimtab as tt
from trimtab import laws
from trimtab.core.delta import Delta
from trimtab.core.site import RawBase, Site
from trimtab.data.encoded import Encoded
from trimtab.data.packing import pack
from trimtab.engine.attention import can_pack, segments_in
from trimtab.engine.loss import loss_sum

SIZES = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "pad_token_id": 0}


def llama(layers: int = 3) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def moved(model: Any, scale: float = 0.2) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def deltas(model: nn.Module) -> dict[str, Delta]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Delta)}


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 31, (rows, length), generator=torch.Generator().manual_seed(5))


# ------------------------------------------------------------------------------------------------ settings and sizes


@pytest.mark.parametrize(
    "method, width, sites, expected",
    [
        (tt.Houlsby(bottleneck=64), 768, 24, 2_379_264),
        (tt.Parallel(bottleneck=512), 1024, 24, 25_202_688),
        (tt.Pfeiffer(bottleneck=48), 768, 12, 12 * (2 * 768 * 48 + 48 + 768)),
        (tt.Lin(bottleneck=100), 768, 12, 12 * (2 * 768 * 100 + 100 + 3 * 768)),
        (tt.Compacter(), 768, 48, 114_112),
        (tt.Compacter(), 768, 24, 104_704 - 47_616),
        (tt.MultiHeadParallel(length=30), 1024, 36, 2_211_840),
    ],
)
def test_counts_at_the_sizes_of_a_real_model(method: Any, width: int, sites: int, expected: int) -> None:
    """BERT-base, BART-large and T5-base; Compacter's published counts have 47,616 layer norm values in them."""
    base = RawBase(torch.empty(width, width, device="meta"))
    found = [Site(f"{at}", base, "linear", features=width) for at in range(sites)]
    assert sum(method.count(site) for site in found) + method.count_shared(found) == expected


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: tt.Parallel(scale=0.0), "scale=0.0"),
        (lambda: tt.Compacter(bottleneck=6), "bottleneck=6, blocks=4"),
        (lambda: tt.attach(llama(), tt.Compacter(bottleneck=10, blocks=10)), "24 wide"),
        (lambda: tt.AdapterDrop(inner=tt.LoRA()), "LoRA does not edit activations"),
        (lambda: tt.AdapterDrop(most=-1), "most=-1"),
        (lambda: tt.Gated(inner=tt.PrefixTuning()), "gives all tokens the same"),
        (lambda: tt.Gated(inner=tt.LoRA(start=tt.PiSSA())), "starts inside W"),
    ],
)
def test_what_a_user_can_get_wrong(make: Any, said: str) -> None:
    with pytest.raises(tt.UserError, match=said):
        make()


# ------------------------------------------------------------------------------------- what is read beside the input


def test_pfeiffer_runs_the_norm_of_a_post_norm_model_twice() -> None:
    torch.manual_seed(2)
    model = BertModel(BertConfig(**SIZES, num_hidden_layers=2)).eval()
    moved(tt.attach(model, tt.Pfeiffer(bottleneck=5)))
    assert [name.split(".delta")[0] for name in deltas(model)] == [
        f"encoder.layer.{n}.output.LayerNorm" for n in (0, 1)
    ]
    norm, delta = model.encoder.layer[1].output.LayerNorm, list(deltas(model).values())[1]
    seen: list[Any] = []
    norm.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    model(ids())
    (s, y) = seen[0]
    assert len(seen) == 1
    frozen = BertModel(BertConfig(**SIZES, num_hidden_layers=2)).eval().encoder.layer[1].output.LayerNorm
    frozen.load_state_dict({"weight": norm._parameters["weight"], "bias": norm._parameters["bias"]})
    change = torch.relu(frozen(s) @ delta.D.T + delta.d) @ delta.U.T + delta.u
    torch.testing.assert_close(y, frozen(s + change), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(y, frozen(s) + change, atol=1e-2)


def test_heads_of_the_parallel_adapter_read_queries_before_their_rotation() -> None:
    model = moved(tt.attach(llama(1), tt.MultiHeadParallel(length=3)))
    attention = model.model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    attention.q_proj.register_forward_hook(lambda module, args, out: seen.__setitem__("q", out))
    attention.o_proj.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    model(ids())
    p, W = attention.o_proj.delta["default"], attention.o_proj._parameters["weight"]
    assert p.K.shape == (4, 3, 6)
    heads = [
        seen["x"][..., 6 * i : 6 * i + 6] + torch.relu(seen["q"][..., 6 * i : 6 * i + 6] @ p.K[i].T) @ p.V[i]
        for i in range(4)
    ]
    torch.testing.assert_close(seen["y"], torch.cat(heads, -1) @ W.T, rtol=1e-4, atol=1e-5)
    assert not attention.o_proj.delta.heard


@pytest.mark.parametrize(
    "method", [tt.Parallel(bottleneck=5), tt.MultiHeadParallel(length=3)], ids=["parallel", "heads"]
)
def test_generating_with_a_cache_and_beams(method: Any) -> None:
    model = moved(tt.attach(llama(), method), 0.1)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        cached, plain = (model.generate(ids(), use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_a_source_is_no_longer_listened_to_when_its_last_reader_is_gone() -> None:
    model = llama()
    norm = model.model.layers[0].post_attention_layernorm
    tt.attach(model, tt.Parallel(bottleneck=3), name="one")
    tt.attach(model, tt.Parallel(bottleneck=3), name="two")
    assert len(norm._forward_pre_hooks) == 1
    tt.detach(model, "one")
    assert len(norm._forward_pre_hooks) == 1
    tt.detach(model, "two")
    assert not norm._forward_pre_hooks


def test_a_norm_that_runs_behind_its_sub_layer_is_refused_when_it_runs() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj, self.mlp_norm = nn.Linear(24, 40), nn.Linear(40, 24), nn.LayerNorm(24)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp_norm(x + self.down_proj(torch.relu(self.up_proj(x))))

    model = nn.Sequential(Block(), Block())
    tt.attach(model, tt.Parallel(bottleneck=3))
    with pytest.raises(tt.UserError, match="stream did not pass by"):
        model(torch.randn(2, 5, 24))


# --------------------------------------------------------------------------------------------------------- AdapterDrop


def stepped(model: Any, step: int) -> list[bool]:
    """After the step's `on_step`: which of the model's layers are dropped."""
    for delta in deltas(model).values():
        delta.method.on_step(delta, step)
    return [bool(delta.dropped) for delta in deltas(model).values()]


def test_dropped_adapters_do_not_run_and_every_number_of_layers_is_drawn() -> None:
    model = moved(tt.attach(llama(), tt.AdapterDrop(inner=tt.Houlsby(bottleneck=3)), "ffn")).train()
    counted: list[int] = []
    plain = tt.Houlsby.forward

    def counting(self: Any, x: Tensor, base: Any, p: Any) -> Tensor:
        counted[-1] += 1
        return plain(self, x, base, p)

    drawn = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tt.Houlsby, "forward", counting)
        for step in range(1, 30):
            dropped = stepped(model, step)
            n = sum(dropped)
            assert dropped == [True] * n + [False] * (3 - n)
            drawn.add(n)
            counted.append(0)
            model.zero_grad()
            model(ids()).logits.square().mean().backward()
            assert counted[-1] == 3 - n
            got = [delta.inner.U.grad is not None for delta in deltas(model).values()]
            assert got == [not one for one in dropped]
        counted.append(0)
        model.eval()(ids())
        assert counted[-1] == 3
    assert drawn == {0, 1, 2}


def test_what_is_dropped_follows_from_seed_and_step() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = tt.attach(llama(), tt.AdapterDrop(), "ffn", seed=seed)
        runs.append([sum(stepped(model, step)) for step in range(1, 25)])
    assert runs[0] == runs[1] != runs[2]
    assert sum(stepped(model, 7)) == runs[2][6]


def test_a_dropped_layer_stays_dropped_after_loading(tmp_path: Any) -> None:
    model = tt.attach(llama(), tt.AdapterDrop(), "ffn")
    step = next(step for step in range(1, 30) if sum(stepped(model, step)) == 2)
    tt.save(model, tmp_path)
    again = tt.load(llama(), tmp_path)
    assert [bool(delta.dropped) for delta in deltas(again).values()] == [True, True, False]
    assert stepped(again, step + 1) == stepped(model, step + 1)


def test_compiled_once_it_follows_what_is_dropped() -> None:
    case = laws.Case(tt.AdapterDrop(inner=tt.Houlsby(bottleneck=3)), laws.zoo()[0])
    model, inputs = case.attached().train(), case.inputs()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    outputs = []
    for dropped in (0, 1, 0):
        model.layer.delta["default"].dropped.fill_(dropped)
        outputs.append(compiled(**inputs))
        torch.testing.assert_close(outputs[-1], model(**inputs))
    assert not torch.allclose(outputs[0], outputs[1])


def test_pruning_takes_the_lowest_layers_off_for_good(tmp_path: Any) -> None:
    model = moved(tt.attach(llama(), tt.AdapterDrop(inner=tt.Houlsby(bottleneck=3))))
    with torch.no_grad():
        for name, delta in deltas(model).items():
            delta.dropped.fill_("layers.2" not in name)
        wanted = model.train()(ids()).logits
        model.eval()
        assert not torch.allclose(model(ids()).logits, wanted)
        tt.detach(model, where="attn@:2, ffn@:2")
        assert len(deltas(model)) == 2
        assert torch.equal(model(ids()).logits, wanted)
        tt.save(model, tmp_path)
        assert torch.equal(tt.load(llama(), tmp_path)(ids()).logits, wanted)
    with pytest.raises(tt.UserError, match="names no site"):
        tt.detach(model, where="ffn@0")
    tt.detach(model, where="attn, ffn")
    assert not deltas(model)
    assert "_trimtab" not in vars(model)


def test_pruning_one_part_of_several() -> None:
    model = tt.attach(llama(), tt.MAM(length=2, bottleneck=3))
    with pytest.raises(tt.UserError, match="virtual tokens"):
        tt.detach(model, where="k@0")
    tt.detach(model, where="ffn@0")
    assert sum("mlp" in name for name in deltas(model)) == 2
    tt.detach(model, where="ffn")
    assert {name.split(".")[-3] for name in deltas(model)} == {"k_proj", "v_proj"}
    model(ids())


# -------------------------------------------------------------------------------------------------- gates and presets


@pytest.mark.parametrize("inner", [tt.LoRA(rank=2), tt.Pfeiffer(bottleneck=3), tt.LoReFT(rank=2)], ids=repr)
def test_an_open_gate_is_the_inner_method_and_a_shut_one_nothing(inner: Any) -> None:
    frozen, alone, gated = llama(), tt.attach(llama(), inner), tt.attach(llama(), tt.Gated(inner=inner))
    for one, other in zip(deltas(moved(alone)).values(), deltas(gated).values(), strict=True):
        other.inner.load_state_dict(one.state_dict())
    with torch.no_grad():
        for c, wanted in ((60.0, alone), (-200.0, frozen)):
            for delta in deltas(gated).values():
                delta.c.fill_(c)
            torch.testing.assert_close(gated(ids()).logits, wanted(ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_gate_sees_its_own_token_only() -> None:
    model = moved(tt.attach(llama(), tt.Gated(inner=tt.LoRA(rank=2)), "q, v"))
    text = ids()
    with torch.no_grad():
        whole = model(text).logits
        torch.testing.assert_close(model(text[:, :4]).logits, whole[:, :4], rtol=1e-4, atol=1e-5)


PRESETS = {"mam": tt.MAM(length=2, bottleneck=3), "unipelt": tt.UniPELT(rank=2), "compacter++": tt.CompacterPlusPlus()}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_on_an_encoder_with_a_decoder(name: str) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=31, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4))
    moved(tt.attach(model.eval(), PRESETS[name]))
    model(input_ids=ids(), decoder_input_ids=ids(2, 4)).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# -------------------------------------------------------------------------------------------------------- packed rows


@pytest.mark.parametrize(
    "method",
    [
        tt.Parallel(bottleneck=4),
        tt.MultiHeadParallel(length=3),
        tt.Pfeiffer(bottleneck=4),
        tt.Compacter(bottleneck=8),
        tt.Gated(inner=tt.LoRA(rank=2)),
        tt.AdapterDrop(inner=tt.Lin(bottleneck=4)),
    ],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize("share", [None, 4])
def test_packed_gradients_equal_those_of_rows_alone(method: Any, share: int | None) -> None:
    model = moved(tt.attach(llama(2), method))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = ids(1, 8)[0].tolist()
    rows = [Encoded(common + ids(1, 3 + n)[0].tolist(), [False] * 8 + [True] * (3 + n), row=n) for n in range(4)]
    assert can_pack(model, 64)
    alone = [loss_sum(model, pack([row]), "causal")[0] for row in rows]
    wanted = torch.autograd.grad(sum(alone), trained)
    with segments_in(model):
        loss, _ = loss_sum(model, pack(rows, share), "causal")
        found = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(loss, sum(alone), rtol=1e-5, atol=0)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * scale
