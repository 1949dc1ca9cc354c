"""A night's three files: verdict.json for programs, comparison.parquet for questions, report.md for people."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.night_files import VERDICT, NightFiles
from cluster.nightly import Night
from evaluators.gates import Gates
from evaluators.regression import Finding, Pair, Status, named_pairs
from evaluators.statistics import Row

SCHEMA_VERSION = 1
PARQUET, REPORT = "comparison.parquet", "report.md"
EXIT_CODES: dict[Status, int] = {"pass": 0, "regression": 1, "undecided": 3, "incomplete": 3}
SHOWN_PAIRS = 50  # in the report; the Parquet file has all
FROM_NIGHT = "../.."  # from a night's folder to the runs

PAIR_SCHEMA = pa.schema(
    [
        ("against", pa.string()),
        ("variant", pa.string()),
        ("benchmark", pa.string()),
        ("tag", pa.string()),
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_index", pa.int32()),
        ("image_index", pa.int32()),
        ("reference_score", pa.float64()),
        ("score", pa.float64()),
        ("flipped", pa.bool_()),
        ("psnr_db", pa.float64()),
        ("reference_image", pa.string()),  # relative to the output
        ("image", pa.string()),
    ]
)


def write_night(night: Night, gates: Gates, profile: str, variants: Sequence[str], files: NightFiles) -> dict[str, Any]:
    """Writes the night's files, the verdict last, and returns the verdict."""
    verdict = _document(night, gates, profile, variants)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(_pair_rows(night), schema=PAIR_SCHEMA), sink)
    files.write(night.name, PARQUET, sink.getvalue().to_pybytes())
    files.write(night.name, REPORT, _markdown(night, verdict).encode())
    files.write(night.name, VERDICT, json.dumps(verdict, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return verdict


def _document(night: Night, gates: Gates, profile: str, variants: Sequence[str]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "night": night.name,
        "verdict": night.verdict,
        "exit_code": EXIT_CODES[night.verdict],
        "series": night.series,
        "profile": profile,
        "variants": list(variants),
        "accepted": night.accepted.night if night.accepted else None,
        "gates_sha256": hashlib.sha256(gates.model_dump_json().encode()).hexdigest(),
        "runs": night.runs,
        "notes": night.notes,
        "findings": [asdict(finding) for finding in night.findings],
        "regressed_pairs": [_pair_row(p) for p in named_pairs(_regressions(night), night.pairs)],
        "comparisons": [{"against": against, **asdict(comparison)} for against, comparison in night.comparisons],
        "models": night.models,
    }


def _regressions(night: Night) -> list[Finding]:
    return [finding for finding in night.findings if finding.status == "regression"]


def _pair_rows(night: Night) -> list[dict[str, Any]]:
    return [
        {"against": against, "variant": variant, **_pair_row(pair)}
        for (variant, against, _), pairs in night.pairs.items()
        for pair in pairs
    ]


def _pair_row(pair: Pair) -> dict[str, Any]:
    same = {column: pair.row[column] for column in ("benchmark", "tag", "pair_id", "prompt", "prompt_index")}
    return {
        **same,
        "image_index": pair.row["image_index"],
        "variant": pair.row["variant"],
        "reference_score": pair.reference["score"],
        "score": pair.row["score"],
        "flipped": pair.flipped,
        "psnr_db": pair.psnr_db,
        "reference_image": _image(pair.reference),
        "image": _image(pair.row),
    }


def _image(row: Row) -> str | None:
    return f"run_id={row['run']}/{row['image_path']}" if row["image_path"] else None


def _markdown(night: Night, verdict: dict[str, Any]) -> str:
    against = f"accepted night {night.accepted.night}" if night.accepted else "no accepted night"
    lines = [f"# {night.name}: {verdict['verdict']}", "", f"Profile {verdict['profile']}, {against}.", ""]
    lines += [f"- {note}" for note in night.notes]
    lines += ["", "## Gates", "", "| gate | verdict | variant | against | benchmark | tag | what was found |"]
    lines += ["|---|---|---|---|---|---|---|"]
    order = sorted(night.findings, key=lambda finding: finding.status == "pass")
    lines += [
        _cells(
            f.kind, f.status, f.variant, f.against, f.benchmark, f.tag or ("all" if f.benchmark else None), f.message
        )
        for f in order
    ]
    if night.comparisons:
        lines += ["", "## Scores, in %", "", "| variant | against | benchmark | tag | reference | tonight | difference"]
        lines[-1] += " | 95 % interval | pairs | lacking |"
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for against_name, c in night.comparisons:
        scores = (_percent(c.baseline_score), _percent(c.variant_score), _percent(c.delta, "+"))
        bounds = f"{_percent(c.ci_low, '+')} to {_percent(c.ci_high, '+')}"
        lines.append(_cells(c.variant, against_name, c.benchmark, c.tag, *scores, bounds, c.n_expected, c.n_failed))
    regressed = named_pairs(_regressions(night), night.pairs)
    lines += _pair_table("Pairs behind the regressions", regressed)
    flipped = [p for pairs in night.pairs.values() for p in pairs if p.flipped and not any(p is q for q in regressed)]
    lines += _pair_table("Other pairs that score lower than their reference", flipped)
    return "\n".join(lines) + "\n"


def _pair_table(title: str, pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    lines = ["", f"## {title}", "", f"{min(len(pairs), SHOWN_PAIRS)} of {len(pairs)}; {PARQUET} has all.", ""]
    lines += [
        "| prompt | benchmark | tag | image | scores | PSNR, dB | reference | tonight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs[:SHOWN_PAIRS]:
        row = pair.row
        psnr = "-" if pair.psnr_db is None else f"{pair.psnr_db:.1f}"
        scores = f"{_score(pair.reference['score'])} to {_score(row['score'])}"
        links = [_link(pair.reference), _link(row)]
        lines.append(_cells(row["prompt"], row["benchmark"], row["tag"], row["image_index"], scores, psnr, *links))
    return lines


def _link(row: Row) -> str:
    image = _image(row)
    return f"[{row['variant']}]({FROM_NIGHT}/{image})" if image else "no image"


def _cells(*values: object) -> str:
    texts = ("-" if value is None or value == "" else str(value) for value in values)
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
