"""The fault matrix over fake actors in this process: whatever strikes, every id is there once, with the rows of an
undisturbed run, after a bounded number of attempts."""

import asyncio
import gc
import sys
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from cluster_fakes import (
    FINGERPRINTS,
    MOST_ATTEMPTS,
    PROFILE,
    FakeEvaluator,
    FakeReplica,
    Faults,
    by_id,
    draws,
    fake_workers,
    finished_run,
    small_plan,
    small_workload,
)
from in_process import ProcessEnded, in_process
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError

from bitflux_core.errors import UserError
from cluster.limits import Limits
from cluster.plan import build_plan
from cluster.run import run
from cluster.store import ResultStore

# Patient with calls, as a test must be whose machine is busy; those of hangs and stragglers are less so.
PATIENT = Limits(late_floor_s=1000, pool_period_s=0.05, backoff_s=0.01)
HASTY = replace(PATIENT, call_floor_s=1.0)


@pytest.fixture(autouse=True)
def actors_end_without_ray(monkeypatch):
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())

    def end_process():
        raise ProcessEnded

    monkeypatch.setattr("cluster.faults.end_process", end_process)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
        store = ResultStore(str(folder / "results"), "r1")
        workers = fake_workers(Faults(folder), store)
        _, rows = finished_run(small_plan(), store, workers=workers, replicas=1)
    return by_id(rows)


def finish(plan, store, faults, **options):
    """The rows of a run that went on to its end: the plan's ids, and no more attempts than are allowed."""
    options = {"workers": fake_workers(faults, store), "replicas": 2, "limits": PATIENT, **options}
    _, rows = finished_run(plan, store, **options)
    assert max(row["attempts"] for row in rows) <= MOST_ATTEMPTS
    return rows


def seeds(plan, *places) -> frozenset[int]:
    return frozenset(plan.shards[shard].samples[position].noise_seed for shard, position in places)


@pytest.mark.parametrize("kind", ["exit_once_on", "hang_once_on", "poison_cuda_once_on", "unavailable_once_on"])
def test_what_strikes_once_changes_no_row(plan, store, tmp_path, undisturbed, kind):
    # Late in each variant, so that it is known by then how long a call should take.
    faults = Faults(tmp_path, **{kind: seeds(plan, (2, 5), (3, 1))})
    rows = finish(plan, store, faults, limits=HASTY if kind == "hang_once_on" else PATIENT)
    assert by_id(rows) == undisturbed
    assert max(row["attempts"] for row in rows) == (1 if kind == "unavailable_once_on" else 2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raise_on", "draw: RuntimeError: seed"),
        ("exit_on", "draw: its process ended"),
        ("hang_on", "draw: replica-"),
        ("poison_cuda_on", "draw: its process ended"),
        ("greedy", "draw: MemoryError: 1 images do not fit"),
    ],
)
def test_a_poisoned_sample_alone_becomes_an_error(plan, store, tmp_path, undisturbed, kind, message):
    bad = plan.shards[4].samples[1]
    limits = replace(HASTY if kind == "hang_on" else PATIENT, attempts=1)
    rows = finish(plan, store, Faults(tmp_path, **{kind: frozenset({bad.noise_seed})}), limits=limits)
    failed = [row for row in rows if row["error"]]
    assert {(row["pair_id"], row["variant"]) for row in failed} == {(bad.pair_id, v) for v in plan.variants}
    assert all(row["error"].startswith(message) for row in failed), failed[0]["error"]
    healthy = {key: row for key, row in by_id(rows).items() if row["error"] is None}
    assert healthy == {key: undisturbed[key] for key in healthy}


def test_a_hanging_evaluator_is_replaced(plan, store, tmp_path, undisturbed):
    limits = replace(PATIENT, call_ceiling_s=1.0)
    assert by_id(finish(plan, store, Faults(tmp_path, score_hang_once=True), limits=limits)) == undisturbed


