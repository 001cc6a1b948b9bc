"""What every test starts from: no model hub, one thread, fixed seeds; and where optional real data is looked for."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Set before anything imports torch or transformers: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Inductor asks distutils for a compiler; setuptools refuses to stand in for it once the standard one is imported.
os.environ["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("trimtab", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("trimtab")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", help="rewrite tests/snapshots instead of comparing")


@pytest.fixture(autouse=True, scope="session")
def a_cpu_without_bfloat16() -> Iterator[None]:
    """`dtype: auto` is float32 on every machine: figures in tests are those of float32."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            if hasattr(torch.cpu, probe):
                patch.setattr(torch.cpu, probe, lambda: False)
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test starts from the same seeds and one thread, whatever ran before it in the same process."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def source_environment() -> dict[str, str]:
    """The environment for a child process that imports this checkout, installed or not."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The directory of real data sets, which are not part of the project: $TRIMTAB_DATA, or ../shared/data."""
    named = os.environ.get("TRIMTAB_DATA")
    candidate = Path(named) if named else ROOT.parent / "shared" / "data"
    if not candidate.is_dir():
        where = f"TRIMTAB_DATA={named}" if named else "TRIMTAB_DATA is not set and ../shared/data"
        pytest.skip(f"no real data: {where} is not a directory")
    return candidate
