"""Scores, paired differences and their intervals."""

import dataclasses

import numpy as np
import pytest

from evaluators.statistics import OVERALL, compare, interval

TAGS = ("colors", "counting")


def rows(scores_by_tag: dict[str, list[list[float | None]]]) -> list[dict]:
    """One row an image from {tag: [[scores of one prompt's images], ...]}."""
    return [
        {"pair_id": f"{tag}-{prompt}-{image}", "tag": tag, "prompt_index": prompt, "score": score}
        for tag, prompts in scores_by_tag.items()
        for prompt, images in enumerate(prompts)
        for image, score in enumerate(images)
    ]


def against(baseline: list[dict], variant: list[dict], **more) -> dict:
    return {one.tag: one for one in compare("geneval", "bf16", "ternary", baseline, variant, **more)}


def random_scores(seed: int, prompts: int = 12, images: int = 4) -> dict[str, list[list[float | None]]]:
    generator = np.random.default_rng(seed)
    return {tag: generator.integers(0, 2, (prompts, images)).astype(float).tolist() for tag in TAGS}


def test_means_by_tag_and_unweighted_overall():
    baseline = rows({"colors": [[1, 1], [1, 0], [0, 0], [1, 1]], "counting": [[1, 1], [1, 1]]})
    variant = rows({"colors": [[1, 0], [0, 0], [0, 0], [1, 1]], "counting": [[1, 1], [0, 1]]})
    result = against(baseline, variant)
    assert list(result) == ["colors", "counting", OVERALL]
    colors, counting, overall = result.values()
    assert (colors.baseline_score, colors.variant_score, colors.delta) == (0.625, 0.375, -0.25)
    assert (counting.baseline_score, counting.variant_score, counting.delta) == (1.0, 0.75, -0.25)
    assert (overall.baseline_score, overall.variant_score, overall.delta) == (0.8125, 0.5625, -0.25)
    assert (overall.benchmark, overall.baseline, overall.variant) == ("geneval", "bf16", "ternary")
    assert (overall.n_expected, overall.n_scored, overall.n_failed) == (12, 12, 0)
    assert colors.ci_low < colors.delta < colors.ci_high


def test_field_names_are_the_published_ones():
    (result, _) = compare("b", "x", "y", rows({"t": [[1.0]]}), rows({"t": [[1.0]]}))
    assert list(dataclasses.asdict(result)) == [
        "benchmark",
        "tag",
        "baseline",
        "variant",
        "baseline_score",
        "variant_score",
        "delta",
        "ci_low",
        "ci_high",
        "standard_error",
        "detectable",
        "n_expected",
        "n_scored",
        "n_failed",
    ]


def test_a_pair_counts_only_when_both_are_scored():
    baseline = rows({"t": [[1, None], [1, 1], [float("nan"), 0]]})
    variant = rows({"t": [[0, 0], [None, 1], [1, 1]]})
    result = against(baseline, variant)["t"]
    # pairs left: (1, 0), (1, 1), (0, 1)
    assert result.baseline_score == pytest.approx(2 / 3)
    assert result.variant_score == pytest.approx(2 / 3)
    assert (result.n_expected, result.n_scored, result.n_failed) == (6, 3, 3)


def test_pairs_that_never_came_are_failures_against_the_plan():
    baseline, variant = rows({"t": [[1, 1], [0, 1]]}), rows({"t": [[1, 1], [0, 1]]})[:-1]
    result = against(baseline, variant, expected={"t": 8})
    assert (result["t"].n_expected, result["t"].n_scored, result["t"].n_failed) == (8, 3, 5)
    assert against(baseline, variant)["t"].n_expected == 4


def test_an_empty_tag_has_no_score_and_leaves_the_overall_without_one():
    scores = rows({"colors": [[1, 0], [1, 1]], "counting": [[None, None], [None, None]]})
    result = against(scores, scores, expected={"colors": 4, "counting": 4, "position": 2})
    assert list(result) == ["colors", "counting", "position", OVERALL]
    for tag, expected in (("counting", 4), ("position", 2)):
        empty = result[tag]
        assert (empty.baseline_score, empty.variant_score, empty.delta, empty.ci_low, empty.ci_high) == (None,) * 5
        assert (empty.n_expected, empty.n_scored, empty.n_failed) == (expected, 0, expected)
    overall = result[OVERALL]
    assert (overall.delta, overall.ci_low, overall.ci_high) == (None, None, None)
    assert (overall.n_expected, overall.n_scored, overall.n_failed) == (10, 4, 6)


