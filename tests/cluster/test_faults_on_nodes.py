"""Whole runs on a Ray of several nodes that lose replicas and nodes while they go on."""

import contextlib
import os
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
from cluster_fakes import (
    FINGERPRINTS,
    MOST_ATTEMPTS,
    PROFILE,
    Faults,
    by_id,
    draws,
    fake_workers,
    finished_run,
    ray_workers,
    small_plan,
    small_workload,
)

from cluster.limits import Limits
from cluster.plan import build_plan
from cluster.store import ResultStore

pytestmark = pytest.mark.usefixtures("local_ray")

ON_A_NODE = {"num_cpus": 0, "num_gpus": 1}  # as a replica on a node of its own
LIMITS = Limits(pool_period_s=0.5, backoff_s=0.1)


def undisturbed_rows(plan, folder):
    """The plan's rows, by id, from one replica in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
        store = ResultStore(str(folder / "results"), "r1")
        _, rows = finished_run(plan, store, workers=fake_workers(Faults(folder), store), replicas=1)
    return by_id(rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return undisturbed_rows(small_plan(), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def nodes(ray_cluster):
    """Adds nodes of one GPU (a number that Ray believes), and removes those that are left."""
    added = []
    ray_cluster._shutdown_at_exit = False  # it would set signal handlers, which only the main thread may

    def add():
        added.append(ray_cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80_000_000))
        return added[-1]

    def remove(node):
        added.remove(node)
        ray_cluster.remove_node(node, allow_graceful=False)

    add.remove = remove
    yield add
    for node in list(added):
        remove(node)


@contextlib.contextmanager
def meanwhile(condition, act, wait_s=60):
    """Calls `act` from another thread as soon as `condition` holds; the run is not over by then."""
    happened = threading.Event()
    over = threading.Event()

    def watch():
        deadline = time.monotonic() + wait_s
        while not over.is_set() and time.monotonic() < deadline:
            if condition():
                act()
                happened.set()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()
    assert happened.is_set()


def finish(plan, store, faults, **options):
    workers = ray_workers(faults, store, ON_A_NODE)
    _, rows = finished_run(plan, store, workers=workers, limits=LIMITS, **options)
    assert max(row["attempts"] for row in rows) <= MOST_ATTEMPTS
    return rows


def test_a_node_that_dies_takes_no_row_with_it(plan, store, tmp_path, nodes, undisturbed):
    """The replica that is left draws the rest; the lost one waits for room that never comes."""
    nodes()
    second = nodes()
    with meanwhile(lambda: len(draws(tmp_path)) > 8, lambda: nodes.remove(second)):
        rows = finish(plan, store, Faults(tmp_path, seconds=0.15), replicas=2)
    assert by_id(rows) == undisturbed


@pytest.mark.slow
def test_a_node_that_joins_gets_a_replica(plan, store, tmp_path, nodes, undisturbed):
    nodes()
    with meanwhile(lambda: len(draws(tmp_path)) > 2, nodes):
        rows = finish(plan, store, Faults(tmp_path, seconds=0.1, gather=2))
    assert by_id(rows) == undisturbed
    # Numbers are those of places in the pool, of which a slow machine may make a second before the first is filled.
    assert len({row["worker"].split("@")[0] for row in rows}) > 1


@pytest.mark.slow
def test_a_run_survives_the_loss_of_all_its_nodes(plan, store, tmp_path, nodes, undisturbed):
    first = nodes()

    def replace_it():
        nodes.remove(first)
        nodes()

    with meanwhile(lambda: len(draws(tmp_path)) > 8, replace_it):
        rows = finish(plan, store, Faults(tmp_path, seconds=0.3), replicas=1)
    assert by_id(rows) == undisturbed
    assert len({row["worker"] for row in rows}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hang_once_on", "poison_cuda_once_on", "unavailable_once_on"])
def test_what_strikes_once_changes_no_row(plan, store, tmp_path, undisturbed, kind):
    seeds = frozenset(plan.shards[shard].samples[1].noise_seed for shard in (2, 3))
    limits = replace(LIMITS, call_floor_s=3.0, late_floor_s=1000)
    workers = ray_workers(Faults(tmp_path, **{kind: seeds}), store)
    _, rows = finished_run(plan, store, workers=workers, limits=limits, replicas=2)
    assert by_id(rows) == undisturbed
    assert max(row["attempts"] for row in rows) <= 2


@pytest.mark.slow
def test_a_late_piece_is_drawn_a_second_time(plan, store, tmp_path, undisturbed):
    faults = Faults(tmp_path, hang_once_on=frozenset({plan.shards[5].samples[1].noise_seed}))
    limits = replace(LIMITS, late_floor_s=2.0)
    _, rows = finished_run(plan, store, workers=ray_workers(faults, store), limits=limits, replicas=2)
    assert by_id(rows) == undisturbed
    assert {row["attempts"] for row in rows} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hang_on", "poison_cuda_on"])
def test_a_poisoned_sample_alone_becomes_an_error(store, tmp_path, undisturbed, kind):
    plan = small_plan(variants=("bf16",))
    bad = plan.shards[2].samples[2]
    limits = replace(LIMITS, attempts=1, call_floor_s=3.0)
    workers = ray_workers(Faults(tmp_path, **{kind: frozenset({bad.noise_seed})}), store)
    _, rows = finished_run(plan, store, workers=workers, limits=limits, replicas=1)
    assert [row["pair_id"] for row in rows if row["error"]] == [bad.pair_id]
    assert all(row == undisturbed[key] for key, row in by_id(rows).items() if row["error"] is None)


@pytest.mark.slow
def test_random_kills_and_lost_nodes_change_no_row(store, tmp_path, tmp_path_factory, nodes):
    """Every two or three seconds an actor that is there is killed, the text encoder and the evaluator among them; every
    fifth time a node goes instead, and another comes."""
    seconds = 30
    dice = random.Random(20241218)
    big = PROFILE.model_copy(update={"shard_seconds": 4.0})
    workload = small_workload(prompts_a_tag=60)
    plan = build_plan(big, [workload], ("bf16", "ternary"), fingerprints=FINGERPRINTS)
    expected = undisturbed_rows(plan, tmp_path_factory.mktemp("chaos"))
    kills = []
    over = threading.Event()

    def kill_one():
        alive = [int(path.stem.rpartition("-")[2]) for path in tmp_path.glob("*.pid")]
        for pid in dice.sample(sorted(alive), len(alive)):
            (path,) = tmp_path.glob(f"*-{pid}.pid")
            path.unlink()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills.append(path.stem)
                return

    def rage():
        standing = [nodes(), nodes()]
        until = time.monotonic() + seconds
        while not over.wait(dice.uniform(1.5, 3.5)) and time.monotonic() < until:
            if len(kills) % 5 == 4:
                nodes.remove(standing.pop(dice.randrange(2)))
                kills.append("node")
                standing.append(nodes())
            else:
                kill_one()

    thread = threading.Thread(target=rage)
    thread.start()
    try:
        # Long enough that it is still drawing when the last blow falls.
        faults = Faults(tmp_path, seconds=seconds * 1.2 / plan.n_samples)
        limits = replace(LIMITS, starts=10, attempts=6)
        workers = ray_workers(faults, store, ON_A_NODE)
        _, rows = finished_run(plan, store, workers=workers, limits=limits, replicas=2)
    finally:
        over.set()
        thread.join()
    assert by_id(rows) == expected
    assert len(kills) > 5, kills
    assert "node" in kills
    assert max(row["attempts"] for row in rows) <= 6 + MOST_ATTEMPTS
    assert len(draws(tmp_path)) < 3 * plan.n_samples
