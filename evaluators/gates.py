"""What counts as a regression, as declared in manifests/gates: limits, and how much evidence each asks for.

Scores are in points (hundredths of the score's range), fidelity in dB of PSNR, time and memory as ratios.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from evaluators.statistics import OVERALL

Against = Literal["baseline", "accepted"]
ANY = "*"
# What an image identical to its reference counts as, where its PSNR is infinite: above that of a megapixel image with
# one value off by one level (10 log10(255^2 * 3 * 2^20) = 113 dB).
IDENTICAL_DB = 120.0

Points = Annotated[float, Field(ge=0, le=100)]
Decibels = Annotated[float, Field(gt=0, le=IDENTICAL_DB)]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Declaration(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreGate(_Declaration):
    """A drop of more than `allowed_drop` points, shown with `confidence` (one-sided) over `smallest_n` pairs."""

    against: Against
    benchmark: str = ANY
    tag: str = ANY
    allowed_drop: Points
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    smallest_n: PositiveInt

    def covers(self, against: Against, benchmark: str, tag: str) -> bool:
        return self.against == against and self.benchmark in (ANY, benchmark) and self.tag in (ANY, tag)


class FidelityGate(_Declaration):
    """Tonight's images against the accepted night's, from the same noise: the mean of their PSNR."""

    min_mean_psnr_db: Decibels
    smallest_n: PositiveInt


class CanaryGate(_Declaration):
    """How much of the full-precision baseline is drawn again, and how like it that must be."""

    prompts_a_tag: PositiveInt
    images_per_prompt: PositiveInt
    min_mean_psnr_db: Decibels
    identical_on_cpu: bool = True


class RatioGate(_Declaration):
    """The largest allowed ratio to the accepted night's, and to full precision's. None: no gate."""

    against_accepted: Ratio | None = None
    against_baseline: Ratio | None = None


class Gates(_Declaration):
    """All gates of a profile. Of the score gates that cover a tag the last one counts."""

    scores: Annotated[tuple[ScoreGate, ...], Field(min_length=1)]
    fidelity: FidelityGate
    canary: CanaryGate
    latency: RatioGate = RatioGate()
    memory: RatioGate = RatioGate()
    allowed_failures: Annotated[int, Field(ge=0)] = 0  # images a variant and benchmark without a score

    def score_gate(self, against: Against, benchmark: str, tag: str) -> ScoreGate | None:
        return next((gate for gate in reversed(self.scores) if gate.covers(against, benchmark, tag)), None)


def unknown_names(gates: Gates, tags: dict[str, set[str]], benchmarks: set[str]) -> str | None:
    """The first score gate that can never apply, as `scores.2.tag: ...`; None where there is none.

    `tags` are those of the benchmarks that run, `benchmarks` all names that there are.
    """
    for place, gate in enumerate(gates.scores):
        if gate.benchmark not in {ANY, *tags, *benchmarks}:
            return f"scores.{place}.benchmark: there is no '{gate.benchmark}'"
        covered = [tags[name] for name in tags if gate.benchmark in (ANY, name)]
        if covered and gate.tag not in set().union({ANY, OVERALL}, *covered):
            return f"scores.{place}.tag: no benchmark that it covers has a tag '{gate.tag}'"
    return None
