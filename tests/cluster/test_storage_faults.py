"""A run and its storage: killed between any two writes, storage that fails for a while or for good, a full disk, files
that are damaged. What is there is never read twice, and the run that goes on ends like an undisturbed one."""

import errno
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from cluster_fakes import PROFILE, Faults, by_id, draws, fake_workers, finished_run, ray_workers, small_plan
from fsspec.implementations.local import LocalFileSystem
from in_process import InProcessActor

from cluster import write_once
from cluster.failing_storage import PAUSES_S, StorageError, patiently
from cluster.rows import SCHEMA, decode, merge
from cluster.run import RunSummary, run
from cluster.store import ResultStore, merged_name, shard_name

SMALL_FILES = 16  # rows: two shards of eight


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test sees it."""


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    of_ray = ray.kill
    monkeypatch.setattr(
        "cluster.actor_slot.ray.kill",
        lambda actor: actor.kill() if isinstance(actor, InProcessActor) else of_ray(actor),
    )
    monkeypatch.setattr("cluster.failing_storage.PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr("cluster.compaction.ROWS_A_FILE", SMALL_FILES)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def finish(plan, store, folder):
    return finished_run(plan, store, workers=fake_workers(Faults(folder), store), replicas=2)


def interrupted(plan, store, folder) -> RunSummary:
    return run(plan, PROFILE, None, store, workers=fake_workers(Faults(folder), store), replicas=2)


@pytest.fixture
def undisturbed(tmp_path_factory):
    """The rows of the small plan, by id, where nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, rows = finish(small_plan(), ResultStore(str(folder / "results"), "r1"), folder)
    return by_id(rows)


def expect_undisturbed(plan, store, folder, undisturbed, most_draws: int = 1) -> None:
    """Finishes the run: exactly the plan's ids, the undisturbed rows, and no image drawn more often than that."""
    _, rows = finish(plan, store, folder)
    assert by_id(rows) == undisturbed
    assert {row["attempts"] for row in rows} == {1}
    assert max(Counter(draws(folder)).values()) <= most_draws


def leftovers(store) -> list[Path]:
    return [path for path in Path(store.run_uri).rglob("*") if path.name.endswith(".tmp")]


def test_a_run_ends_in_few_files_in_the_order_of_the_plan(plan, store, tmp_path, undisturbed):
    expect_undisturbed(plan, store, tmp_path, undisturbed)
    manifest = store.manifest()
    by_variant = {v: [s for s in plan.shards if s.key.variant == v] for v in plan.variants}
    expected = {
        merged_name(part[0].key, part[-1].key): [i for shard in part for i in plan.sample_ids(shard)]
        for shards in by_variant.values()
        for part in (shards[:2], shards[2:])
    }
    assert {file["name"] for file in manifest["files"]} == set(expected)
    for file in manifest["files"]:
        content = store.read(file["name"])
        assert decode(content)["sample_id"].to_pylist() == expected[file["name"]]
        assert (file["rows"], file["bytes"]) == (len(expected[file["name"]]), len(content))
    assert set(store.shards().values()) == set(expected)
    assert store.read_rows(partial=True).num_rows == plan.n_samples


