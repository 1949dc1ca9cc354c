"""The tables that end a run: two variants, one alone, three; and a run with failures."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bitflux_core.samples import Sample
from cluster.audit import ModelMetrics
from cluster.plan import Plan, build_plan
from cluster.profile import load_profile
from cluster.run import RunSummary
from cluster.store import ResultStore
from cluster.workload import load_workload
from jobs._report import print_report, scores_of

Scorer = Callable[[str, Sample], float | None]


def plan_of(*variants: str) -> Plan:
    """Two prompts a tag, two images each."""
    workload = load_workload("mini-geneval")
    return build_plan(load_profile("mini"), [workload], variants, 2, 2, dict.fromkeys(variants, "print"))


@pytest.fixture
def report(tmp_path: Path):
    """Commits a score for every sample of a plan, and returns the comparisons and the words of what is printed."""

    def run(plan: Plan, score: Scorer, n_failed: int = 0, halved: str | None = None, reason: str | None = None):
        store = ResultStore(str(tmp_path), "mine")
        store.open(plan)
        for shard in plan.shards:
            rows = [
                {
                    "variant": shard.key.variant,
                    "benchmark": shard.key.benchmark,
                    "pair_id": sample.pair_id,
                    "tag": sample.tag,
                    "prompt_index": sample.prompt_index,
                    "score": found,
                    "correct": None if found is None or reason else found > 0.5,
                    "reason": reason if reason and found is not None else "",
                    "drawn_batch_size": 2 if sample.tag == halved else None,
                }
                for sample in shard.samples
                for found in [score(shard.key.variant, sample)]
            ]
            store.commit(shard.key, rows, None)
        models = [ModelMetrics(v, 23_840_000_000, 3_660_000_000, "cuda-peak", 1.25, "print") for v in plan.variants]
        summary = RunSummary(True, None, plan.n_samples, plan.n_samples, n_failed, models)
        stream = io.StringIO()
        scores = scores_of(plan, store)
        print_report(Console(file=stream, width=140), plan, store, summary, scores)
        return scores.comparisons, [line.replace("│", " ").split() for line in stream.getvalue().splitlines()]

    return run


def test_two_variants_side_by_side(report):
    def score(variant: str, sample: Sample) -> float:
        return float(sample.tag != "position" and (variant == "bf16" or sample.image_index == 0))

    comparisons, lines = report(plan_of("bf16", "ternary"), score)
    assert ["mini-geneval", "colors", "100.0", "50.0", "-50.0", "-50.0", "to", "-50.0", "-", "4", "0"] in lines
    assert ["mini-geneval", "position", "0.0", "0.0", "+0.0", "+0.0", "to", "+0.0", "-", "4", "0"] in lines
    overall = next(line for line in lines if "overall" in line)
    assert overall == ["mini-geneval", "overall", "83.3", "41.7", "-41.7", "-41.7", "to", "-41.7", "-", "24", "0"]
    assert ["ternary", "23.84", "GB", "3.66", "GB", "1.25", "print"] in lines
    assert any("CUDA" in line for line in lines)
    # Of 24 images and 12 prompts, those of position are all wrong; else bf16's are right, and ternary's first ones.
    said = [" ".join(line) for line in lines]
    assert "mini-geneval, bf16: 83.3 % correct images, 83.3 % correct prompts" in said
    assert "mini-geneval, ternary: 41.7 % correct images, 83.3 % correct prompts" in said
    assert len(comparisons) == 7


def test_one_variant_alone(report):
    comparisons, lines = report(plan_of("ternary"), lambda variant, sample: 1.0)
    assert comparisons == []
    assert ["mini-geneval", "counting", "100.0", "100.0", "to", "100.0", "4", "0"] in lines


def test_every_variant_is_compared_with_full_precision(report):
    comparisons, _ = report(plan_of("ternary", "bf16", "ternary-int8"), lambda variant, sample: 1.0)
    assert {(c.baseline, c.variant) for c in comparisons} == {("bf16", "ternary"), ("bf16", "ternary-int8")}


def test_scores_that_are_not_right_or_wrong_say_how_they_were_judged(report):
    def score(variant: str, sample: Sample) -> float | None:
        return None if sample.tag == "colors" else 0.7

    _, lines = report(plan_of("bf16", "ternary"), score, reason="compatible, rules")
    said = [" ".join(line) for line in lines]
    assert "mini-geneval was judged by: compatible, rules" in said
    assert not any("% correct" in line for line in said)


def test_without_full_precision_the_first_is_the_baseline(report):
    comparisons, _ = report(plan_of("ternary-reference", "ternary"), lambda variant, sample: 1.0)
    assert {(c.baseline, c.variant) for c in comparisons} == {("ternary-reference", "ternary")}


def test_failures_are_counted_and_said(report, capsys):
    def score(variant: str, sample: Sample) -> float | None:
        return None if variant == "ternary" and sample.tag == "colors" else 1.0

    _, lines = report(plan_of("bf16", "ternary"), score, n_failed=4)
    assert ["mini-geneval", "colors", "-", "-", "-", "-", "-", "4", "4"] in lines
    assert "4 images failed" in capsys.readouterr().err


@pytest.mark.parametrize("halved", ["counting", None])
def test_images_drawn_in_smaller_batches_are_counted(report, capsys, halved):
    report(plan_of("bf16", "ternary"), lambda variant, sample: 1.0, halved=halved)
    assert ("8 images were drawn in smaller batches than planned" in capsys.readouterr().err) == bool(halved)
