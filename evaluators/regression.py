"""Judging a night: gates over rows of scores, over images and over what the models took.

A regression is shown, not guessed: the upper confidence bound of the difference lies below the allowed drop. Too little
evidence is `undecided` and named; missing evidence is `incomplete`. Rows are those of evaluators/statistics.py, with
`prompt`, `image_index`, `image_digest` and `image_path` as well.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluators.gates import IDENTICAL_DB, Against, CanaryGate, FidelityGate, Gates
from evaluators.statistics import CONFIDENCE, OVERALL, Comparison, Row, compare

Status = Literal["pass", "undecided", "incomplete", "regression"]
Kind = Literal["score", "fidelity", "canary", "latency", "memory", "run"]
# From the one that any other outweighs to the one that outweighs all.
STATUSES: tuple[Status, ...] = ("pass", "undecided", "incomplete", "regression")


@dataclass(frozen=True)
class Finding:
    """What one gate says. `value`, `bound` and `limit` are in the gate's unit; `tag` is None where all tags count."""

    kind: Kind
    status: Status
    variant: str
    against: Against | None
    benchmark: str | None
    tag: str | None
    message: str
    value: float | None = None
    bound: float | None = None
    limit: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Pair:
    """A sample tonight and in the reference. `psnr_db` is known where both images were looked at."""

    reference: Row
    row: Row
    psnr_db: float | None = None

    @property
    def change(self) -> float | None:
        before, now = self.reference["score"], self.row["score"]
        return None if before is None or now is None else now - before

    @property
    def flipped(self) -> bool:
        """True where tonight's score is lower."""
        return self.change is not None and self.change < 0


def worst(findings: Sequence[Finding]) -> Status:
    """The verdict over all findings: a regression outweighs all else."""
    return max((finding.status for finding in findings), key=STATUSES.index, default="incomplete")


def judge_scores(
    gates: Gates,
    against: Against,
    benchmark: str,
    variant: str,
    reference_rows: Sequence[Row],
    rows: Sequence[Row],
    expected: Mapping[str, int],
) -> tuple[list[Comparison], list[Finding]]:
    """`variant` against its reference by tag: the comparisons with their 95 % intervals, and a finding for each gate.

    A paired bootstrap by prompt (evaluators/statistics.py). A one-sided bound of confidence c is the upper end of the
    two-sided interval of confidence 2c - 1.
    """
    reference_name = "bf16" if against == "baseline" else f"{variant}, accepted"

    def compared(confidence: float = CONFIDENCE) -> list[Comparison]:
        return compare(
            benchmark, reference_name, variant, reference_rows, rows, expected=expected, confidence=confidence
        )

    comparisons = compared()
    bounds: dict[float, dict[str, Comparison]] = {}
    findings = []
    failed = comparisons[-1].n_failed
    if failed > gates.allowed_failures:
        short = ", ".join(f"{c.tag} {c.n_failed}" for c in comparisons[:-1] if c.n_failed)
        message = f"{failed} of {comparisons[-1].n_expected} pairs lack a score ({short})"
        findings.append(Finding("run", "incomplete", variant, against, benchmark, None, message, n=failed))
    for comparison in comparisons:
        gate = gates.score_gate(against, benchmark, comparison.tag)
        if gate is None:
            continue
        level = 2 * gate.confidence - 1
        if level not in bounds:
            bounds[level] = {found.tag: found for found in compared(level)}
        bound = bounds[level][comparison.tag].ci_high
        status, message = _score_status(comparison, bound, gate.allowed_drop, gate.confidence, gate.smallest_n)
        findings.append(
            Finding(
                "score",
                status,
                variant,
                against,
                benchmark,
                comparison.tag,
                message,
                value=_points(comparison.delta),
                bound=_points(bound),
                limit=-gate.allowed_drop,
                n=comparison.n_scored,
            )
        )
    return comparisons, findings


def _score_status(
    comparison: Comparison, bound: float | None, allowed: float, confidence: float, smallest_n: int
) -> tuple[Status, str]:
    if comparison.n_scored < smallest_n:
        return "undecided", f"{comparison.n_scored} pairs, the gate asks for {smallest_n}"
    if bound is None or comparison.delta is None:
        return "undecided", "no confidence bound: a tag has fewer than two scored prompts"
    change = f"{100 * comparison.delta:+.1f} points (at most {100 * bound:+.1f} with {confidence:.1%} confidence)"
    if 100 * bound < -allowed:
        return "regression", f"{change}, allowed {-allowed:+.1f}"
    return "pass", change