def test_a_merged_file_has_row_groups_of_a_readable_size(plan, store, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.rows.ROWS_A_GROUP", 6)
    finish(plan, store, tmp_path)
    name = next(iter(store.files()))
    metadata = pq.read_metadata(Path(store.run_uri) / name)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [6, 6, 4]


# The plan, six shards, four merged files, the manifest.
@pytest.mark.parametrize("effect", ["before", "after"])
@pytest.mark.parametrize("write", range(13))
def test_a_run_killed_at_any_write_loses_and_doubles_nothing(
    plan, store, tmp_path, undisturbed, monkeypatch, write, effect
):
    written: list[str] = []

    def publish(fs, path, content):
        if "/images/" in path:
            return write_once.publish(fs, path, content)
        if len(written) == write and effect == "before":
            raise Killed
        won = write_once.publish(fs, path, content)
        written.append(path)
        if len(written) > write:
            raise Killed
        return won

    with monkeypatch.context() as patch:
        patch.setattr("cluster.store.publish", publish)
        with pytest.raises(Killed):
            interrupted(plan, store, tmp_path)
    rows = store.read_rows(partial=True).to_pylist()
    assert by_id(rows).items() <= undisturbed.items()
    assert len(rows) == len(by_id(rows)) == sum(len(s.samples) for s in plan.shards if s.key in store.shards())
    assert (store.manifest() is not None) == (write == 12 and effect == "after")
    expect_undisturbed(plan, store, tmp_path, undisturbed, most_draws=2)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_fails_for_a_while_costs_nothing(plan, store, tmp_path, undisturbed, monkeypatch, number):
    calls = Counter()

    def flaky(name, call):
        """Of every three calls on one file the first two fail."""

        def wrapper(*args, **kwargs):
            calls[name, args[-1]] += 1
            if calls[name, args[-1]] % 3:
                raise OSError(number, os.strerror(number))
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr("cluster.write_once.os.link", flaky("link", os.link))
    for method in ("cat_file", "ls"):
        monkeypatch.setattr(LocalFileSystem, method, flaky(method, getattr(LocalFileSystem, method)))
    expect_undisturbed(plan, store, tmp_path, undisturbed)
    assert not leftovers(store)


@pytest.mark.parametrize("files", ["images", "shard-", "rows-", "_manifest"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "outage"])
def test_a_full_disk_or_an_outage_is_one_line_and_the_run_goes_on(
    plan, store, tmp_path, undisturbed, monkeypatch, number, files
):
    good = 2 if files in ("images", "shard-") else 0  # writes that still succeed
    tried: list[str] = []
    os_link = os.link

    def link(source, target):
        if files in str(target):
            tried.append(str(target))
            if len(tried) > good:
                raise OSError(number, os.strerror(number))
        os_link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("cluster.write_once.os.link", link)
        summary = interrupted(plan, store, tmp_path)
    assert not summary.complete
    assert f"cannot be written ({os.strerror(number)})" in summary.reason
    assert "\n" not in summary.reason
    assert store.run_uri in summary.reason
    assert not leftovers(store)
    most = max(Counter(tried).values())
    assert most == (1 if number == errno.ENOSPC else 4)  # waiting gives no space; an outage is waited for, not for ever
    expect_undisturbed(plan, store, tmp_path, undisturbed, most_draws=2)


def test_an_actors_storage_error_is_one_line(local_ray, plan, store, tmp_path):
    store.open(plan)
    (Path(store.run_uri) / "images").touch()
    summary = run(plan, PROFILE, None, store, workers=ray_workers(Faults(tmp_path), store), replicas=1)
    assert not summary.complete
    assert summary.reason.startswith(f"{store.run_uri}/images/")
    assert "cannot be written" in summary.reason
    assert "\n" not in summary.reason


def test_storage_that_cannot_be_read_at_the_end_leaves_a_resumable_run(plan, store, tmp_path, undisturbed, monkeypatch):
    def unreadable(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    def once_all_is_drawn(event):
        if event.stage == "verifying":
            monkeypatch.setattr(LocalFileSystem, "ls", unreadable)

    ls = LocalFileSystem.ls
    workers = fake_workers(Faults(tmp_path), store)
    summary = run(plan, PROFILE, None, store, workers=workers, replicas=1, progress=once_all_is_drawn)
    assert not summary.complete
    assert "cannot be read (Input/output error)" in summary.reason
    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    expect_undisturbed(plan, store, tmp_path, undisturbed)


def interrupted_after_drawing(plan, store, folder, monkeypatch) -> None:
    """All shards are there, none merged."""

    def no_merging(*_):
        raise StorageError("not now")

    with monkeypatch.context() as patch:
        patch.setattr("cluster.run.compact", no_merging)
        assert interrupted(plan, store, folder).reason == "not now"


def test_a_torn_result_file_is_drawn_again(plan, store, tmp_path, undisturbed, monkeypatch):
    interrupted_after_drawing(plan, store, tmp_path, monkeypatch)
    torn = plan.shards[1]
    path = Path(store.run_uri) / shard_name(torn.key)
    path.write_bytes(path.read_bytes()[:-100])
    expect_undisturbed(plan, store, tmp_path, undisturbed, most_draws=2)
    twice = {line for line, count in Counter(draws(tmp_path)).items() if count == 2}
    assert twice == {f"{torn.key.variant} {sample.noise_seed}" for sample in torn.samples}


def test_damage_in_a_column_that_the_scan_leaves_out_is_found_before_the_run_ends(
    plan, store, tmp_path, undisturbed, monkeypatch
):
    interrupted_after_drawing(plan, store, tmp_path, monkeypatch)
    damaged = plan.shards[0]
    path = Path(store.run_uri) / shard_name(damaged.key)
    prompts = pq.read_metadata(path).row_group(0).column(SCHEMA.get_field_index("prompt"))
    content = bytearray(path.read_bytes())
    content[prompts.data_page_offset + prompts.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    summary = interrupted(plan, store, tmp_path)
    assert (summary.complete, summary.reason) == (False, "1 of 6 shards did not verify")
    expect_undisturbed(plan, store, tmp_path, undisturbed, most_draws=2)
    assert len(draws(tmp_path)) == plan.n_samples + len(damaged.samples)


def test_a_damaged_merged_file_costs_no_image(plan, store, tmp_path, undisturbed):
    finish(plan, store, tmp_path)
    name = next(iter(store.files()))
    path = Path(store.run_uri) / name
    path.write_bytes(path.read_bytes()[:-10])
    (Path(store.run_uri) / "_manifest.json").unlink()
    expect_undisturbed(plan, store, tmp_path, undisturbed)
    assert len(list(path.parent.glob(f"{path.name}.damaged-*"))) == 1


def test_rows_of_overlapping_merged_files_are_read_once(plan, store, tmp_path, undisturbed, monkeypatch):
    """As after an update that changed how many rows a file holds."""
    interrupted_after_drawing(plan, store, tmp_path, monkeypatch)
    keys = [shard.key for shard in plan.shards if shard.key.variant == "bf16"]
    tables = [decode(store.read(shard_name(key))) for key in keys]
    store.commit_merged(keys[1:], merge(tables[1:]))
    store.commit_merged(keys[:2], merge(tables[:2]))
    assert store.read_rows(partial=True).num_rows == plan.n_samples
    expect_undisturbed(plan, store, tmp_path, undisturbed)


def test_waiting_is_bounded_and_only_for_what_may_pass(monkeypatch):
    assert 10 < sum(PAUSES_S) < 60
    slept: list[float] = []
    monkeypatch.setattr("cluster.failing_storage.PAUSES_S", PAUSES_S)
    monkeypatch.setattr("cluster.failing_storage.time.sleep", slept.append)

    def raising(error):
        def call():
            raise error

        return call

    with pytest.raises(TimeoutError):
        patiently(raising(TimeoutError("no answer")))
    assert tuple(slept) == PAUSES_S
    slept.clear()
    for error in (FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "ro")):
        with pytest.raises(type(error)):
            patiently(raising(error))
    assert not slept
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0)