def test_a_late_piece_is_drawn_by_an_idle_replica_too(plan, store, tmp_path, undisturbed):
    """The replica that hangs is given up long after the run is over."""
    faults = Faults(tmp_path, hang_once_on=seeds(plan, (5, 1)))
    limits = replace(PATIENT, late_floor_s=0.3)
    rows = finish(plan, store, faults, limits=limits)
    assert by_id(rows) == undisturbed
    assert {row["attempts"] for row in rows} == {1}


def test_of_two_draws_the_first_result_counts(plan, store, tmp_path, undisturbed):
    """Every piece is late at once, so that idle replicas draw the last ones again, and both come to an end."""

    class Slow(FakeReplica):
        async def draw(self, *args):
            await asyncio.sleep(0.02)
            return super().draw(*args)

    faults = Faults(tmp_path)
    workers = replace(fake_workers(faults, store), replica=in_process(Slow, faults))
    limits = replace(PATIENT, late_factor=0.0, late_floor_s=0.004)
    rows = finish(plan, store, faults, workers=workers, replicas=4, limits=limits)
    assert by_id(rows) == undisturbed
    assert {row["attempts"] for row in rows} == {1}
    drawn = Counter(draws(tmp_path))
    assert set(drawn.values()) == {1, 2}
    assert len(drawn) == plan.n_samples


def test_a_batch_that_does_not_fit_is_halved_and_its_rows_say_so(plan, store, tmp_path, undisturbed):
    rows = finish(plan, store, Faults(tmp_path, memory=3))
    assert {row["drawn_batch_size"] for row in rows} == {2}
    assert all(row["error"] is None and row["attempts"] == 1 for row in rows)
    flagless = {key: {**row, "drawn_batch_size": None} for key, row in by_id(rows).items()}
    assert flagless == undisturbed


@pytest.mark.parametrize("error", [ObjectLostError("aa", None, ""), OutOfMemoryError("the node ran out of memory")])
@pytest.mark.parametrize("stage", ["draw", "score"])
def test_what_the_machine_loses_is_no_samples_failure(plan, store, tmp_path, undisturbed, error, stage):
    """Lost images are drawn again: scoring the same reference once more would fail for ever."""

    def losing(cls, method, first):
        calls = []

        def lose(self, *args):
            calls.append(args)
            if len(calls) in first:
                raise error
            return getattr(super(Loser, self), method)(*args)

        Loser = type("Loser", (cls,), {method: lose})
        return Loser

    faults = Faults(tmp_path)
    workers = fake_workers(faults, store)
    if stage == "draw":
        workers = replace(workers, replica=in_process(losing(FakeReplica, "draw", {2, 3}), faults))
    else:
        workers = replace(workers, evaluator=in_process(losing(FakeEvaluator, "score", {2, 3}), faults, store))
    rows = finish(plan, store, faults, workers=workers)
    assert by_id(rows) == undisturbed
    assert {row["attempts"] for row in rows} == {1}
    redrawn = stage == "score" and isinstance(error, ObjectLostError)
    assert (len(draws(tmp_path)) > plan.n_samples) == redrawn


def test_the_machines_faults_are_bounded_too(plan, store, tmp_path):
    class Unlucky(FakeReplica):
        def draw(self, *args):
            raise OutOfMemoryError("the node ran out of memory")

    faults = Faults(tmp_path)
    workers = replace(fake_workers(faults, store), replica=in_process(Unlucky, faults))
    limits = replace(PATIENT, failures=10_000, excused=4)
    summary = run(plan, PROFILE, None, store, workers=workers, replicas=1, limits=limits)
    assert not summary.complete
    assert (summary.reason or "").startswith("no image of variant")
    assert "the node ran out of memory" in summary.reason
    assert not store.shards()