def test_a_single_prompt_has_a_score_but_no_interval():
    scores = {"colors": [[1, 0], [1, 1]], "counting": [[1, 0, 1, 1]]}
    result = against(rows(scores), rows(scores))
    assert result["counting"].baseline_score == 0.75
    assert (result["counting"].ci_low, result["counting"].ci_high) == (None, None)
    assert result["colors"].ci_low is not None
    assert result[OVERALL].delta == 0.0
    assert (result[OVERALL].ci_low, result[OVERALL].ci_high) == (None, None)


def test_identical_variants_differ_by_exactly_nothing():
    scores = rows(random_scores(0))
    for result in against(scores, scores).values():
        assert (result.delta, result.ci_low, result.ci_high) == (0.0, 0.0, 0.0)


def test_swapping_the_variants_turns_the_interval_round():
    one, two = rows(random_scores(1)), rows(random_scores(2))
    forward, backward = against(one, two), against(two, one)
    for tag, result in forward.items():
        mirrored = backward[tag]
        assert result.delta == pytest.approx(-mirrored.delta, abs=1e-12)
        assert result.ci_low == pytest.approx(-mirrored.ci_high, abs=1e-12)
        assert result.ci_high == pytest.approx(-mirrored.ci_low, abs=1e-12)


def test_the_result_depends_on_the_seed_and_not_on_the_order():
    one, two = rows(random_scores(1)), rows(random_scores(2))
    expected = {"counting": 48, "colors": 48}
    result = against(one, two, expected=expected)
    assert against(one[::-1], two[::-1], expected=expected) == result
    assert against(one, two, expected=expected, seed=1)["colors"].ci_low != pytest.approx(result["colors"].ci_low, 1e-9)


def test_a_tags_interval_does_not_depend_on_the_other_tags():
    one, two = rows(random_scores(1)), rows(random_scores(2))
    alone = against([row for row in one if row["tag"] == "colors"], [row for row in two if row["tag"] == "colors"])
    assert alone["colors"] == against(one, two)["colors"]


def test_images_of_a_prompt_are_drawn_together():
    """Four alike images a prompt tell no more than one: the interval is as wide as with one image, not half as wide."""
    generator = np.random.default_rng(0)
    by_prompt = generator.integers(0, 2, (60, 1)).astype(float)
    one, four = (interval(rows({"t": np.repeat(by_prompt, n, axis=1).tolist()}))[0] for n in (1, 4))
    assert four.ci_high - four.ci_low == pytest.approx(one.ci_high - one.ci_low)


def test_tags_are_drawn_apart():
    """A difference between tags' levels is no uncertainty of the overall."""
    scores = rows({"colors": [[1.0]] * 10, "counting": [[0.0]] * 10})
    overall = interval(scores)[-1]
    assert (overall.score, overall.ci_low, overall.ci_high) == (0.5, 0.5, 0.5)


def test_interval_of_one_variant_matches_theory():
    scores = np.zeros((400, 1))
    scores[:100] = 1.0
    (tag, overall) = interval(rows({"t": scores.tolist()}), expected={"t": 401})
    half_width = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert tag.score == 0.25
    assert tag.ci_low == pytest.approx(0.25 - half_width, abs=0.004)
    assert tag.ci_high == pytest.approx(0.25 + half_width, abs=0.004)
    assert (tag.n_expected, tag.n_scored, tag.n_failed) == (401, 400, 1)
    assert dataclasses.replace(overall, tag="t") == tag


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Prompts of unequal difficulty, so images of one are alike; the variant is worse by 0.06 everywhere."""
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        drawn: list[dict] = [{}, {}]
        for tag in TAGS:
            difficulty = generator.beta(2, 1, (40, 1)) * 0.88
            for variant, chance in enumerate((difficulty + 0.06, difficulty)):
                drawn[variant][tag] = (generator.random((40, 4)) < chance).astype(float).tolist()
        overall = against(rows(drawn[0]), rows(drawn[1]), resamples=1000)[OVERALL]
        covered.append(overall.ci_low <= -0.06 <= overall.ci_high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_a_pair_that_occurs_twice_is_refused():
    scores = rows({"t": [[1.0]]})
    with pytest.raises(ValueError, match="t-0-0 occurs twice"):
        compare("b", "x", "y", scores * 2, scores)


def test_an_unplanned_tag_is_refused():
    with pytest.raises(ValueError, match="'t'"):
        interval(rows({"t": [[1.0]]}), expected={"colors": 1})


def test_no_rows_have_no_score():
    (overall,) = interval([])
    assert (overall.tag, overall.score, overall.n_expected) == (OVERALL, None, 0)


def test_standard_errors_take_prompts_as_clusters():
    """Two prompts of two images each, alike within: as uncertain as two images, not four. By hand:
    mean 0.5, residuals of the prompts' sums +1 and -1, so sqrt(2 / 1 * 2) / 4."""
    [tag, overall] = interval(rows({"colors": [[1, 1], [0, 0]]}))
    assert tag.standard_error == overall.standard_error == pytest.approx(0.5)
    [apart, _] = interval(rows({"colors": [[1], [1], [0], [0]]}))
    assert apart.standard_error == pytest.approx((4 / 3 * 4 * 0.25) ** 0.5 / 4)


