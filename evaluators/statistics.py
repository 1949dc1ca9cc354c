"""What a benchmark's scores say: means by tag and overall, and paired differences, with bootstrap intervals.

A tag's score is the mean over its images; `overall` is the unweighted mean of the tags' scores. Images of one prompt
are alike, so the bootstrap draws prompts, each with all of its images and with both variants' scores of them, and draws
them within their tag (Davison and Hinkley 1997, "Bootstrap Methods and their Application": stratified resampling of
clusters). Intervals are percentiles. Standard errors are those of a mean over images in clusters (Liang and Zeger 1986,
"Longitudinal data analysis using generalized linear models"), with P / (P - 1) for few prompts. What cannot be known is
None: the score of a tag without a scored image, the interval and the standard error of a tag with a single scored
prompt (it does not show how prompts differ), and an overall that lacks a tag's.

Rows are mappings with `pair_id`, `tag`, `prompt_index` and `score` (None: the image could not be drawn or scored), and
`correct` where prompts with a correct image are to be counted.

Legend: V variants, P prompts, R resamples.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

OVERALL = "overall"
CONFIDENCE = 0.95
RESAMPLES = 10_000
POWER = 0.8  # chance that a difference of the smallest detectable size is found at `CONFIDENCE`
DETECTABLE = float(norm.ppf((1 + CONFIDENCE) / 2) + norm.ppf(POWER))  # standard errors

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A variant against a baseline on one tag, over the pairs that both have a score for.

    `standard_error` is the difference's; `detectable` the smallest true difference that as many prompts show with a
    chance of 80 %, None where no prompt differed: then the rows do not show how much prompts vary.
    """

    benchmark: str
    tag: str
    baseline: str
    variant: str
    baseline_score: float | None
    variant_score: float | None
    delta: float | None
    ci_low: float | None
    ci_high: float | None
    standard_error: float | None
    detectable: float | None
    n_expected: int
    n_scored: int
    n_failed: int


@dataclass(frozen=True)
class Estimate:
    """One variant's score on one tag.

    `images_correct` and `prompts_correct` are GenEval's "% correct images" and "% correct prompts": the shares of
    correct images, and of prompts with at least one; overall of all images and prompts, whatever their tags. They are
    of those that are known: a prompt without a correct image and with one that failed or never came is left out. None
    where images are not right or wrong, and overall where of a tag nothing is known.
    """

    tag: str
    score: float | None
    ci_low: float | None
    ci_high: float | None
    standard_error: float | None
    images_correct: float | None
    prompts_correct: float | None
    n_expected: int
    n_scored: int
    n_failed: int


