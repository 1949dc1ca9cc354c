"""What the scheduler benchmark makes of what it saw; tests/jobs/test_bench.py runs it."""

import pytest

from cluster import benchmark
from cluster.benchmark import Measurement, attempt, idle_time
from cluster.store import ResultStore
from cluster.stub_workers import DrawLog


def test_idle_time_is_what_the_replicas_did_not_draw():
    # Ten seconds of two replicas: one waits one second between its calls, the other ends two seconds early.
    calls = [[(100.0, 104.0, 4), (105.0, 110.0, 5)], [(100.0, 104.0, 4), (104.0, 108.0, 4)]]
    found = idle_time(calls, replicas=2, samples=17)
    assert (found["wall_s"], found["draw_s"], found["samples"]) == (10.0, 17.0, 17)
    assert found["idle"] == pytest.approx(3 / 20)
    assert found["busy_share"] == pytest.approx(17 / 20)
    assert found["gap_p99_ms"] == 1000


def test_a_replica_that_drew_nothing_was_idle():
    assert idle_time([[(0.0, 4.0, 4)]], replicas=2, samples=4)["idle"] == 0.5


def test_what_was_drawn_twice_was_drawn_in_vain():
    assert idle_time([[(0.0, 4.0, 4)], [(0.0, 4.0, 4)]], replicas=2, samples=4)["idle"] == 0.5


def test_samples_that_nobody_drew_are_an_error():
    with pytest.raises(ValueError, match="4 of 8 samples were drawn"):
        idle_time([[(0.0, 4.0, 4)]], replicas=1, samples=8)


def test_the_draw_log_keeps_processes_apart(tmp_path, monkeypatch):
    log = DrawLog(tmp_path)
    for pid in (1, 2, 1):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        log.add(1.5, 2.5 + pid, pid)
    assert log.read() == [[(1.5, 3.5, 1), (1.5, 3.5, 1)], [(1.5, 4.5, 2)]]


@pytest.mark.parametrize(
    ("row", "columns", "met"),
    [
        (Measurement("scheduler", target="idle"), {"idle": 0.019, "wall_s": 32.0}, True),
        (Measurement("scheduler", target="idle"), {"idle": 0.021, "wall_s": 32.0}, False),
        (Measurement("Ray Data"), {"idle": 0.5}, None),
        (Measurement("plan", target="3 s"), {"wall_s": 2.5}, True),
        (Measurement("resume scan", target="2 s"), {"wall_s": 2.5}, False),
        (Measurement("driver's memory", target="100 MB"), {"growth_mb": 101.0, "wall_s": 1.0}, False),
    ],
)
def test_a_target_is_met_or_missed(row, columns, met):
    measured = attempt(row, lambda: columns)
    assert measured.met is met
    assert measured.error is None


def test_what_fails_is_a_row_with_its_error():
    def broken(what: str) -> dict:
        raise RuntimeError(f"no\n  {what}")

    failed = attempt(Measurement("plan", target="3 s"), broken, "memory")
    assert (failed.error, failed.met) == ("RuntimeError: no memory", None)


def test_the_published_benchmarks_are_planned_and_nothing_drawn_is_an_error(tmp_path):
    assert benchmark.SAMPLES == 26_212
    assert benchmark._planning(benchmark.SAMPLES)["samples"] == 26_212
    plan = benchmark._plan(benchmark.SAMPLES, ("bf16",), benchmark.LONG_SHARD)
    assert plan.n_samples == 26_212
    assert len(plan.prompts) == 2_953
    with pytest.raises(ValueError, match="0 of 2 shards"):
        benchmark._scanning(40, ResultStore(str(tmp_path), "stub"))
