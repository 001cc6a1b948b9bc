"""A longer context and shifted attention, from a recipe to a run that is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, tokenizer, write_rows

from trimtab import presets
from trimtab.core.errors import UserError
from trimtab.engine.attention import NAME
from trimtab.engine.shifted_attention import group_for
from trimtab.evaluate.loss import evaluate
from trimtab.models.context import lengthen
from trimtab.models.loading import load
from trimtab.train.prepare import prepare
from trimtab.train.recipe import build_method, recipe_from, with_preset
from trimtab.train.reporter import Reporter
from trimtab.train.run import tune
from trimtab.train.rundir import open_run

OWN, LONG = 32, 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "short", chat=False, positions=OWN)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [{"text": " ".join(WORDS[(row + at) % len(WORDS)] for at in range(40 + row))} for row in range(20)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", texts)


def recipe(model: Path, rows: Path, **values: Any) -> Any:
    given = {"model": str(model), "data": str(rows), "method": "longlora", "context": LONG, "heldout": "4"}
    return recipe_from(
        given | {"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "equal_rates": True, "device": "cpu"} | values
    )


def test_a_run_from_file_to_a_longer_context(model: Path, rows: Path, tmp_path: Path) -> None:
    result = tune(recipe(model, rows, group=16, steps=24, output=str(tmp_path / "run")))
    assert (result.record["group"], result.record["packing"]) == (16, "plain")
    assert result.record["model"]["context"] == LONG
    assert result.after["loss"] < 0.95 * result.before["loss"]
    run = open_run(tmp_path / "run")
    assert (run.recipe.attention, run.recipe.group, run.recipe.context) == ("shifted", 16, LONG)
    again, words = run.load("cpu")
    assert again.config.rope_parameters["factor"] == 3.0
    assert again.config.max_position_embeddings == words.model_max_length == LONG
    assert not again.config._attn_implementation.startswith("trimtab")
    job = prepare(recipe(model, rows, output=str(tmp_path / "other")), Reporter())
    measured = evaluate(again, job.heldout_rows, "causal", words.pad_token_id)
    assert measured["loss"] == pytest.approx(result.after["loss"], rel=1e-5), "measured in whole attention and after"


def test_training_is_in_groups_and_measuring_is_not(model: Path, rows: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Noting(Reporter):
        def note(self, text: str) -> None:
            told.append(text)

    job = prepare(recipe(model, rows, output=str(tmp_path / "run")), Noting())
    longest = max(len(row.ids) for row in (*job.train_rows, *job.heldout_rows))
    assert job.group == group_for(longest) < longest / 3
    assert f"the longest row has {longest} tokens: such short groups cost quality (--attention full)" in told
    name = f"trimtab_shifted_{job.group}"
    seen: list[tuple[str, bool]] = []
    block = job.model.model.layers[0].self_attn
    block.register_forward_pre_hook(lambda m, args: seen.append((m.config._attn_implementation, m.training)))
    with job.running():
        job.measure()
        job.model.train()
        job.model(torch.tensor([[1, 2, 3]]))
    assert set(seen) == {(name, False), (name, True)}
    assert job.model.config._attn_implementation not in (name, NAME)


def test_a_preset_fills_in_what_the_recipe_leaves_open(model: Path, rows: Path) -> None:
    made = presets.LongLoRA(rank=2, group=64)
    assert [part.where for part in made] == ["q, k, v, o", "embed", "norm"]
    open_recipe = recipe(model, rows)
    assert (with_preset(open_recipe, made).attention, with_preset(open_recipe, made).group) == ("shifted", 64)
    own = recipe(model, rows, attention="full", group=8)
    assert (with_preset(own, made).attention, with_preset(own, made).group) == ("full", 8)
    other = with_preset(recipe(model, rows, optimizer="lion"), presets.FullQGaLore())
    assert (other.optimizer, other.optimizer_settings, other.clip) == ("lion", {}, 0.0)
    whole = with_preset(open_recipe, presets.FullQGaLore(rank=3))
    assert whole.optimizer == "in_backward"
    assert whole.optimizer_settings["inner"] == {"name": "q_galore", "rank": 3, "gap": 200}
    nested = recipe_from({"model": "m", "data": "d", "method": "longlora", "settings": {"group": 12}})
    assert with_preset(nested, build_method(nested)).group == 12


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"packing": "off"}, "packing: off leaves rows without groups"),
        ({"packing": "shared"}, "packing: shared leaves rows without groups"),
        ({"method": "prefix_tuning", "length": 4, "attention": "shifted"}, "attention: shifted is for causal models"),
        ({"attention": "sideways"}, "'sideways' is not one of auto, full, shifted"),
    ],
)
def test_what_does_not_go_together(model: Path, rows: Path, values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        prepare(recipe(model, rows, output=str(tmp_path / "run"), **values), Reporter())


def test_positions_are_interpolated(model: Path) -> None:
    short, long = load(model, device="cpu").model, load(model, device="cpu", context=LONG).model
    torch.testing.assert_close(long.model.rotary_emb.inv_freq * 3, short.model.rotary_emb.inv_freq)
    ids = torch.randint(3, len(tokenizer(False)), (1, 10))
    at = torch.arange(0, 30, 3)[None]
    torch.testing.assert_close(long(ids, position_ids=at).logits, short(ids).logits)


def test_contexts_that_need_or_allow_no_interpolation() -> None:
    from transformers import GPT2Config, LlamaConfig

    config = LlamaConfig(max_position_embeddings=64)
    assert "takes 64 tokens already" in lengthen(config, 64, "m")
    assert config.rope_parameters["rope_type"] == "default"
    lengthen(config, 100, "m")
    assert (config.rope_parameters["factor"], config.max_position_embeddings) == (2.0, 100)
    lengthen(config, 300, "m")
    assert config.rope_parameters["factor"] == 6.0
    with pytest.raises(UserError, match="no rotary positions"):
        lengthen(GPT2Config(), 4096, "m")
    scaled = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    with pytest.raises(UserError, match="of type yarn"):
        lengthen(LlamaConfig(max_position_embeddings=64, rope_parameters=scaled), 128, "m")
