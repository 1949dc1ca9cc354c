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
    likeness = Table("variant", "benchmark", title="images against bf16 from the same noise")
    for heading, _ in MEASURES.values():
        likeness.add_column(heading, justify="right")
    likeness.add_column("images", justify="right")
    bands = Table("variant", "benchmark", title="signal over error in dB, by cycles a pixel up to")
    for band in reports[0].bands_db:
        bands.add_column(band, justify="right")
    for report in reports:
        cells = [_cell(report.measures.get(measure), digits) for measure, (_, digits) in MEASURES.items()]
        likeness.add_row(report.variant, report.benchmark, *cells, f"{report.n_compared}/{report.n_expected}")
        found = ["-" if value is None else f"{value:.1f}" for value in report.bands_db.values()]
        bands.add_row(report.variant, report.benchmark, *found)
    console.print(likeness)
    console.print(bands)


def fidelity_document(reports: list[FidelityReport]) -> dict[str, Any]:
    return {"fidelity": [asdict(report) for report in reports]}


def _cell(measured: tuple[float | None, float | None, float | None] | None, digits: int) -> str:
    if measured is None or measured[0] is None:
        return "-"
    mean, low, high = measured
    span = "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{mean:.{digits}f}{span}"


def _as_fidelity(row: dict[str, Any]) -> "Fidelity":
    from evaluators.fidelity import Fidelity

    likeness = (row["psnr_db"], row["ssim"], row["clip_similarity"], row["lpips"])
    return Fidelity(*likeness, band_error=tuple(row["band_error"]), band_signal=tuple(row["band_signal"]))
