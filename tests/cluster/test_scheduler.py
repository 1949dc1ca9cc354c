"""Whole runs over fake actors, undisturbed and with faults. Each ends with exactly the plan's ids, or says why not."""

import asyncio
from dataclasses import replace

import pytest
from cluster_fakes import PROFILE, FakeReplica, Faults, by_id, draws, fake_workers, finished_run, small_plan
from in_process import in_process

from bitflux_core.errors import UserError
from cluster.limits import Limits
from cluster.run import Progress, run
from cluster.store import ResultStore, shard_name


@pytest.fixture(autouse=True)
def actors_end_without_ray(monkeypatch):
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())


def finish(plan, store, faults, **options):
    options = {"workers": fake_workers(faults, store), "replicas": 2, **options}
    return finished_run(plan, store, **options)


@pytest.fixture
def undisturbed(tmp_path_factory):
    """The rows of the small plan, by id, where one replica draws it and nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, rows = finish(small_plan(), ResultStore(str(folder / "results"), "r1"), Faults(folder), replicas=1)
    return by_id(rows)


def seed_at(plan, shard: int, position: int) -> int:
    return plan.shards[shard].samples[position].noise_seed


def test_one_and_two_replicas_give_the_same_rows(plan, store, tmp_path, undisturbed):
    events: list[Progress] = []
    summary, rows = finish(plan, store, Faults(tmp_path), progress=events.append)
    assert by_id(rows) == undisturbed
    assert sorted(draws(tmp_path)) == sorted(set(draws(tmp_path)))
    assert len(draws(tmp_path)) == plan.n_samples == 40
    assert [(e.stage, e.done) for e in (events[0], events[-1])] == [("starting", 0), ("verifying", 40)]
    assert {m.variant: (m.storage_bytes, m.peak_memory_bytes, m.seconds_per_image) for m in summary.models} == {
        "bf16": (1000, 2000, 0.5),
        "ternary": (1000, 2000, 0.5),
    }
    encoded = (tmp_path / "encoded.txt").read_text().splitlines()
    assert sorted(encoded) == sorted(plan.prompts)  # each once, for both variants


def test_rows_say_what_was_drawn_and_scored(plan, store, tmp_path):
    _, rows = finish(plan, store, Faults(tmp_path))
    row = next(r for r in rows if (r["variant"], r["prompt_index"], r["image_index"]) == ("ternary", 6, 1))
    assert (row["tag"], row["prompt"], row["score"], row["correct"]) == ("counting", "counting number 1", 1.0, True)
    assert (row["model_fingerprint"], row["evaluator_fingerprint"], row["attempts"]) == ("b2", "toy-1", 1)
    assert row["image_path"].startswith("images/ternary/toy/00006_01-")
    assert store.read(row["image_path"]).startswith(b"\x89PNG")


def test_a_complete_run_starts_no_actor(plan, store, tmp_path):
    first, _ = finish(plan, store, Faults(tmp_path))
    drawn = len(draws(tmp_path))
    again, _ = finish(plan, store, Faults(tmp_path, start={"replica": "raise"}))
    assert again == first
    assert len(draws(tmp_path)) == drawn


def test_a_replica_killed_in_the_middle_of_a_shard_is_replaced(plan, store, tmp_path, undisturbed):
    faults = Faults(tmp_path, exit_once_on=frozenset({seed_at(plan, 2, 5)}))
    _, rows = finish(plan, store, faults)
    assert by_id(rows) == undisturbed
    assert max(row["attempts"] for row in rows) == 2


@pytest.mark.parametrize("kind", ["raise_on", "exit_on"])
def test_a_poisoned_sample_is_isolated_and_the_others_are_scored(plan, store, tmp_path, kind, undisturbed):
    bad = plan.shards[0].samples[2]
    _, rows = finish(plan, store, Faults(tmp_path, **{kind: frozenset({bad.noise_seed})}))
    failed = [row for row in rows if row["error"]]
    assert {(row["pair_id"], row["variant"]) for row in failed} == {(bad.pair_id, v) for v in plan.variants}
    assert all(row["error"].startswith("draw: ") and row["score"] is None for row in failed)
    # Whole shard 3 times, its two batches once, their halves once, the sample alone 3 times.
    assert all(row["attempts"] == 8 for row in failed)
    healthy = {key: row for key, row in by_id(rows).items() if row["error"] is None}
    assert healthy == {key: undisturbed[key] for key in healthy}


def test_an_image_that_the_evaluator_fails_on_is_isolated(plan, store, tmp_path):
    _, rows = finish(plan, store, Faults(tmp_path, score_raise_on=frozenset({"colors 3"})))
    failed = {(row["tag"], row["prompt"], row["error"][:6]) for row in rows if row["error"]}
    assert failed == {("colors", "colors number 3", "score:")}
    assert sum(row["error"] is not None for row in rows) == 4  # two images, two variants


@pytest.mark.parametrize("role", ["replica", "text_encoder", "evaluator"])
@pytest.mark.parametrize(("fault", "reason"), [("raise", "no such device"), ("exit", "its process ended")])
def test_an_actor_that_does_not_start_ends_the_run_with_the_reason(plan, store, tmp_path, role, fault, reason):
    faults = Faults(tmp_path, start={role: fault})
    summary = run(plan, PROFILE, None, store, workers=fake_workers(faults, store), replicas=2)
    assert not summary.complete
    assert summary.reason
    assert "does not start" in summary.reason
    assert reason in summary.reason
    assert store.manifest() is None


def test_an_actor_that_finds_no_room_ends_the_run_with_the_reason(plan, store, tmp_path):
    class Pending:
        async def start(self, variant):
            await asyncio.sleep(3600)

    workers = replace(fake_workers(Faults(tmp_path), store), replica=in_process(Pending))
    limits = Limits(start_timeout_s=0.1, pool_period_s=0.05)
    summary = run(plan, PROFILE, None, store, workers=workers, replicas=1, limits=limits)
    assert not summary.complete
    assert "does the cluster have room" in (summary.reason or "")


def test_a_users_mistake_found_in_an_actor_reaches_the_caller(plan, store, tmp_path):
    faults = Faults(tmp_path, start={"replica": "user"})
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        run(plan, PROFILE, None, store, workers=fake_workers(faults, store), replicas=2)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(failures=10, backoff_s=0), "replica-0 failed 10 times in a row, at last with RuntimeError: seed"),
        (Limits(failures=1000, backoff_s=0), "no image of variant bf16 could be made: draw: RuntimeError: seed"),
    ],
)
def test_where_nothing_can_be_drawn_the_run_stops_instead_of_writing_errors(plan, store, tmp_path, limits, reason):
    seeds = frozenset(sample.noise_seed for shard in plan.shards for sample in shard.samples)
    workers = fake_workers(Faults(tmp_path, raise_on=seeds), store)
    summary = run(plan, PROFILE, None, store, workers=workers, replicas=1, limits=limits)
    assert not summary.complete
    assert reason in (summary.reason or "")
    assert not store.shards()


def test_every_replica_works_on_one_call_while_one_more_waits(plan, store, tmp_path):
    class Slow(FakeReplica):
        async def draw(self, *args):
            await asyncio.sleep(0.02)
            return super().draw(*args)

    faults = Faults(tmp_path)
    actors = []

    def create():
        actors.append(in_process(Slow, faults)())
        return actors[-1]

    finish(plan, store, faults, workers=replace(fake_workers(faults, store), replica=create))
    assert [actor.most_unanswered for actor in actors] == [2, 2]


def test_missing_shards_alone_are_drawn_again(plan, store, tmp_path):
    summary, rows = finish(plan, store, Faults(tmp_path))
    resumed = ResultStore(str(tmp_path / "resumed"), "r1")
    resumed.open(plan)
    lost = plan.shards[3]
    for key in store.shards():
        if key != lost.key:
            name = shard_name(key)
            target = tmp_path / "resumed" / "run_id=r1" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(store.read(name))
    (tmp_path / "draws.txt").unlink()
    resumed_summary, again = finish(plan, resumed, Faults(tmp_path))
    assert resumed_summary == summary  # what was drawn before counts in the models' figures
    assert sorted(draws(tmp_path)) == sorted(f"{lost.key.variant} {s.noise_seed}" for s in lost.samples)
    assert by_id(again) == by_id(rows)
