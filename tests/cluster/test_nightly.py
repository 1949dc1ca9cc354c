"""Nights over fake actors: the first one, the second one, what is reused, what is noticed, what is written."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from cluster_fakes import FINGERPRINTS, PROFILE, FakeReplica, FakeScorer, Faults, draws, fake_workers, small_workload
from in_process import in_process

from bitflux_core.errors import UserError
from cluster.manifests import MANIFESTS
from cluster.night_files import NightFiles
from cluster.night_report import write_night
from cluster.nightly import load_gates, night_plans, run_night
from cluster.run import run
from cluster.stored_images import StoredEncoder, StoredReplica
from evaluators.gates import Gates

GATES = Gates(
    scores=[
        {"against": against, "allowed_drop": 5, "confidence": 0.9, "smallest_n": 8}
        for against in ("baseline", "accepted")
    ],
    fidelity={"min_mean_psnr_db": 30, "smallest_n": 8},
    canary={"prompts_a_tag": 2, "images_per_prompt": 1, "min_mean_psnr_db": 30},
    latency={"against_accepted": 1.5},
    memory={"against_accepted": 1.1},
)


@pytest.fixture(autouse=True)
def actors_end_without_ray(monkeypatch):
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())


@pytest.fixture
def files(tmp_path) -> NightFiles:
    return NightFiles(str(tmp_path / "results"))


@pytest.fixture
def night(files, tmp_path):
    """Runs a night, writes it and returns its verdict; `drew` counts images by variant."""

    def call(name, *, faults=None, replica=FakeReplica, variants=("ternary",), stop=None, **fingerprints):
        faults = faults or Faults(tmp_path)

        def draw(plan, store, stored):
            workers = fake_workers(faults, store)
            workers = replace(workers, replica=in_process(replica, faults))
            if stored:
                workers = replace(
                    workers, replica=in_process(StoredReplica, stored), text_encoder=in_process(StoredEncoder)
                )
            if stop == store.run_id:
                raise KeyboardInterrupt
            return run(plan, PROFILE, None, store, workers=workers, replicas=1)

        workloads = [small_workload()]
        plans = night_plans(PROFILE, workloads, variants).with_canary(PROFILE, workloads, GATES.canary)
        plans = plans.known({**FINGERPRINTS, "ternary-int8": "b2", **fingerprints})
        before = len(draws(tmp_path))
        found = run_night(name, plans, GATES, files, draw)
        verdict = write_night(found, GATES, PROFILE.name, variants, files)
        drew = [line.split()[0] for line in draws(tmp_path)[before:]]
        return verdict, {variant: drew.count(variant) for variant in set(drew)}

    return call


def statuses(verdict, kind, against=None):
    return {f["status"] for f in verdict["findings"] if f["kind"] == kind and against in (None, f["against"])}


class OtherColors(FakeReplica):
    """Draws ternary images unlike the ones before."""

    def _image(self, variant, seed, embedding):
        return (
            255 - super()._image(variant, seed, embedding)
            if variant == "ternary"
            else super()._image(variant, seed, embedding)
        )


class OtherBaseline(FakeReplica):
    def _image(self, variant, seed, embedding):
        image = super()._image(variant, seed, embedding)
        return image + (variant == "bf16")


def test_the_first_night_draws_everything_and_compares_with_full_precision(night, files):
    verdict, drew = night("one")
    assert drew == {"bf16": 20, "ternary": 20}
    assert (verdict["verdict"], verdict["exit_code"], verdict["accepted"]) == ("pass", 0, None)
    assert {f["against"] for f in verdict["findings"]} == {"baseline"}
    assert "there is no accepted night" in verdict["notes"][0]


def test_the_second_night_draws_the_variant_anew_and_of_the_baseline_a_canary(night, files):
    first, _ = night("one")
    assert files.accept("one") == (1, True)
    verdict, drew = night("two")
    assert drew == {"bf16": 4, "ternary": 20}
    assert (verdict["verdict"], verdict["accepted"]) == ("pass", "one")
    assert verdict["runs"]["baseline"] == first["runs"]["baseline"]
    for kind in ("canary", "fidelity", "latency", "memory"):
        assert statuses(verdict, kind) == {"pass"}, kind
    assert statuses(verdict, "score", "accepted") == {"pass"}


def test_accepting_is_write_once_and_nothing_is_deleted(night, files, tmp_path):
    night("one")
    files.accept("one")
    record = tmp_path / "results" / "accepted" / files.verdict("one")["series"] / "00001.json"
    before = record.read_bytes()
    assert files.accept("one") == (1, False)
    night("two")
    assert files.accept("two") == (2, True)
    assert record.read_bytes() == before
    assert files.accepted(files.verdict("two")["series"]).night == "two"
    with pytest.raises(UserError, match="no such night"):
        files.accept("three")


def test_other_images_from_the_same_noise_are_a_regression_that_names_the_pairs(night, files, tmp_path):
    night("one")
    files.accept("one")
    verdict, _ = night("two", replica=OtherColors)
    assert (verdict["verdict"], verdict["exit_code"]) == ("regression", 1)
    assert statuses(verdict, "fidelity") == {"regression"}
    assert len(verdict["regressed_pairs"]) == 20
    folder = tmp_path / "results"
    for pair in verdict["regressed_pairs"]:
        assert (folder / pair["image"]).is_file()
        assert (folder / pair["reference_image"]).is_file()
    report = (folder / "nights" / "two" / "report.md").read_text()
    links = [part.split(")")[0] for part in report.split("](")[1:]]
    assert len(links) == 40
    assert all((folder / "nights" / "two" / link).is_file() for link in links)
    table = pq.read_table(folder / "nights" / "two" / "comparison.parquet")
    assert table.num_rows == 44  # 20 against each reference, and the canary's 4
    assert json.loads((folder / "nights" / "two" / "verdict.json").read_text()) == verdict


def test_a_lower_score_is_a_regression_of_its_tag(night, files, monkeypatch):
    night("one")
    files.accept("one")
    score = FakeScorer.score

    def worse(self, images, metadata):
        scores = score(self, images, metadata)
        return [replace(s, score=0.0) if m["tag"] == "colors" else s for s, m in zip(scores, metadata, strict=True)]

    monkeypatch.setattr(FakeScorer, "score", worse)
    verdict, _ = night("two")
    regressed = {(f["against"], f["tag"]) for f in verdict["findings"] if f["status"] == "regression"}
    assert {("accepted", "colors"), ("baseline", "colors")} <= regressed
    assert {pair["tag"] for pair in verdict["regressed_pairs"]} == {"colors"}
    assert all(pair["flipped"] for pair in verdict["regressed_pairs"])


def test_a_baseline_that_is_drawn_otherwise_is_noticed_by_the_canary(night, files):
    night("one")
    files.accept("one")
    verdict, _ = night("two", replica=OtherBaseline)
    assert statuses(verdict, "canary") == {"regression"}
    assert verdict["verdict"] == "regression"


def test_another_full_precision_model_is_drawn_whole(night, files):
    night("one")
    files.accept("one")
    verdict, drew = night("two", bf16="another")
    assert drew == {"bf16": 20, "ternary": 20}
    assert any("its model changed from a1 to another" in note for note in verdict["notes"])
    assert statuses(verdict, "canary") == set()


def test_another_evaluator_scores_stored_images_again_and_draws_none(night, files, monkeypatch):
    first, _ = night("one", variants=("ternary", "ternary-int8"))
    files.accept("one")
    monkeypatch.setattr(FakeScorer, "fingerprint", "toy-2")
    verdict, drew = night("two", variants=("ternary", "ternary-int8"), detector="other")
    assert drew == {"bf16": 4, "ternary": 20, "ternary-int8": 20}
    assert verdict["verdict"] == "pass", verdict["findings"]
    assert verdict["runs"]["baseline"] == "two-baseline-rescored"
    rescored = files.store("two-baseline-rescored").read_rows().to_pylist()
    original = files.store(first["runs"]["baseline"]).read_rows().to_pylist()
    assert {row["evaluator_fingerprint"] for row in rescored} == {"toy-2"}
    kept = ("sample_id", "image_digest", "seconds", "score")
    assert [[row[k] for k in kept] for row in rescored] == [[row[k] for k in kept] for row in original]
    files.accept("two")
    verdict, _ = night("three", variants=("ternary", "ternary-int8"), detector="other")
    assert verdict["runs"]["baseline"] == "two-baseline-rescored"


def test_failed_samples_make_the_night_incomplete(night, files, tmp_path):
    plans = night_plans(PROFILE, [small_workload()], ("ternary",))
    seed = plans.variants.shards[0].samples[0].noise_seed
    verdict, _ = night("one", faults=Faults(tmp_path, raise_on=frozenset([seed])))
    assert (verdict["verdict"], verdict["exit_code"]) == ("incomplete", 3)
    assert any("1 of 20 pairs lack a score" in f["message"] for f in verdict["findings"])
    with pytest.raises(UserError, match="incomplete"):
        files.accept("one")


def test_an_interrupted_night_goes_on_where_it_stopped(night, files):
    with pytest.raises(KeyboardInterrupt):
        night("one", stop="one-baseline")
    verdict, drew = night("one")
    assert drew == {"bf16": 20}
    assert verdict["verdict"] == "pass"


def test_an_accepted_night_whose_run_is_gone_is_named(night, files, tmp_path):
    night("one")
    files.accept("one")
    (tmp_path / "results" / "run_id=one-baseline" / "_manifest.json").unlink()
    with pytest.raises(UserError, match="the accepted night one lacks its run one-baseline"):
        night("two")


@pytest.mark.parametrize("name", sorted(path.stem for path in (MANIFESTS / "gates").glob("*.yaml")))
def test_the_embedded_gates_load(name):
    from cluster.profile import load_profile
    from cluster.workload import load_workload

    if name == "flux-dev":  # its prompts are fetched: the mini's tags are the same
        workloads = [load_workload("mini-geneval", None)]
    else:
        workloads = [load_workload(b, None) for b in load_profile(name).benchmarks]
    plan = night_plans(load_profile("mini"), workloads, ("ternary",)).baseline
    assert load_gates(name, plan).scores
