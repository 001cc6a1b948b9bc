"""Planning for many devices: formulas against sums worked out by hand, advice, refusals, the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli.conftest import save_model

from trimtab.core.errors import UserError
from trimtab.plan.devices import Device, device_of
from trimtab.plan.process import Room, room
from trimtab.plan.scaling import Cluster, Work, advice, gather_seconds, possible, reduce_seconds, scaling_of
from trimtab.plan.traffic import Parts, Stored, kept, traffic
from trimtab.train.recipe import recipe_from

DEVICE = Device("made up", flops=1e12, near=1e9, far=1e8, near_latency=1e-5, far_latency=1e-4)
PARTS = Parts(blocks=((Stored(6, 100), Stored(1, 10)),) * 2, rest=(Stored(5, 40),), gradients=4000, messages=1)
WORK = Work(PARTS, flops_per_row=1e9, fixed_bytes=1000.0, row_bytes=50.0, slack=1.0, batch_size=4)


def test_what_is_sent_is_padded_shards_by_the_number_of_gathers() -> None:
    # over 4: 6 rows become 4 × 2 of 100 bytes, 1 row 4 × 1 of 10, 5 rows 4 × 2 of 40
    found = traffic(PARTS, shards=4, devices=4, passes=3)
    assert (found.gathers, found.gathered) == (3 * (2 * 2 + 1), 3 * (2 * 2 * (800 + 40) + 320))
    assert (found.reductions, found.reduced, found.control) == (1, 4000, 3)
    assert found.per_device(4, 4) == pytest.approx(0.75 * found.gathered + 1.5 * 4000)
    assert traffic(PARTS, 1, 4).gathered == 0
    assert traffic(PARTS, 1, 1) == traffic(PARTS, 1, 1, passes=9)
    assert traffic(PARTS, 1, 1).per_device(1, 1) == 0


def test_what_is_kept_is_shards_the_rest_and_two_blocks() -> None:
    assert kept(PARTS, 1) == PARTS.frozen == 2 * 610 + 200
    assert kept(PARTS, 4) == 2 * (200 + 10) + 80 + 320 + 2 * 840


def test_collectives_take_the_shorter_of_ring_and_tree() -> None:
    assert gather_seconds(8e6, 4, 1e-5, 1e9) == pytest.approx(3e-5 + 0.75 * 8e-3)
    assert reduce_seconds(8e6, 4, 1e-5, 1e9) == pytest.approx(6e-5 + 1.5 * 8e-3)  # the ring
    assert reduce_seconds(8.0, 1024, 1e-5, 1e9) == pytest.approx(20e-5, rel=1e-3)  # the tree
    assert gather_seconds(1.0, 1, 1.0, 1.0) == reduce_seconds(1.0, 1, 1.0, 1.0) == 0


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_step_is_products_what_cannot_hide_and_the_sum_of_gradients(overlaps: bool) -> None:
    cluster = Cluster(replace(DEVICE, overlaps=overlaps), gpus=2, nodes=2)
    one = WORK.on(cluster, "hybrid", step_rows=24, limit=1e9)
    assert (one.rows, one.passes, one.devices) == (6, 2, 4)
    block = 1e-5 + 0.5 * (2 * 300 + 20) / 1e9  # 3 rows of 100 and 1 of 10 on each of two, inside a machine
    rest = 1e-5 + 0.5 * (2 * 3 * 40) / 1e9
    summed = 2 * 2 * 1e-4 + 2 * 4000 / 1e8  # the tree between machines
    summed = min(summed, 6e-4 + 1.5 * 4000 / 1e8)
    control = 3 * min(4e-4 + 128 / 1e8, 6e-4 + 1.5 * 64 / 1e8)
    gathers = 2 * 2 * 2 * block
    inside = max(6e-3, gathers - 2 * block) if overlaps else 6e-3 + gathers - 2 * block
    assert one.compute_seconds == pytest.approx(6e-3)
    assert one.step_seconds == pytest.approx(inside + 2 * block + 2 * rest + summed + control)
    assert one.memory_bytes == 1000 + kept(PARTS, 2) + 50 * 4
    assert one.efficiency(1e-3) == pytest.approx(24 / one.step_seconds / 4 * 1e-3)


def test_advice_takes_the_simplest_of_those_that_fit_and_are_quick() -> None:
    cluster = Cluster(DEVICE, 2, 2)
    assert possible(cluster) == ["none", "hybrid", "full"]
    assert possible(Cluster(DEVICE, 4, 1)) == ["none", "full"]
    assert possible(Cluster(DEVICE, 1, 1)) == ["none"]
    large = [WORK.on(cluster, name, 16, 1e9) for name in possible(cluster)]
    assert advice(large, None)[0] == "none"
    assert advice(large, "full") == (
        "full",
        f"the recipe says full; none would take {large[0].step_seconds:.3g} s a step",
    )
    tight = [replace(one, fits=one.shard == "full") for one in large]
    assert advice(tight, None) == ("full", "none and hybrid would not fit")
    assert advice([replace(one, fits=False) for one in large], None)[0] is None


def test_rates_come_from_the_table_or_are_asked_for() -> None:
    table = device_of(room("h100"))
    assert table.flops == pytest.approx(0.4 * 989e12)
    given = device_of(room("h100"), flops=1e14, link_bandwidth="10GB", link_latency=1e-6)
    assert (given.flops, given.near, given.far) == (1e14, table.near, 1e10)
    assert (given.near_latency, given.far_latency) == (1e-6, 1e-6)
    assert device_of(room("h100"), node_bandwidth="20GB").far == 2e10
    with pytest.raises(UserError, match="no rates are known of 24GB"):
        device_of(room("24GB"))
    assert device_of(room("24GB"), flops=1e14, node_bandwidth="32GB").flops == 1e14
    own = device_of(Room("this machine", 1e9, "cpu"))
    assert 1e9 < own.flops < 1e14
    assert not own.overlaps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("scaling") / "model", chat=True)


def test_a_recipe_on_many_devices(model: Path) -> None:
    recipe = recipe_from({"model": str(model), "data": "-", "method": "lora", "batch_size": 8, "accumulation": 4})
    recipe = replace(recipe, max_length=32, dtype="float32")
    found = scaling_of(recipe, room("h100"), device_of(room("h100")), 4, 2, most=64)
    assert [one.shard for one in found.layouts] == ["none", "hybrid", "full"]
    assert (found.step_rows, found.layouts[0].rows) == (32, 4)
    assert [one.devices for one in found.weak] == [1, 2, 4, 8, 16, 32, 64]
    assert [one.devices for one in found.strong] == [1, 2, 4, 8, 16, 32]
    assert all(one.step_rows == 4 * one.devices for one in found.weak)
    assert found.weak[0].efficiency(found.alone) == pytest.approx(1.0)
    assert found.weak[-1].efficiency(found.alone) < found.weak[1].efficiency(found.alone) < 1
    single = found.layouts[0]
    assert single.memory_bytes == pytest.approx(found.plan.peak_memory_bytes, rel=1e-6)