def test_a_replica_out_of_reach_too_often_is_replaced(plan, store, tmp_path, undisturbed):
    made = []

    class Away(FakeReplica):
        def __init__(self, faults):
            super().__init__(faults)
            self.number = len(made)
            made.append(self)

        def draw(self, *args):
            if self.number == 0:
                raise ActorUnavailableError("no route", b"\0" * 16)
            return super().draw(*args)

    faults = Faults(tmp_path)
    workers = replace(fake_workers(faults, store), replica=in_process(Away, faults))
    rows = finish(plan, store, faults, workers=workers, replicas=1)
    assert by_id(rows) == undisturbed
    assert len(made) == 2
    assert {row["attempts"] for row in rows} == {1}


def test_the_run_goes_on_while_a_lost_replica_finds_no_room(plan, store, tmp_path, undisturbed):
    made = []

    class Homeless(FakeReplica):
        def __init__(self, faults):
            super().__init__(faults)
            made.append(self)
            self.homeless = len(made) > 2

        async def start(self, variant):
            if self.homeless:
                await asyncio.sleep(3600)

    faults = Faults(tmp_path, exit_once_on=seeds(plan, (0, 0)))
    workers = replace(fake_workers(faults, store), replica=in_process(Homeless, faults))
    assert by_id(finish(plan, store, faults, workers=workers)) == undisturbed
    assert len(made) == 3


def test_the_run_goes_on_without_a_replica_that_fails_to_start(plan, store, tmp_path, undisturbed):
    made = []

    class Broken(FakeReplica):
        def __init__(self, faults):
            super().__init__(faults)
            made.append(self)
            self.broken = len(made) > 1

        def start(self, variant):
            if self.broken:
                raise RuntimeError("no driver on this machine")

    faults = Faults(tmp_path)
    workers = replace(fake_workers(faults, store), replica=in_process(Broken, faults))
    assert by_id(finish(plan, store, faults, workers=workers)) == undisturbed
    assert len(made) <= 1 + PATIENT.starts


def test_a_run_without_any_replica_left_ends_with_the_reason(plan, store, tmp_path):
    made = []

    class Homeless(FakeReplica):
        async def start(self, variant):
            made.append(self)
            if len(made) > 1:
                await asyncio.sleep(3600)

    faults = Faults(tmp_path, exit_once_on=seeds(plan, (2, 0)))
    workers = replace(fake_workers(faults, store), replica=in_process(Homeless, faults))
    limits = replace(PATIENT, start_timeout_s=1.0)
    summary = run(plan, PROFILE, None, store, workers=workers, replicas=1, limits=limits)
    assert not summary.complete
    assert summary.reason == "replica-0 does not start: no answer in 1 s; does the cluster have room for it?"
    assert store.shards()  # what was done stays


