"""How near the variants' images are to their full-precision twins, as a table and in plain values."""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.plan import Plan
from cluster.store import ResultStore
from evaluators.statistics import interval
from jobs._plan_report import images_by_tag

if TYPE_CHECKING:
    from evaluators.fidelity import Fidelity

MEASURES = {"psnr_db": ("PSNR, dB", 1), "ssim": ("SSIM", 3), "clip_similarity": ("CLIP", 4), "lpips": ("LPIPS", 3)}


@dataclass(frozen=True)
class FidelityReport:
    """A variant's images of one benchmark. `measures`: mean over the tags and its 95 % interval, by measure; those
    without a model are left out. `bands_db`: signal over error by spatial frequency."""

    variant: str
    benchmark: str
    measures: dict[str, tuple[float | None, float | None, float | None]]
    bands_db: dict[str, float | None]
    n_expected: int
    n_compared: int


def fidelity_of(plan: Plan, store: ResultStore) -> list[FidelityReport]:
    """What the comparisons of a complete run say."""
    from cluster.fidelity import read_fidelity
    from evaluators.fidelity import band_signal_to_error_db

    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in read_fidelity(store).to_pylist():
        rows[row["variant"], row["benchmark"]].append(row)
    expected = images_by_tag(plan)
    reports = []
    for (variant, benchmark), some in sorted(rows.items()):
        compared = [row for row in some if row["error"] is None]
        measures = {}
        for measure in MEASURES:
            scored = [{**row, "score": row[measure]} for row in some]
            if any(row["score"] is not None for row in scored):
                overall = interval(scored, expected=expected[benchmark])[-1]
                measures[measure] = (overall.score, overall.ci_low, overall.ci_high)
        bands = band_signal_to_error_db([_as_fidelity(row) for row in compared])
        known = {band: value if math.isfinite(value) else None for band, value in bands.items()}
        reports.append(FidelityReport(variant, benchmark, measures, known, len(some), len(compared)))
    return reports


def print_fidelity(console: Console, reports: list[FidelityReport]) -> None:
    """Two tables: likeness, and error by frequency. Nothing where nothing was compared."""
    if not reports:
        return
    likeness = Table("variant", "benchmark", "measure", title="images against bf16 from the same noise")
    for heading in ("mean", "95 % interval", "images"):
        likeness.add_column(heading, justify="right")
    bands = Table("variant", "benchmark", title="signal over error in dB, by cycles a pixel up to")
    for band in reports[0].bands_db:
        bands.add_column(band, justify="right")
    for report in reports:
        images = f"{report.n_compared}/{report.n_expected}"
        for measure, (heading, digits) in MEASURES.items():
            cells = _cells(report.measures.get(measure), digits)
            seen = images if measure in report.measures else "no model"
            likeness.add_row(report.variant, report.benchmark, heading, *cells, seen)
        likeness.add_section()
        found = ["-" if value is None else f"{value:.1f}" for value in report.bands_db.values()]
        bands.add_row(report.variant, report.benchmark, *found)
    console.print(likeness)
    console.print(bands)


def fidelity_document(reports: list[FidelityReport]) -> dict[str, Any]:
    return {"fidelity": [asdict(report) for report in reports]}


def _cells(measured: tuple[float | None, float | None, float | None] | None, digits: int) -> tuple[str, str]:
    mean, low, high = measured or (None, None, None)
    interval = "-" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"
    return "-" if mean is None else f"{mean:.{digits}f}", interval


def _as_fidelity(row: dict[str, Any]) -> "Fidelity":
    from evaluators.fidelity import Fidelity

    likeness = (row["psnr_db"], row["ssim"], row["clip_similarity"], row["lpips"])
    return Fidelity(*likeness, band_error=tuple(row["band_error"]), band_signal=tuple(row["band_signal"]))
