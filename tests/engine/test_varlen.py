"""A pack in one call of a kernel for rows of varying length: the kernel's definition stands in for it on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.test_packing import VIRTUAL, agree, alone, gpt2, llama, qwen, rows_with_common_beginnings
from torch import Tensor

import trimtab as tt
from trimtab.data.packing import Segment, pack
from trimtab.engine import attention, varlen
from trimtab.engine.attention import segments_in
from trimtab.engine.loss import loss_sum

MODELS = {"llama": llama, "qwen": qwen, "gpt2": gpt2}


class Kernel:
    """`torch.nn.attention.varlen.varlen_attn` by its documentation, row by row in plain softmax."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        self.calls += 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert window_size == (-1, 0)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert query.is_contiguous()
        assert key.is_contiguous()
        outputs = []
        for row in range(len(cu_seq_q) - 1):
            q = query[cu_seq_q[row] : cu_seq_q[row + 1]].transpose(0, 1)
            k, v = (one[cu_seq_k[row] : cu_seq_k[row + 1]].transpose(0, 1) for one in (key, value))
            assert q.shape[1] <= max_q
            assert k.shape[1] <= max_k
            k, v = (one.repeat_interleave(len(q) // len(one), 0) for one in (k, v))
            scores = q @ k.mT * (q.shape[2] ** -0.5 if scale is None else scale)
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outputs)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(attention, "in_one_call", lambda query: True)
    monkeypatch.setattr(varlen, "kernel", lambda: made)
    return made


@pytest.mark.parametrize("method", ["lora", "prefix", "llama_adapter"])
@pytest.mark.parametrize("share", [None, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_those_of_rows_alone(name: str, share: int | None, method: str, kernel: Kernel) -> None:
    torch.manual_seed(0)
    model: Any = tt.attach(MODELS[name]().eval(), VIRTUAL.get(method, tt.LoRA(rank=4)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = rows_with_common_beginnings()
    expected = alone(model, rows)
    wanted = torch.autograd.grad(expected, trained)
    assert not kernel.calls
    with segments_in(model):
        loss, _ = loss_sum(model, pack(rows, share), "causal")
        found = torch.autograd.grad(loss, trained)
    assert kernel.calls == model.config.num_hidden_layers
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    agree(found, wanted)


def test_it_can_be_switched_off(kernel: Kernel) -> None:
    model = llama().eval()
    with segments_in(model, varlen=False):
        loss_sum(model, pack(rows_with_common_beginnings()), "causal")
    assert not kernel.calls


def test_keys_are_those_of_ancestors_then_a_segments_own() -> None:
    at = varlen.layout((Segment(0, 3), Segment(3, 5, (0,)), Segment(5, 6, (0, 1)), Segment(6, 8)), torch.device("cpu"))
    assert at.sources.tolist() == [0, 1, 2, *[0, 1, 2, 3, 4], *[0, 1, 2, 3, 4, 5], *[6, 7]]
    assert at.starts.tolist() == [0, 3, 5, 6, 8]
    assert at.key_starts.tolist() == [0, 3, 8, 14, 16]
    assert (at.longest, at.longest_keys) == (3, 6)


def test_nothing_goes_that_way_on_a_cpu_or_in_float32() -> None:
    assert not varlen.in_one_call(torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16))
    assert not varlen.in_one_call(torch.zeros(1, 2, 4, 8))


class OnGPU:
    """What `in_one_call` asks of queries, as if they were on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.shape = dtype, (1, 2, 4, width)


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "fits"),
    [
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 256, (9, 0), True),
        (torch.float32, 64, (8, 0), False),
        (torch.bfloat16, 68, (8, 0), False),
        (torch.bfloat16, 264, (8, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
    ],
)
def test_which_gpus_and_shapes(
    dtype: torch.dtype, width: int, capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(varlen, "kernel", lambda: F.scaled_dot_product_attention)
    assert varlen.in_one_call(OnGPU(dtype, width)) is fits  # type: ignore[arg-type]
    monkeypatch.setattr(varlen, "kernel", lambda: None)
    assert not varlen.in_one_call(OnGPU(dtype, width))  # type: ignore[arg-type]


def test_torchs_function_takes_what_it_is_given() -> None:
    found = varlen.kernel()
    if found is None:
        pytest.skip("this torch has no varlen attention, or an older one")
    assert found.__name__ == "varlen_attn"