def compare(
    benchmark: str,
    baseline: str,
    variant: str,
    baseline_rows: Sequence[Row],
    variant_rows: Sequence[Row],
    *,
    expected: Mapping[str, int] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> list[Comparison]:
    """Variant minus baseline: one comparison a tag, in the order of `expected` (or of the rows), `overall` last.

    `expected` is each tag's number of planned pairs; left out, it is the number of pairs found in either list.
    `confidence` is the interval's, which leaves the same share of the resamples out on either side.
    Raises ValueError where a list has a pair twice or a row's tag is not in `expected`.
    """
    tags = _by_tag([baseline_rows, variant_rows], expected)
    return [
        Comparison(
            benchmark=benchmark,
            tag=result.tag,
            baseline=baseline,
            variant=variant,
            baseline_score=result.scores[0],
            variant_score=result.scores[1],
            delta=result.contrast,
            ci_low=result.low,
            ci_high=result.high,
            standard_error=result.error,
            detectable=DETECTABLE * result.error if result.error else None,
            n_expected=result.expected,
            n_scored=result.scored,
            n_failed=result.expected - result.scored,
        )
        for result in _results(tags, np.array([-1.0, 1.0]), seed, resamples, confidence)
    ]


def interval(
    rows: Sequence[Row],
    *,
    expected: Mapping[str, int] | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Estimate]:
    """One variant's scores: an estimate a tag and `overall` last. Arguments and errors as in `compare`.

    `images_per_prompt` are planned: a prompt with fewer rows lacks some.
    """
    tags = _by_tag([rows], expected)
    correct = _correct(rows, [tag.name for tag in tags], images_per_prompt)
    return [
        Estimate(
            tag=result.tag,
            score=result.contrast,
            ci_low=result.low,
            ci_high=result.high,
            standard_error=result.error,
            images_correct=correct[result.tag][0],
            prompts_correct=correct[result.tag][1],
            n_expected=result.expected,
            n_scored=result.scored,
            n_failed=result.expected - result.scored,
        )
        for result in _results(tags, np.array([1.0]), seed, resamples)
    ]


@dataclass(frozen=True)
class _Tag:
    """One tag's images that all variants have a score for, summed by prompt: counts [P] and scores [V, P]."""

    name: str
    expected: int
    images_P: np.ndarray
    sums_VP: np.ndarray

    @property
    def scored(self) -> int:
        return int(self.images_P.sum())

    def scores(self) -> np.ndarray | None:
        """Each variant's mean over the images, [V]."""
        return self.sums_VP.sum(axis=1) / self.scored if self.scored else None

    def standard_error(self, contrast_V: np.ndarray) -> float | None:
        """Of the variants' means weighted by `contrast_V`: prompts are the clusters."""
        prompts = len(self.images_P)
        if prompts < 2:
            return None
        totals_P = contrast_V @ self.sums_VP
        residuals_P = totals_P - totals_P.sum() / self.scored * self.images_P
        return math.sqrt(prompts / (prompts - 1) * float(residuals_P @ residuals_P)) / self.scored

    def resampled(self, seed: int, resamples: int) -> np.ndarray | None:
        """Each variant's mean over the images of P prompts drawn with replacement, [V, R]."""
        prompts = len(self.images_P)
        if prompts < 2:
            return None
        # The tag's name is in the seed: its interval does not depend on which other tags there are.
        generator = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        draws_RP = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
        return (self.sums_VP @ draws_RP.T) / (draws_RP @ self.images_P)


@dataclass(frozen=True)
class _Result:
    tag: str
    expected: int
    scored: int
    scores: list[float] | list[None]
    contrast: float | None
    low: float | None
    high: float | None
    error: float | None


def _results(
    tags: Sequence[_Tag], contrast_V: np.ndarray, seed: int, resamples: int, confidence: float = CONFIDENCE
) -> list[_Result]:
    """Every tag's scores, their sum weighted by `contrast_V` and its interval; then those of the mean over the tags."""
    scores = [tag.scores() for tag in tags]
    draws = [tag.resampled(seed, resamples) for tag in tags]
    errors = [tag.standard_error(contrast_V) for tag in tags]
    results = [
        _result(tag.name, tag.expected, tag.scored, contrast_V, scores_V, draws_VR, error, confidence)
        for tag, scores_V, draws_VR, error in zip(tags, scores, draws, errors, strict=True)
    ]
    expected, scored = sum(tag.expected for tag in tags), sum(tag.scored for tag in tags)
    # Tags are drawn apart from each other, so the r-th resample of the overall is the mean of the tags' r-th ones.
    mean_V, mean_VR = _mean(scores), _mean(draws)
    known = [error for error in errors if error is not None]
    # Tags are apart from each other, and the overall is their unweighted mean.
    error = math.hypot(*known) / len(known) if known and len(known) == len(errors) else None
    return [*results, _result(OVERALL, expected, scored, contrast_V, mean_V, mean_VR, error, confidence)]


def _result(
    tag: str,
    expected: int,
    scored: int,
    contrast_V: np.ndarray,
    scores_V: np.ndarray | None,
    draws_VR: np.ndarray | None,
    error: float | None,
    confidence: float,
) -> _Result:
    low = high = contrast = None
    if scores_V is not None:
        contrast = float(contrast_V @ scores_V)
    if draws_VR is not None:
        tail = (1 - confidence) / 2
        low, high = np.quantile(contrast_V @ draws_VR, [tail, 1 - tail]).tolist()
    scores = [None] * len(contrast_V) if scores_V is None else scores_V.tolist()
    return _Result(tag, expected, scored, scores, contrast, low, high, error)


def _mean(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.mean(known, axis=0) if known and len(known) == len(parts) else None


def _by_tag(rows_by_variant: Sequence[Sequence[Row]], expected: Mapping[str, int] | None) -> list[_Tag]:
    scores = [_scores_by_pair(rows) for rows in rows_by_variant]
    pairs: dict[str, Row] = {row["pair_id"]: row for rows in rows_by_variant for row in rows}
    rows_by_tag: dict[str, list[Row]] = {tag: [] for tag in expected or ()}
    for row in pairs.values():
        if expected is not None and row["tag"] not in expected:
            raise ValueError(f"pair {row['pair_id']} has the tag {row['tag']!r}, of which none are expected")
        rows_by_tag.setdefault(row["tag"], []).append(row)

    tags = []
    for name, rows in rows_by_tag.items():
        by_prompt: dict[int, list[list[float]]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: row["pair_id"]):  # a fixed order of summation
            values = [by_pair[row["pair_id"]] for by_pair in scores if row["pair_id"] in by_pair]
            if len(values) == len(scores):
                by_prompt[row["prompt_index"]].append(values)
        images_P = np.array([len(by_prompt[index]) for index in sorted(by_prompt)], dtype=np.int64)
        sums_PV = [np.sum(by_prompt[index], axis=0) for index in sorted(by_prompt)]
        sums_VP = np.array(sums_PV).reshape(len(images_P), len(scores)).T
        tags.append(_Tag(name, len(rows) if expected is None else expected[name], images_P, sums_VP))
    return tags


def _correct(
    rows: Sequence[Row], tags: Sequence[str], images_per_prompt: int
) -> dict[str, tuple[float | None, float | None]]:
    """The shares of correct images and of prompts with one, by tag and overall; of what is known."""
    answers: dict[tuple[str, int], list[bool | None]] = defaultdict(list)
    for row in rows:
        answers[row["tag"], row["prompt_index"]].append(row.get("correct"))
    images: dict[str, list[bool]] = {tag: [] for tag in tags}
    prompts: dict[str, list[bool]] = {tag: [] for tag in tags}
    for (tag, _), some in answers.items():
        known = [bool(answer) for answer in some if answer is not None]
        images[tag] += known
        if any(known) or len(known) >= max(images_per_prompt, len(some)):
            prompts[tag].append(any(known))
    shares = {tag: (_share([images[tag]]), _share([prompts[tag]])) for tag in tags}
    return {**shares, OVERALL: (_share([*images.values()]), _share([*prompts.values()]))}


def _share(groups: Sequence[Sequence[bool]]) -> float | None:
    """How many of all are true; None where a group has none."""
    if not groups or not all(groups):
        return None
    return sum(map(sum, groups)) / sum(map(len, groups))


def _scores_by_pair(rows: Sequence[Row]) -> dict[str, float]:
    """The score of every pair that has one; a score that is no number counts as none."""
    seen: set[str] = set()
    scores: dict[str, float] = {}
    for row in rows:
        if row["pair_id"] in seen:
            raise ValueError(f"pair {row['pair_id']} occurs twice in one variant's rows")
        seen.add(row["pair_id"])
        if row["score"] is not None and math.isfinite(row["score"]):
            scores[row["pair_id"]] = float(row["score"])
    return scores
