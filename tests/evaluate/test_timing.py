"""Timing in turns: intervals, what is shared, what every way computes."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from tests.engine.test_packing import llama

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.core.method import Placed
from trimtab.core.quantized import quantized_modules
from trimtab.evaluate import timing


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (15, (4, 12)), (25, (8, 18))])
def test_the_interval_is_that_of_the_sign_test(n: int, ranks: tuple[int, int]) -> None:
    values = [float(one) for one in torch.randperm(n) + 1]
    assert timing.interval(values) == ranks
    outside = 2 * sum(math.comb(n, k) for k in range(ranks[0])) / 2**n
    wider = 2 * sum(math.comb(n, k) for k in range(ranks[0] + 1)) / 2**n
    assert outside <= 0.05 < wider


def test_ways_take_turns_and_ratios_are_within_a_round() -> None:
    seen: list[str] = []

    def way(name: str, seconds: float) -> Any:
        return lambda: (seen.append(name), time.sleep(seconds))

    found = timing.in_turns(
        {"a": way("a", 0.002), "b": way("b", 0.008)}, 6, before={"b": lambda: (seen.append("-"), time.sleep(0.02))}
    )
    assert seen == ["a", "-", "b", "-", "b", "a"] * 3 + ["a", "-", "b"]  # rounds begin with each in turn
    assert found[0].ratio == found[0].low == found[0].high == 1
    assert 1.5 < found[1].ratio < 6
    assert found[1].low <= found[1].ratio <= found[1].high
    with pytest.raises(UserError, match="measure nothing"):
        timing.in_turns({"a": print}, 0)


def test_copies_share_weights_and_leave_the_model_alone() -> None:
    model = llama()
    ids = timing.tokens(model, 2, 5)
    before = timing.forward_of(model.eval(), ids)()
    copy = tt.attach(timing.sharing(model), tt.LoRA(rank=2))
    with torch.no_grad():
        for name, one in copy.named_parameters():
            if name.endswith(".B"):
                one.fill_(0.1)
    assert not any("delta" in name for name, _ in model.named_modules())
    assert torch.equal(timing.forward_of(model, ids)(), before)
    assert not torch.allclose(timing.forward_of(copy, ids)(), before)
    own = {one.data_ptr() for one in model.parameters()}
    assert own <= {one.data_ptr() for one in copy.parameters()}


@pytest.mark.parametrize("job", timing.JOBS)
def test_latency_times_every_method_at_every_size(job: str) -> None:
    methods = {"lora": [Placed(tt.LoRA(rank=2), None)], "houlsby": [Placed(tt.Houlsby(bottleneck=2), None)]}
    cells = timing.latency(llama(), methods, batches=[1, 2], lengths=[4], rounds=2, job=job)
    assert [(one.batch, one.length) for one in cells] == [(1, 4), (2, 4)]
    for cell in cells:
        assert [one.name for one in cell.timed] == ["base", "lora", "houlsby"]
        assert all(one.seconds > 0 for one in cell.timed)
    with pytest.raises(UserError, match="no job"):
        timing.latency(llama(), methods, batches=[1], lengths=[4], job="backward")


def test_a_format_is_that_of_its_method_alone() -> None:
    model = llama().eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    part = [Placed(tt.LoRA(rank=2), "all-linear")]
    made = timing.prepared(model, part, tt.NF4())
    assert len(list(quantized_modules(made))) == 7 * len(model.model.layers)
    assert not list(quantized_modules(model))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    ids = timing.tokens(model, 2, 4)
    with torch.no_grad():
        assert torch.equal(timing.prepared(model, part, None)(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.equal(made(input_ids=ids).logits, model(input_ids=ids).logits)
    started = timing.prepared(model, [Placed(tt.LoRA(rank=2, start=tt.LoftQ()), "all-linear")], tt.NF4())
    assert len(list(quantized_modules(started))) == 7 * len(model.model.layers)


def test_rows_that_are_too_long_are_refused_with_the_longest_that_fits() -> None:
    model = llama()
    model.config.max_position_embeddings = 16
    prompt = {"prompt_tuning": [Placed(tt.PromptTuning(length=5), None)]}
    timing.check(model, "forward", 16, {"base": []})
    timing.check(model, "step", 10, prompt)
    for job, length, methods, fits in (
        ("forward", 17, {"base": []}, 16), ("step", 16, {"base": []}, 15), ("step", 11, prompt, 10)
    ):  # fmt: skip
        with pytest.raises(UserError, match="too long") as problem:
            timing.check(model, job, length, methods)
        assert problem.value.fix == f"--length {fits}"
    with pytest.raises(UserError, match="cannot differ"):
        timing.mixed(model, [Placed(tt.LoRA(rank=2), None)], rows=1, length=4)


def test_the_next_token_is_that_of_the_whole_row() -> None:
    model = llama().eval()
    ids = timing.tokens(model, 2, 6)
    with torch.no_grad():
        step = timing.step_of(model, ids)
        first, again = step(), step()
        whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert torch.equal(first, again)
    assert torch.allclose(first, whole, atol=1e-5)


def test_switching_and_mixed_batches() -> None:
    parts = [Placed(tt.LoRA(rank=2), None)]
    model = llama()
    found = timing.switching(model, parts, adapters=3, rounds=2)
    assert [one.name for one in found.timed] == ["loaded already", "from disk"]
    assert found.saved_bytes > 4 * 2 * 32
    timed = timing.mixed(model, parts, rows=3, length=4, rounds=2)
    assert [one.name for one in timed] == ["one for all", "one for each", "none"]
    assert not any("delta" in name for name, _ in model.named_modules())
