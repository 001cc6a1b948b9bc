"""A model with deltas in other people's training loops: HF Trainer, plain Accelerate, and TRL and Lightning if here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.conftest import VOCABULARY, logits, make
from tests.models.conftest import small_tokenizer

import trimtab as tt

METHODS: dict[str, tuple[Any, str | None]] = {
    "lora": (tt.LoRA(rank=4), "q, v"),
    "dora": (tt.DoRA(rank=4), "q, v"),
    "prefix": (tt.PrefixTuning(length=3, hidden=None), "k, v"),
    "houlsby": (tt.Houlsby(bottleneck=4), "attn, ffn"),
    "loreft": (tt.LoReFT(rank=2), "block"),
    "embedding": ([tt.LoRA(rank=2).at("q"), tt.EmbeddingRows(tokens="3:9").at("embed")], None),
}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that repeat themselves, so that a loop has something to learn."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(10) * (index % 4 + 1)) % (VOCABULARY - 3) + 3
        labels = ids.clone()
        labels[:4] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def attached(name: str, shape: str = "llama") -> Any:
    method, where = METHODS[name]
    return tt.attach(make(shape), method, where)


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if ".delta." not in key}


def loss_of(model: Any) -> float:
    batch = torch.utils.data.default_collate([Rows()[index] for index in range(4)])
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def unchanged(model: Any, before: dict[str, torch.Tensor]) -> bool:
    after = frozen(model)
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def trainer_of(model: Any, folder: Path, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({"save_strategy": "no"} | settings),
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows())


@pytest.mark.parametrize("name", METHODS)
def test_hf_trainer_trains_the_deltas_only(name: str, tmp_path: Path) -> None:
    model = attached(name)
    before, loss = frozen(model), loss_of(model)
    trainer_of(model, tmp_path).train()
    assert loss_of(model) < loss - 0.05
    assert unchanged(model, before)
    tt.save(model, tmp_path / "adapter")
    again = make("llama")
    tt.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_hf_trainer_with_gradient_checkpointing_and_an_optimizer_of_ours(tmp_path: Path) -> None:
    model = attached("lora")
    before, loss = frozen(model), loss_of(model)
    trainer = trainer_of(model, tmp_path, gradient_checkpointing=True)
    rule = tt.Optimizer([value for value in model.parameters() if value.requires_grad], tt.AdamW(), lr=2e-2)
    trainer.optimizer = rule
    trainer.train()
    assert loss_of(model) < loss - 0.05
    assert unchanged(model, before)


@pytest.mark.slow
def test_a_checkpoint_of_the_trainer_goes_on_exactly(tmp_path: Path) -> None:
    straight = attached("lora")
    trainer_of(straight, tmp_path / "a", seed=1).train()
    cut = attached("lora")
    halves = trainer_of(cut, tmp_path / "b", seed=1, save_strategy="epoch")
    halves.train()
    resumed = attached("lora")
    first = min((tmp_path / "b").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    trainer_of(resumed, tmp_path / "b", seed=1).train(resume_from_checkpoint=str(first))
    assert torch.allclose(logits(resumed.eval()), logits(straight.eval()), atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_save_pretrained_keeps_the_base_loadable(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = attached(name)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    assert any(".delta." in key for key in keys)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(make("llama")))
    tt.save(model, tmp_path / "adapter")
    tt.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


@pytest.mark.parametrize("name", ["lora", "houlsby"])
def test_plain_accelerate(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = attached(name)
    before, loss = frozen(model), loss_of(model)
    accelerator = accelerate.Accelerator(cpu=True)
    rule = tt.Optimizer([value for value in model.parameters() if value.requires_grad], tt.AdamW(), lr=2e-2)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    prepared, optimizer, batches = accelerator.prepare(model, rule, loader)
    prepared.train()
    for _ in range(3):
        for batch in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    plain = accelerator.unwrap_model(prepared)
    assert loss_of(plain) < loss - 0.05
    assert unchanged(plain, before)


def test_trl_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{key: value.tolist() for key, value in Rows()[i].items()} for i in range(16)])
    model = attached("lora")
    before, loss = frozen(model), loss_of(model)
    config = trl.SFTConfig(output_dir=str(tmp_path), num_train_epochs=3, learning_rate=2e-2, report_to=[], use_cpu=True)
    words = small_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=words).train()
    assert loss_of(model) < loss
    assert unchanged(model, before)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    model = attached("lora")
    before, loss = frozen(model), loss_of(model)

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            trained = [value for value in self.model.parameters() if value.requires_grad]
            return tt.Optimizer(trained, tt.AdamW(), lr=2e-2)

    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(), batch_size=4))
    assert loss_of(model) < loss
    assert unchanged(model, before)
