"""Stored images against their twins: what is compared, what a lost image gives, going on after a stop."""

from pathlib import Path

import numpy as np
import pytest
from cluster_fakes import Faults, fake_workers, finished_run, small_plan

from cluster.evaluator import to_png
from cluster.fidelity import BASELINE, FidelityActor, _pairs, file_name, read_fidelity, unmeasured
from cluster.store import ResultStore
from evaluators.fidelity import FidelityMeter


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of two variants, whose images are real files: the variant's are one level brighter."""
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
    plan, store = small_plan(), ResultStore(str(tmp_path / "results"), "r1")
    finished_run(plan, store, workers=fake_workers(Faults(tmp_path), store), replicas=1)
    for table in store.tables():
        for row in table.select(["variant", "image_path"]).to_pylist():
            path = Path(store.run_uri) / row["image_path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            level = 100 if row["variant"] == BASELINE else 101
            path.write_bytes(to_png(np.full((16, 16, 3), level, np.uint8)))
    return plan, store


def measure(plan, store, keys):
    actor, pairs = FidelityActor(None, store), _pairs(plan, store)
    actor._meter = FidelityMeter(None)  # else it would ask Ray for its device
    for key in keys:
        actor.measure(key, pairs[key])


def test_each_variant_is_compared_with_the_baseline_pair_by_pair(run):
    plan, store = run
    keys = unmeasured(plan, store)
    assert keys == [shard.key for shard in plan.shards if shard.key.variant != BASELINE]
    measure(plan, store, keys)
    rows = read_fidelity(store).to_pylist()
    assert len(rows) == plan.n_samples // 2
    assert {row["pair_id"] for row in rows} == {sample.pair_id for shard in plan.shards for sample in shard.samples}
    assert {round(row["psnr_db"], 1) for row in rows} == {48.1}  # one level of 255
    assert {row["error"] for row in rows} == {None}
    assert unmeasured(plan, store) == []


def test_it_goes_on_where_it_stopped(run):
    plan, store = run
    first, *rest = unmeasured(plan, store)
    measure(plan, store, [first])
    assert unmeasured(plan, store) == rest
    assert store.names_under("fidelity") == [file_name(first)]


def test_a_lost_or_damaged_image_is_a_row_with_its_error(run):
    plan, store = run
    key = unmeasured(plan, store)[0]
    lost, torn, *others = _pairs(plan, store)[key]
    (Path(store.run_uri) / lost.reference).unlink()
    image = Path(store.run_uri) / torn.image
    image.write_bytes(image.read_bytes()[:40])
    measure(plan, store, [key])
    rows = {row["pair_id"]: row for row in read_fidelity(store).to_pylist()}
    assert rows[lost.pair_id]["error"].startswith("the twin")
    assert rows[torn.pair_id]["error"].startswith("the image")
    assert {rows[pair.pair_id]["error"] for pair in others} == {None}


def test_without_the_baseline_there_is_nothing_to_compare(tmp_path):
    plan = small_plan()
    store = ResultStore(str(tmp_path), "r2")
    alone = type(plan)(**{**vars(plan), "variants": ("ternary",)})
    assert unmeasured(alone, store) == []