def judge_fidelity(gate: FidelityGate, variant: str, benchmark: str, psnrs_db: Sequence[float]) -> Finding:
    """Tonight's images against the accepted night's of the same variant and noise."""
    mean = float(np.mean(psnrs_db)) if psnrs_db else None
    identical = sum(value >= IDENTICAL_DB for value in psnrs_db)
    message = f"{identical} of {len(psnrs_db)} images identical"
    status: Status = "pass"
    if mean is not None:
        message += f", mean PSNR {mean:.1f} dB (identical counts {IDENTICAL_DB:.0f})"
    if mean is None or len(psnrs_db) < gate.smallest_n:
        status, message = "undecided", f"{message}; the gate asks for {gate.smallest_n} images"
    elif mean < gate.min_mean_psnr_db:
        status, message = "regression", f"{message}, allowed {gate.min_mean_psnr_db:g} dB at least"
    limit = gate.min_mean_psnr_db
    return Finding(
        "fidelity", status, variant, "accepted", benchmark, None, message, value=mean, limit=limit, n=len(psnrs_db)
    )


def judge_canary(gate: CanaryGate, benchmark: str, pairs: Sequence[Pair], expected: int, on_cpu: bool) -> Finding:
    """Full precision drawn tonight against the accepted baseline; `on_cpu` where both were drawn on CPUs."""
    psnrs = [pair.psnr_db for pair in pairs if pair.psnr_db is not None]
    identical = sum(value >= IDENTICAL_DB for value in psnrs)
    mean = float(np.mean(psnrs)) if psnrs else None
    must_be_same = gate.identical_on_cpu and on_cpu
    message = f"{identical} of {expected} images identical to the baseline's"
    status: Status = "pass"
    if len(psnrs) < expected or mean is None:
        status, message = "incomplete", f"{expected - len(psnrs)} of {expected} images missing"
    elif must_be_same and identical < expected:
        status, message = "regression", f"{message}; on a CPU all must be"
    elif mean < gate.min_mean_psnr_db:
        status, message = (
            "regression",
            f"{message}, mean PSNR {mean:.1f} dB, allowed {gate.min_mean_psnr_db:g} at least",
        )
    limit = IDENTICAL_DB if must_be_same else gate.min_mean_psnr_db
    return Finding("canary", status, "bf16", "baseline", benchmark, None, message, value=mean, limit=limit, n=expected)


def judge_ratio(
    kind: Literal["latency", "memory"],
    against: Against,
    variant: str,
    value: float | None,
    reference: float | None,
    limit: float,
    incomparable: str | None,
) -> Finding:
    """What the model took, over what the reference took. `incomparable` says why the two cannot be compared."""
    if incomparable or not value or not reference:
        message = incomparable or "not measured on both sides"
        return Finding(kind, "undecided", variant, against, None, None, message, limit=limit)
    ratio = value / reference
    status: Status = "regression" if ratio > limit else "pass"
    message = f"{ratio:.3g} times {'full precision' if against == 'baseline' else 'the accepted night'}'s"
    if status == "regression":
        message += f", allowed {limit:g}"
    return Finding(kind, status, variant, against, None, None, message, value=ratio, limit=limit)


def pair_up(reference_rows: Sequence[Row], rows: Sequence[Row]) -> list[Pair]:
    """The samples that both have, in the order of `rows`."""
    references = {row["pair_id"]: row for row in reference_rows}
    return [Pair(references[row["pair_id"]], row) for row in rows if row["pair_id"] in references]


def psnr_db(image_HWC: np.ndarray, other_HWC: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, 10 log10(255^2 / MSE); identical ones count IDENTICAL_DB.

    Raises ValueError where their shapes differ.
    """
    if image_HWC.shape != other_HWC.shape:
        raise ValueError(f"images of {image_HWC.shape} and {other_HWC.shape} cannot be compared")
    mse = float(np.mean(np.square(image_HWC.astype(np.float64) - other_HWC)))
    return min(IDENTICAL_DB, 10 * math.log10(255**2 / mse)) if mse else IDENTICAL_DB


def named_pairs(findings: Sequence[Finding], pairs: Mapping[tuple[str, Against, str], Sequence[Pair]]) -> list[Pair]:
    """The image pairs that a report shows for `findings`: flipped ones for scores, the least alike for fidelity.

    `pairs` are keyed by variant, reference and benchmark. Worst first within a finding, each pair once.
    """
    chosen: dict[tuple[int, int], Pair] = {}
    for finding in findings:
        if finding.against is None or finding.benchmark is None:
            continue
        found = pairs.get((finding.variant, finding.against, finding.benchmark), ())
        if finding.kind == "score":
            of_tag = [p for p in found if p.flipped and finding.tag in (OVERALL, p.row["tag"])]
            ordered = sorted(of_tag, key=lambda pair: pair.change or 0.0)
        else:
            differing = [p for p in found if p.psnr_db is not None and p.psnr_db < IDENTICAL_DB]
            ordered = sorted(differing, key=lambda pair: pair.psnr_db or 0.0)
        chosen.update(((id(pair.reference), id(pair.row)), pair) for pair in ordered)
    return list(chosen.values())


def _points(score: float | None) -> float | None:
    return None if score is None else 100 * score
