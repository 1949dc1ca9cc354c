"""Results at s3://, over HTTP: the first writer wins, whatever the endpoint answers, and a run loses nothing."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from cluster_fakes import Faults, by_id, draws, fake_workers, finished_run, small_plan
from fsspec.implementations.local import LocalFileSystem

from bitflux_core.errors import UserError
from cluster.failing_storage import StorageError
from cluster.output import check_output
from cluster.store import ResultStore
from cluster.write_once import publish
from jobs import query

URI = "s3://bucket/runs"
WRITERS = 6


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
    monkeypatch.setattr("cluster.failing_storage.PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def store(s3) -> ResultStore:
    return ResultStore(URI, "r1")


@pytest.fixture
def undisturbed(tmp_path_factory):
    """The rows of the small plan, by id, from a run in a local folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    local = ResultStore(str(folder / "results"), "r1")
    _, rows = finished_run(small_plan(), local, workers=fake_workers(Faults(folder), local), replicas=1)
    return by_id(rows)


def lone_driver(folder: Path, seconds: float) -> subprocess.Popen:
    folder.mkdir()
    here = Path(__file__)
    return subprocess.Popen(
        [sys.executable, str(here.with_name("lone_driver.py")), URI, str(folder), str(seconds)],
        env=os.environ | {"PYTHONPATH": f"{here.parent}:{here.parents[2]}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def put(number: int) -> bool:
    return publish(fsspec.filesystem("s3"), "bucket/folder/file", f"writer {number}".encode() * 1000)


def put_and_read(number: int) -> tuple[bool, bytes]:
    return put(number), fsspec.filesystem("s3").cat_file("bucket/folder/file")


def test_of_concurrent_writers_exactly_one_wins_and_all_see_its_content(s3):
    with ThreadPoolExecutor(WRITERS) as pool:
        outcomes = list(pool.map(put_and_read, range(WRITERS)))
    (winner,) = [number for number, (won, _) in enumerate(outcomes) if won]
    assert {content for _, content in outcomes} == {f"writer {winner}".encode() * 1000}


def test_an_endpoint_that_names_no_condition_still_refuses_the_second_writer(s3):
    s3.failures.append(("PUT", 412, "PreconditionFailed"))
    assert not put(0)


@pytest.mark.parametrize(
    ("status", "code"), [(409, "ConditionalRequestConflict"), (500, "InternalError"), (503, "ServiceUnavailable")]
)
def test_a_failure_that_passes_is_tried_again(s3, status, code):
    s3.failures.extend([("PUT", status, code)] * 2)
    assert put(0)
    assert not s3.failures


def test_a_lasting_failure_is_one_line_at_once(s3, store, plan):
    store.open(plan)
    s3.requests.clear()
    s3.failures.append(("PUT", 403, "AccessDenied"))
    with pytest.raises(StorageError, match=r"_manifest.json: cannot be written .*told to fail"):
        store.write_manifest({})
    assert len(s3.requests) == 1


def test_no_bucket_is_made(s3, plan):
    with pytest.raises(UserError, match=r"s3://misspelt/runs: cannot be written .*bucket does not exist"):
        ResultStore("s3://misspelt/runs", "r1").open(plan)
    assert fsspec.filesystem("s3").ls("") == ["bucket"]


def test_missing_credentials_are_one_line(s3, plan, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("HOME", str(tmp_path))
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(UserError, match=r"cannot be written .*credentials"):
            ResultStore(URI, "r1").open(plan)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_killed_run_goes_on_and_is_asked(store, plan, tmp_path, undisturbed, capsys):
    driver = lone_driver(tmp_path / "killed", seconds=0.1)
    deadline = time.monotonic() + 60
    while not store.shards() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.kill()
    driver.communicate(timeout=30)
    done = store.completed_shards(plan)
    assert 0 < len(done) < len(plan.shards)
    assert query.main(["SELECT count(*) FROM results", "--output", URI]) == 2
    capsys.readouterr()
    assert query.main(["SELECT count(*) AS n FROM results", "--output", URI, "--partial", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["n"] == sum(len(s.samples) for s in plan.shards if s.key in done)

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    _, rows = finished_run(plan, store, workers=fake_workers(Faults(resumed), store), replicas=2)
    missing = [shard for shard in plan.shards if shard.key not in done]
    assert sorted(draws(resumed)) == sorted(f"{s.key.variant} {x.noise_seed}" for s in missing for x in s.samples)
    assert by_id(rows) == undisturbed
    assert {row["attempts"] for row in rows} == {1}
    assert all(store.read(row["image_path"]).startswith(b"\x89PNG") for row in rows)

    pairs = "SELECT count(*) AS n, count(DISTINCT a.pair_id) AS pairs FROM results a JOIN results b USING (pair_id)"
    assert query.main([pairs, "--output", URI, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 80, "pairs": 20}]


def test_two_drivers_at_once_agree(store, plan, tmp_path, undisturbed):
    other = lone_driver(tmp_path / "other", seconds=0.02)
    deadline = time.monotonic() + 60
    while not store.plan_digest() and other.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _, rows = finished_run(plan, store, workers=fake_workers(Faults(tmp_path, seconds=0.02), store), replicas=1)
    output, _ = other.communicate(timeout=60)
    assert output.strip() == "True None"
    assert by_id(rows) == undisturbed
    assert by_id(store.read_rows().to_pylist()) == undisturbed


def test_every_node_must_reach_the_endpoint(store, plan, monkeypatch):
    store.open(plan)
    assert check_output(URI, [], submitted=True) == URI
    monkeypatch.setattr("cluster.output.on_nodes", lambda nodes, call, *args: [call(*args), "no credentials"])
    with pytest.raises(UserError, match=r"1 of 2 nodes cannot read it .no credentials.*AWS_"):
        check_output(URI, ["a", "b"], submitted=True)
    monkeypatch.setattr("cluster.output.on_nodes", lambda nodes, call, *args: [call(*args)] * 2)
    assert check_output(URI, ["a", "b"], submitted=True) == URI


def test_the_local_file_system_takes_no_notice(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert publish(LocalFileSystem(), f"{tmp_path}/file", b"content")
