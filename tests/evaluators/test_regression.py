"""The gates, by rows made for each of their answers."""

import numpy as np
import pytest
from pydantic import ValidationError

from evaluators.gates import IDENTICAL_DB, CanaryGate, FidelityGate, Gates, ScoreGate, unknown_names
from evaluators.regression import (
    Pair,
    judge_canary,
    judge_fidelity,
    judge_ratio,
    judge_scores,
    named_pairs,
    pair_up,
    psnr_db,
    worst,
)

FIDELITY = FidelityGate(min_mean_psnr_db=30, smallest_n=2)
CANARY = CanaryGate(prompts_a_tag=1, images_per_prompt=1, min_mean_psnr_db=30)
EXPECTED = {"colors": 60, "counting": 60}


def gates(*scores: dict, **others) -> Gates:
    defaults = {"allowed_drop": 5.0, "confidence": 0.99, "smallest_n": 40}
    rules = [{**defaults, "against": "accepted", **rule} for rule in scores or ({},)]
    return Gates(scores=rules, fidelity=FIDELITY, canary=CANARY, **others)


def rows(wrong: dict[str, int] | None = None, lost: int = 0) -> list[dict]:
    """Thirty prompts of two images in each tag; the first `wrong` images of a tag score 0, `lost` of colors none."""
    made = []
    for tag in EXPECTED:
        for place in range(60):
            score = float(place >= (wrong or {}).get(tag, 0))
            made.append(
                {
                    "pair_id": f"{tag}{place}",
                    "tag": tag,
                    "prompt": f"{tag} {place // 2}",
                    "prompt_index": place // 2,
                    "image_index": place % 2,
                    "score": None if tag == "colors" and place >= 60 - lost else score,
                }
            )
    return made


def judged(reference: list[dict], tonight: list[dict], *rules: dict, **others):
    _, findings = judge_scores(gates(*rules, **others), "accepted", "toy", "ternary", reference, tonight, EXPECTED)
    return {finding.tag: finding for finding in findings}


def test_equal_scores_pass():
    found = judged(rows({"colors": 9}), rows({"colors": 9}))
    assert {tag: (f.status, f.value, f.n) for tag, f in found.items()} == {
        "colors": ("pass", 0.0, 60),
        "counting": ("pass", 0.0, 60),
        "overall": ("pass", 0.0, 120),
    }


def test_a_drop_that_is_shown_is_a_regression_of_its_tag():
    found = judged(rows(), rows({"colors": 30}))
    assert {tag: f.status for tag, f in found.items()} == {
        "colors": "regression",
        "counting": "pass",
        "overall": "regression",
    }
    assert found["colors"].value == pytest.approx(-50)
    assert found["colors"].bound < -5
    assert "allowed -5.0" in found["colors"].message


def test_a_drop_that_chance_explains_passes():
    found = judged(rows(), rows({"colors": 4}))["colors"]  # two prompts of thirty
    assert found.value == pytest.approx(-100 * 4 / 60)  # more than is allowed, but not shown
    assert found.status == "pass"


def test_the_same_drop_asks_for_as_much_evidence_as_the_gate_says():
    reference, tonight = rows(), rows({"colors": 8})
    assert judged(reference, tonight, {"confidence": 0.75})["colors"].status == "regression"
    assert judged(reference, tonight, {"confidence": 0.999})["colors"].status == "pass"


def test_too_few_pairs_are_undecided_and_named():
    found = judged(rows(), rows({"colors": 60}), {"smallest_n": 100})
    assert found["colors"].status == "undecided"
    assert found["colors"].message == "60 pairs, the gate asks for 100"
    assert found["overall"].status == "regression"


def test_missing_scores_are_incomplete_unless_allowed():
    found = judged(rows(), rows(lost=3))
    assert (found[None].kind, found[None].status, found[None].n) == ("run", "incomplete", 3)
    assert found[None].message == "3 of 120 pairs lack a score (colors 3)"
    assert worst(list(found.values())) == "incomplete"
    assert None not in judged(rows(), rows(lost=3), allowed_failures=3)


def test_a_row_that_is_not_there_at_all_counts_as_missing():
    assert judged(rows(), rows()[1:])[None].n == 1


