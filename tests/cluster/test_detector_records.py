"""A detector that sees otherwise than before ends a run before it scores; the record is the output's, written once."""

import json
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from cluster_fakes import PROFILE, FakeEncoder, FakeReplica, Faults, small_plan
from in_process import in_process

from bitflux_core.errors import UserError
from cluster.detector_records import FOLDER, check_detector
from cluster.evaluator import EvaluatorActor
from cluster.run import run
from cluster.store import ResultStore, StorageError
from cluster.workers import Workers
from evaluators.base import Detection, Score
from evaluators.detector_check import DetectorRecord

SEEN = (("circle", 0.95), ("star", 0.62), ("square", 0.04))


def record(device: str = "H100", shift: float = 0.0) -> DetectorRecord:
    found = [Detection(label, score + shift, (1.0, 2.0, 30.0, 40.0)) for label, score in SEEN]
    return DetectorRecord.of("ab12", device, found)


class Scorer:
    """An evaluator whose detector's confidences depend on where it runs."""

    fingerprint = "toy-1"

    def __init__(self, record: DetectorRecord) -> None:
        self.record = record
        self.scored = 0

    def self_test(self, device: str) -> DetectorRecord:
        assert device == "cpu"
        return self.record

    def score(self, images: Sequence[np.ndarray], metadata) -> list[Score]:
        self.scored += len(images)
        return [Score(1.0, True, "") for _ in images]


@pytest.fixture
def builds(monkeypatch):
    """Sets the evaluator that actors in this process build."""
    monkeypatch.setattr("cluster.evaluator.claim_device", lambda: "cpu")
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
    return lambda scorer: monkeypatch.setattr("evaluators.registry.build_evaluator", lambda *_: scorer)


def start(store: ResultStore) -> None:
    EvaluatorActor({"toy": "toy-evaluator"}, {}, store).start()


def test_the_first_run_records_and_a_like_one_goes_on(builds, tmp_path):
    builds(Scorer(record()))
    start(ResultStore(str(tmp_path), "r1"))
    path = tmp_path / FOLDER / "ab12.json"
    kept = path.read_bytes()
    assert DetectorRecord.from_json(json.loads(kept)) == record()
    builds(Scorer(record("H200", 0.005)))
    start(ResultStore(str(tmp_path), "r2"))
    assert path.read_bytes() == kept


def test_shifted_confidences_are_refused_and_named(builds, tmp_path):
    builds(Scorer(record()))
    start(ResultStore(str(tmp_path), "r1"))
    builds(Scorer(record("T4", -0.05)))
    with pytest.raises(UserError) as caught:
        start(ResultStore(str(tmp_path), "r2"))
    message = str(caught.value)
    path = tmp_path / FOLDER / "ab12.json"
    for part in ("ab12", "H100", "T4", "became", f"remove {path}", "run on H100"):
        assert part in message
    assert "\n" not in message
    path.unlink()
    start(ResultStore(str(tmp_path), "r2"))  # accepted
    assert json.loads(path.read_bytes())["device"] == "T4"


def test_another_detector_and_another_output_have_their_own_records(tmp_path):
    check_detector(str(tmp_path / "one"), record())
    check_detector(str(tmp_path / "one"), replace(record("T4", -0.05), fingerprint="cd34"))
    check_detector(str(tmp_path / "two"), record("T4", -0.05))


def test_of_many_at_once_one_writes_and_the_others_compare(tmp_path):
    records = [record("H100"), record("T4", -0.05)] * 8

    def check(seen: DetectorRecord) -> str:
        try:
            check_detector(str(tmp_path), seen)
        except UserError:
            return "refused"
        return "taken"

    with ThreadPoolExecutor(len(records)) as pool:
        answers = list(pool.map(check, records))
    kept = json.loads((tmp_path / FOLDER / "ab12.json").read_bytes())["device"]
    assert answers == ["taken" if seen.device == kept else "refused" for seen in records]


def test_a_bucket_keeps_records_too():
    uri = f"memory://{uuid.uuid4()}"
    check_detector(uri, record())
    check_detector(uri, record("H200", 0.002))
    with pytest.raises(UserError, match=rf"remove {uri}/{FOLDER}/ab12\.json"):
        check_detector(uri, record("T4", 0.02))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"fingerprint": "ab12", "device": "", "torch": "", "seen": [3]}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "ab12.json").write_bytes(content)
    with pytest.raises(UserError, match=r"ab12\.json is no record of a detector .*remove it"):
        check_detector(str(tmp_path), record())


def test_a_storage_that_refuses_is_named(tmp_path):
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=FOLDER):
        check_detector(str(tmp_path), record())


def test_a_run_with_another_detector_ends_before_anything_is_scored(builds, tmp_path):
    check_detector(str(tmp_path / "results"), record())
    scorer = Scorer(record("T4", -0.05))
    builds(scorer)
    plan, store, faults = small_plan(), ResultStore(str(tmp_path / "results"), "r1"), Faults(tmp_path)
    workers = Workers(
        in_process(FakeReplica, faults),
        in_process(FakeEncoder, faults),
        in_process(EvaluatorActor, {"toy": "toy-evaluator"}, {}, store),
    )
    with pytest.raises(UserError, match="does not see what it saw on H100"):
        run(plan, PROFILE, None, store, workers=workers, replicas=1)
    assert scorer.scored == 0
    assert store.plan_digest() is None  # the run's name is free again
    scorer.record = record("T4", 0.001)
    assert run(plan, PROFILE, None, store, workers=workers, replicas=1).complete
    assert scorer.scored == plan.n_samples