def gpu_nodes(monkeypatch, nodes):
    """The cluster, as Ray would tell: a list of node resources that a test may change."""
    monkeypatch.setattr("cluster.pool_size.ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    return nodes


def test_room_that_appears_is_used(plan, store, tmp_path, undisturbed, monkeypatch):
    nodes = gpu_nodes(monkeypatch, [{"CPU": 4, "GPU": 1}])
    sizes = []

    class Observing:
        def __getattr__(self, name):
            return lambda *args: sizes.append(args[0]) if name == "pool_size" else None

    class Waiting(FakeReplica):
        async def draw(self, *args):
            while draws(tmp_path) and 3 not in sizes:  # the first shard goes through
                await asyncio.sleep(0.01)
            return super().draw(*args)

    def add_nodes(event):
        if event.stage == "drawing" and len(nodes) == 1:
            nodes.append({"CPU": 4, "GPU": 2})

    faults = Faults(tmp_path)
    workers = replace(fake_workers(faults, store), replica=in_process(Waiting, faults))
    options = {"workers": workers, "replicas": None, "progress": add_nodes, "observer": Observing()}
    rows = finish(plan, store, faults, **options)
    assert by_id(rows) == undisturbed
    assert max(sizes) == 3
    assert len({row["worker"].split("@")[0] for row in rows}) == 3


def test_every_type_of_gpu_gets_its_replicas(plan, store, tmp_path, undisturbed, monkeypatch):
    gpu_nodes(monkeypatch, [{"CPU": 4, "GPU": 1, f"accelerator_type:{name}": 1.0} for name in ("H100", "A10", "T4")])
    asked = []
    faults = Faults(tmp_path)
    workers = fake_workers(faults, store)
    make = workers.replica
    workers = replace(workers, replica=lambda gpu_type: (asked.append(gpu_type), make())[1])
    profile = PROFILE.model_copy(
        update={"resources": PROFILE.resources.model_copy(update={"gpu_types": {"H100": 4.0, "A10": 1.0}})}
    )
    monkeypatch.setattr(sys.modules["cluster_fakes"], "PROFILE", profile)
    assert by_id(finish(plan, store, faults, workers=workers, replicas=None)) == undisturbed
    assert sorted(asked) == ["A10", "H100"]


def test_several_evaluators_share_the_work(plan, store, tmp_path, undisturbed):
    made = []

    class Slow(FakeEvaluator):
        def __init__(self, *args):
            super().__init__(*args)
            self.scored = 0
            made.append(self)

        async def score(self, *args):
            self.scored += 1
            await asyncio.sleep(0.05)
            return super().score(*args)

    faults = Faults(tmp_path)
    workers = replace(fake_workers(faults, store), evaluator=in_process(Slow, faults, store), evaluators=2)
    assert by_id(finish(plan, store, faults, workers=workers)) == undisturbed
    assert [each.scored > 0 for each in made] == [True, True]


def test_the_observer_is_told_of_all_that_happens(plan, store, tmp_path):
    told = Counter()

    class Observing:
        def __getattr__(self, name):
            def tell(*args):
                told[name] += args[2] if name == "shard_committed" else 1

            return tell

    bad = plan.shards[4].samples[1].noise_seed
    finish(plan, store, Faults(tmp_path, raise_on=frozenset({bad})), observer=Observing())
    assert told["shard_committed"] == plan.n_samples
    assert told["quarantined"] == 2
    assert told["retried"] > 2
    assert told["pool_size"] >= 1
    assert told["replica_busy"] >= len(plan.shards)


def test_a_models_fault_leaves_the_runs_name_free(plan, store, tmp_path):
    faults = Faults(tmp_path, start={"replica": "user"})
    with pytest.raises(UserError, match="damaged"):
        run(plan, PROFILE, None, store, workers=fake_workers(faults, store), replicas=1)
    mended = replace(plan, fingerprints={**plan.fingerprints, "ternary": "mended"})
    finish(mended, store, Faults(tmp_path))


def test_images_are_let_go_as_soon_as_they_are_scored(store, tmp_path):
    """However long the run: the buffer's two places for each evaluator and one for each replica, and one for each of
    the replicas' lanes."""
    plan = build_plan(PROFILE, [small_workload(prompts_a_tag=40)], ("bf16", "ternary"), fingerprints=FINGERPRINTS)
    alive = weakref.WeakSet()
    most = []

    class Image(np.ndarray):
        __hash__ = object.__hash__

    class Watched(FakeReplica):
        def draw(self, *args):
            report, images = super().draw(*args)
            alive.add(images := images.view(Image))
            most.append(len(alive))
            return report, images

    class Slow(FakeEvaluator):
        async def score(self, *args):
            await asyncio.sleep(0.01)
            return super().score(*args)

    faults = Faults(tmp_path)
    slow = in_process(Slow, faults, store)
    workers = replace(fake_workers(faults, store), replica=in_process(Watched, faults), evaluator=slow)
    finish(plan, store, faults, workers=workers)
    assert len(most) == len(plan.shards) == 40
    assert max(most) <= 2 + 2 + 4
    gc.collect()
    assert not alive