def test_the_last_gate_that_covers_a_tag_counts():
    rules = gates({}, {"tag": "colors", "allowed_drop": 60.0}, {"against": "baseline", "tag": "counting"})
    assert rules.score_gate("accepted", "toy", "colors").allowed_drop == 60
    assert rules.score_gate("accepted", "toy", "counting").allowed_drop == 5
    assert rules.score_gate("baseline", "toy", "colors") is None


def test_gates_that_can_never_apply_are_named():
    there = {"toy": {"colors", "counting"}}
    assert unknown_names(gates({"tag": "colours"}), there, set()).startswith("scores.0.tag")
    assert unknown_names(gates({}, {"benchmark": "tpy"}), there, {"other"}).startswith("scores.1.benchmark")
    assert unknown_names(gates({"tag": "overall"}, {"benchmark": "other", "tag": "x"}), there, {"other"}) is None


@pytest.mark.parametrize("value", [{"confidence": 95}, {"confidence": 0.5}, {"allowed_drop": -1}, {"smallest_n": 0}])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(ValidationError):
        ScoreGate(**{"against": "accepted", "allowed_drop": 1, "confidence": 0.9, "smallest_n": 1, **value})


def test_psnr():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert psnr_db(black, black) == IDENTICAL_DB
    assert psnr_db(black, white) == 0
    assert psnr_db(white, black) == 0
    assert psnr_db(black, black + np.uint8(1)) == pytest.approx(20 * np.log10(255))
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr_db(black, black[:4])


@pytest.mark.parametrize(
    ("psnrs", "status"),
    [
        ([IDENTICAL_DB] * 2, "pass"),
        ([31, 31], "pass"),
        ([29, 29], "regression"),
        ([20], "undecided"),
        ([], "undecided"),
    ],
)
def test_fidelity(psnrs, status):
    assert judge_fidelity(FIDELITY, "ternary", "toy", psnrs).status == status


@pytest.mark.parametrize(
    ("psnrs", "on_cpu", "status"),
    [
        ([IDENTICAL_DB, IDENTICAL_DB], True, "pass"),
        ([IDENTICAL_DB, 50], True, "regression"),
        ([IDENTICAL_DB, 50], False, "pass"),
        ([29, 29], False, "regression"),
        ([IDENTICAL_DB], True, "incomplete"),
        ([IDENTICAL_DB, None], False, "incomplete"),
    ],
)
def test_canary(psnrs, on_cpu, status):
    pairs = [Pair({}, {}, value) for value in psnrs]
    assert judge_canary(CANARY, "toy", pairs, 2, on_cpu).status == status


@pytest.mark.parametrize("kind", ["latency", "memory"])
@pytest.mark.parametrize(
    ("value", "reference", "incomparable", "status"),
    [
        (1.0, 1.0, None, "pass"),
        (1.3, 1.0, None, "regression"),
        (0.2, 1.0, None, "pass"),
        (9.0, 1.0, "other device", "undecided"),
        (None, 1.0, None, "undecided"),
        (1.0, None, None, "undecided"),
    ],
)
def test_latency_and_memory(kind, value, reference, incomparable, status):
    assert judge_ratio(kind, "accepted", "ternary", value, reference, 1.2, incomparable).status == status


def test_a_regression_outweighs_all_else_and_no_finding_is_no_pass():
    found = [
        judge_ratio("latency", "accepted", "t", value, 1.0, 1.2, incomparable)
        for value, incomparable in ((1.0, None), (1.0, "no"), (2.0, None))
    ]
    assert [worst(found[:1]), worst(found[:2]), worst(found)] == ["pass", "undecided", "regression"]
    assert worst([]) == "incomplete"


def test_the_flipped_pairs_of_a_regressed_tag_are_named():
    reference, tonight = rows(), rows({"colors": 30, "counting": 1})
    _, findings = judge_scores(gates(), "accepted", "toy", "ternary", reference, tonight, EXPECTED)
    of_colors = [f for f in findings if f.tag == "colors"]
    pairs = {("ternary", "accepted", "toy"): pair_up(reference, tonight)}
    named = named_pairs(of_colors, pairs)
    assert [(pair.row["tag"], pair.change) for pair in named] == [("colors", -1.0)] * 30
    assert len(named_pairs(findings, pairs)) == 31  # overall: those of all tags, each once
