"""DDP and FSDP2 on two processes, for every method; all cases share one start of the processes."""

from __future__ import annotations

import pytest
import torch

from trimtab import laws

DECODER = next(host for host in laws.zoo() if host.kind == "model")
CASES = [
    laws.Case(method, DECODER, storage)
    for method in laws.registered().values()
    for storage in laws.storages()
    if storage.name in ("fp32", "bf16", "nf4")
]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str | None]]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    return laws.distributed.together(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_two_processes_compute_what_one_does(
    case: laws.Case, way: str, found: dict[str, dict[str, str | None]]
) -> None:
    excuse = laws.case.excuses(case.method).get("distributed")
    if excuse is not None:
        assert any(found[case.id].values()), f"it holds, so delete the exception: {excuse!r}"
        pytest.xfail(excuse)
    assert found[case.id][way] is None, found[case.id][way]
