"""Files are written once, whole; what is torn is not read; a run is what its plan says."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_fakes import small_plan
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from bitflux_core.errors import UserError
from cluster.audit import scan
from cluster.pieces import Piece
from cluster.rows import ModelUse, failed_rows
from cluster.store import ResultStore, StorageError, shard_name
from cluster.write_once import publish

USE = ModelUse(1, 2, "cpu-resident", "cpu")


def commit(plan, store, shard, error="e") -> bool:
    piece = Piece(shard, tuple(range(len(shard.samples))))
    return store.commit(shard.key, list(failed_rows(plan, store.run_id, piece, error).values()), USE)


@pytest.mark.parametrize("fs", [LocalFileSystem(), MemoryFileSystem()], ids=["local", "remote"])
def test_the_first_writer_wins(fs, tmp_path):
    path = f"{tmp_path}/folder/file"
    assert publish(fs, path, b"first")
    assert not publish(fs, path, b"second")
    assert fs.cat_file(path) == b"first"
    assert len(fs.ls(f"{tmp_path}/folder")) == 1


def test_a_crash_before_the_link_leaves_no_result(tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", crash)
    with pytest.raises(KeyboardInterrupt):
        publish(LocalFileSystem(), f"{tmp_path}/file", b"whole")
    assert not (tmp_path / "file").exists()


def test_the_second_commit_of_a_shard_loses(plan, store):
    store.open(plan)
    assert commit(plan, store, plan.shards[0], "mine")
    assert not commit(plan, store, plan.shards[0], "theirs")
    assert set(store.read_rows(partial=True)["error"].to_pylist()) == {"mine"}
    assert store.completed_shards(plan) == {plan.shards[0].key}


def test_temporary_files_of_a_killed_writer_are_no_results(plan, store):
    store.open(plan)
    commit(plan, store, plan.shards[0])
    name = shard_name(plan.shards[0].key)
    folder, file = os.path.split(f"{store.run_uri}/{name}")
    with open(f"{folder}/.{file.replace('00000', '00001')}.0123.tmp", "wb") as torn:
        torn.write(store.read(name)[:100])
    assert store.completed_shards(plan) == {plan.shards[0].key}
    assert set(scan(store, plan)) == {plan.shards[0].key}


def test_a_damaged_or_foreign_shard_is_set_aside_and_drawn_again(plan, store):
    store.open(plan)
    torn, foreign, good = plan.shards[0], plan.shards[1], plan.shards[2]
    commit(plan, store, good)
    whole = store.read(shard_name(good.key))
    for shard, content in ((torn, whole[:200]), (foreign, whole)):
        publish(LocalFileSystem(), f"{store.run_uri}/{shard_name(shard.key)}", content)
    assert set(scan(store, plan)) == {good.key}
    assert store.completed_shards(plan) == {good.key}
    assert commit(plan, store, torn)
    assert set(scan(store, plan)) == {good.key, torn.key}


def test_a_run_belongs_to_one_plan(plan, store):
    assert store.plan_digest() is None
    store.open(plan)
    store.open(plan)
    assert store.plan_digest() == plan.digest
    with pytest.raises(UserError, match="another plan"):
        store.open(small_plan(variants=("bf16",)))


def test_an_incomplete_run_is_read_on_request_only(plan, store):
    store.open(plan)
    with pytest.raises(UserError, match="not complete"):
        store.read_rows()
    assert store.read_rows(partial=True).num_rows == 0
    commit(plan, store, plan.shards[-1])
    rows = store.read_rows(partial=True)
    assert rows.num_rows == 4
    assert rows["sample_id"].to_pylist() == plan.sample_ids(plan.shards[-1])


@pytest.mark.parametrize(
    "damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-9])], ids=["gone", "torn"]
)
def test_a_complete_run_with_a_damaged_shard_is_not_read(plan, store, damage):
    store.open(plan)
    for shard in plan.shards:
        commit(plan, store, shard)
    records = scan(store, plan).values()
    files = [{"name": record.name, "sha256": record.sha256} for record in records]
    store.write_manifest({"files": files})
    assert store.read_rows().num_rows == plan.n_samples
    damage(Path(store.run_uri) / files[1]["name"])
    with pytest.raises(UserError, match=f"{files[1]['name']} cannot be used .* remove the run's _manifest.json"):
        store.read_rows()


@pytest.mark.parametrize("name", ["_plan.json", "_manifest.json"])
def test_a_torn_description_is_named(plan, store, name):
    store.open(plan)
    (Path(store.run_uri) / name).write_text('{"digest": ')
    with pytest.raises(UserError, match=f"{name} is damaged .* remove it"):
        store.open(plan) if name == "_plan.json" else store.manifest()


def test_an_output_that_is_no_folder_is_a_users_mistake(plan, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        ResultStore(str(tmp_path / "file"), "r1").open(plan)


def test_a_full_disk_is_a_storage_error(plan, store, monkeypatch):
    store.open(plan)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.write_once.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        commit(plan, store, plan.shards[0])
    monkeypatch.undo()
    assert store.completed_shards(plan) == set()


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "-x"])
def test_a_run_id_is_a_plain_file_name(run_id):
    with pytest.raises(UserError, match="run id"):
        ResultStore("results", run_id)


def test_an_unknown_kind_of_storage_is_a_users_mistake():
    with pytest.raises(UserError, match="nowhere://bucket"):
        ResultStore("nowhere://bucket/results", "r1")


def test_a_shard_keeps_what_its_model_took(plan, store):
    store.open(plan)
    commit(plan, store, plan.shards[0])
    record = scan(store, plan)[plan.shards[0].key]
    assert (record.use, record.n_rows, record.n_failed, record.seconds) == (USE, 8, 8, [])
    assert USE.joined(replace(USE, peak_memory_bytes=9)).peak_memory_bytes == 9
    assert json.loads(store.read("_plan.json"))["images"] == plan.n_samples


def test_memory_of_different_kinds_is_not_compared():
    """A run begun on CPUs and resumed on GPUs, or the other way: the figure is the GPUs', whichever came first."""
    cpu = ModelUse(1000, 9000, "cpu-resident", "cpu")
    gpu = ModelUse(1000, 2000, "cuda-peak", "NVIDIA H100")
    assert cpu.joined(gpu) == gpu.joined(cpu) == gpu


def test_a_plan_is_withdrawn_only_while_nothing_is_committed(plan, store):
    store.open(plan)
    store.withdraw()
    assert store.plan_digest() is None
    store.open(plan)
    store.commit(plan.shards[0].key, [], None)
    store.withdraw()
    assert store.plan_digest() == plan.digest
