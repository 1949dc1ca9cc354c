"""The faults that only real processes have, on a local Ray."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import ray
from cluster_fakes import (
    PROFILE,
    FakeReplica,
    Faults,
    by_id,
    draws,
    fake_workers,
    finished_run,
    ray_workers,
    small_plan,
)
from fsspec import AbstractFileSystem

from bitflux_core.errors import UserError
from cluster.limits import Limits
from cluster.output import alive_nodes, check_output
from cluster.run import run
from cluster.store import ResultStore

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def undisturbed(tmp_path_factory, monkeypatch):
    """The rows of the small plan, by id, from one replica in this process."""
    with monkeypatch.context() as patch:
        patch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
        folder = tmp_path_factory.mktemp("undisturbed")
        store = ResultStore(str(folder / "results"), "r1")
        _, rows = finished_run(small_plan(), store, workers=fake_workers(Faults(folder), store), replicas=1)
    return by_id(rows)


def test_a_killed_replica_changes_no_row(plan, store, tmp_path, undisturbed):
    victim = plan.shards[2].samples[5].noise_seed
    workers = ray_workers(Faults(tmp_path, exit_once_on=frozenset({victim})), store)
    _, rows = finished_run(plan, store, workers=workers, replicas=1)
    assert by_id(rows) == undisturbed
    assert len({row["worker"] for row in rows}) == 2
    assert max(row["attempts"] for row in rows) == 2
    assert sorted(Path(tmp_path / "encoded.txt").read_text().splitlines())[:2] == ["colors number 0", "colors number 1"]


def test_a_sample_that_ends_its_process_is_isolated(store, tmp_path):
    plan = small_plan(variants=("bf16",))
    bad = plan.shards[0].samples[2]
    workers = ray_workers(Faults(tmp_path, exit_on=frozenset({bad.noise_seed})), store)
    _, rows = finished_run(plan, store, workers=workers, replicas=1, limits=Limits(attempts=1))
    failed = [row for row in rows if row["error"]]
    assert [row["pair_id"] for row in failed] == [bad.pair_id]
    assert failed[0]["error"].startswith("draw: its process ended")


def test_a_constructor_that_fails_ends_the_run_with_its_message(plan, store, tmp_path):
    class Broken(FakeReplica):
        def __init__(self):
            raise RuntimeError("no driver on this machine")

    workers = ray_workers(Faults(tmp_path), store)
    broken = replace(workers, replica=lambda: ray.remote(Broken).options(num_cpus=1).remote())
    summary = run(plan, PROFILE, None, store, workers=broken, replicas=1, limits=Limits(starts=1))
    assert not summary.complete
    assert summary.reason == "replica-0 does not start: RuntimeError: no driver on this machine"


def test_a_users_mistake_crosses_processes(plan, store, tmp_path):
    workers = ray_workers(Faults(tmp_path, start={"text_encoder": "user"}), store)
    with pytest.raises(UserError, match="the checkpoint is damaged: copy it again"):
        run(plan, PROFILE, None, store, workers=workers, replicas=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_an_ended_driver_is_resumed_and_draws_only_what_is_missing(plan, tmp_path, undisturbed, monkeypatch, number):
    store = ResultStore(str(tmp_path / "results"), "r1")
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("driver.py")), address, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not store.shards() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=30)
    done = store.completed_shards(plan)
    assert 0 < len(done) < len(plan.shards)
    if number == signal.SIGTERM:
        assert output.strip() == "False stopped by SIGTERM"

    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    _, rows = finished_run(plan, store, workers=fake_workers(Faults(resumed), store), replicas=2)
    missing = [shard for shard in plan.shards if shard.key not in done]
    assert sorted(draws(resumed)) == sorted(f"{s.key.variant} {x.noise_seed}" for s in missing for x in s.samples)
    assert by_id(rows) == undisturbed


def test_a_local_output_must_be_seen_by_every_node(tmp_path, monkeypatch):
    (node,) = alive_nodes()
    assert check_output(str(tmp_path), [node, node], submitted=True) == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("cluster.output.ray.get", lambda references: [True, False])
    with pytest.raises(UserError, match="1 of 2 nodes do not see it"):
        check_output(str(tmp_path), [node, node], submitted=False)


def test_a_relative_output_is_refused_in_a_submitted_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="absolute path"):
        check_output("results", alive_nodes(), submitted=True)
    assert check_output("results", alive_nodes(), submitted=False) == str(tmp_path / "results")
    with pytest.raises(UserError, match="temporary copy"):
        check_output(str(tmp_path / "runtime_resources" / "_ray_pkg_1" / "results"), alive_nodes(), submitted=True)
    with pytest.raises(UserError, match="relative path"):
        check_output("results", [*alive_nodes(), "another"], submitted=False)
    assert check_output(str(tmp_path / "results"), alive_nodes(), submitted=True) == str(tmp_path / "results")
    with pytest.raises(UserError, match="each process's own"):
        check_output("memory://bucket/results", alive_nodes(), submitted=True)
    fsspec.register_implementation("remote", AbstractFileSystem, clobber=True)
    assert check_output("remote://bucket/results", alive_nodes(), submitted=True) == "remote://bucket/results"