def test_the_bootstrap_and_the_standard_error_agree():
    scores = random_scores(3, prompts=60)
    for one in interval(rows(scores)):
        assert (one.ci_high - one.ci_low) / (2 * 1.96) == pytest.approx(one.standard_error, rel=0.1)


def test_the_overall_standard_error_is_that_of_the_tags_mean():
    first, second, overall = interval(rows(random_scores(4)))
    expected = (first.standard_error**2 + second.standard_error**2) ** 0.5 / 2
    assert overall.standard_error == pytest.approx(expected)


def test_a_difference_of_the_detectable_size_is_found_four_times_of_five():
    generator = np.random.default_rng(5)
    base = np.full((40, 1), 0.5)
    detectable = against(
        rows({"t": base.tolist()}), rows({"t": (base + generator.normal(0, 0.1, base.shape)).tolist()})
    )
    true_difference = detectable["t"].detectable
    found = 0
    for _ in range(200):
        variant = base + true_difference + generator.normal(0, 0.1, base.shape)
        found += against(rows({"t": base.tolist()}), rows({"t": variant.tolist()}), resamples=300)["t"].ci_low > 0
    assert 0.6 < found / 200 < 0.95


def test_of_identical_variants_it_is_not_known_what_could_be_detected():
    one = against(rows({"t": [[1], [0]]}), rows({"t": [[1], [0]]}))["t"]
    assert (one.delta, one.standard_error, one.detectable) == (0, 0, None)


def right_or_wrong(scores_by_tag: dict[str, list[list[float | None]]]) -> list[dict]:
    return [{**row, "correct": None if row["score"] is None else row["score"] > 0.5} for row in rows(scores_by_tag)]


def test_correct_images_and_prompts_are_shares_of_all_where_it_is_known():
    """As GenEval's summary has them: overall is no mean of the tags."""
    scored = right_or_wrong({"colors": [[1, 0], [0, 0], [0, None], [1, None]], "counting": [[0, 0], [1, 1]]})
    found = {one.tag: (one.images_correct, one.prompts_correct) for one in interval(scored, images_per_prompt=2)}
    # Of the third prompt it is not known: its other image might have been right.
    assert found == {"colors": (2 / 6, 2 / 3), "counting": (0.5, 0.5), OVERALL: (4 / 10, 3 / 5)}
    assert {(one.images_correct, one.prompts_correct) for one in interval(rows({"t": [[0.3]]}))} == {(None, None)}


def test_a_prompt_whose_images_never_came_is_not_wrong():
    """Wrong where all of them are, right where one is; with a planned one missing, and none right, not known."""
    scored = right_or_wrong({"colors": [[0, 0], [0], [1], [0, 1]], "counting": [[0], [0]]})
    expected = {"colors": 8, "counting": 4}
    colors, counting, overall = interval(scored, expected=expected, images_per_prompt=2)
    assert (colors.prompts_correct, counting.prompts_correct, overall.prompts_correct) == (2 / 3, None, None)
    assert (colors.images_correct, counting.images_correct, overall.images_correct) == (2 / 6, 0.0, 2 / 8)
    *_, empty, overall = interval(scored[:6], expected={"colors": 8, "position": 2}, images_per_prompt=2)
    assert (empty.images_correct, overall.images_correct, overall.prompts_correct) == (None, None, None)
