"""What a run says: comparisons and single scores from its rows, as a table for people and a document for programs."""

import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.plan import Plan
from cluster.store import ResultStore
from evaluators.statistics import OVERALL, Comparison, Estimate, compare, interval
from jobs._plan_report import images_by_tag

if TYPE_CHECKING:
    from cluster.audit import ModelMetrics
    from cluster.run import RunSummary

Rows = dict[tuple[str, str], list[dict]]  # by variant and benchmark

BASELINE = "bf16"
ROW_COLUMNS = ["variant", "benchmark", "pair_id", "tag", "prompt_index", "score", "correct", "reason"]
HALVED = "drawn_batch_size"
MEMORY = {
    "cuda-peak": "peak memory (all that CUDA allocated)",
    "cpu-resident": "memory (transformer's resident bytes, CPU)",
    None: "memory",
}
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Scores:
    """What the rows of a run say: each variant alone, by benchmark and tag, and the variants against each other."""

    estimates: dict[tuple[str, str], list[Estimate]]  # by variant and benchmark
    comparisons: list[Comparison]
    judged: list[str]  # how each benchmark whose scores are not right or wrong was judged: the reasons in its rows
    n_halved: int  # images drawn in smaller batches than planned


def scores_of(plan: Plan, store: ResultStore) -> Scores:
    """The scores of a run, as far as it is drawn."""
    rows: Rows = defaultdict(list)
    table = store.read_rows(partial=True)
    for row in table.select(ROW_COLUMNS).to_pylist():
        rows[row["variant"], row["benchmark"]].append(row)
    expected = images_by_tag(plan)
    estimates = {
        (variant, name): interval(
            rows[variant, name], expected=expected[name], images_per_prompt=workload.images_per_prompt
        )
        for variant in plan.variants
        for name, workload in plan.workloads.items()
    }
    # Files of schema version 1 have no such column.
    n_halved = len(table) - table[HALVED].null_count if HALVED in table.column_names else 0
    return Scores(estimates, compare_variants(plan, rows), _judged(plan, rows), n_halved)


def print_report(console: Console, plan: Plan, store: ResultStore, summary: "RunSummary", scores: Scores) -> None:
    """Prints scores by benchmark and tag, what each model takes, and where the results lie."""
    for variant in dict.fromkeys(comparison.variant for comparison in scores.comparisons):
        console.print(_comparison_table([c for c in scores.comparisons if c.variant == variant]))
    if not scores.comparisons:
        console.print(_score_table(scores))
    for line in _correct_lines(scores):
        console.print(line)
    console.print(_model_table(summary.models))
    for assumption in plan.assumptions:
        console.print(f"assumed: {assumption}")
    for line in scores.judged:
        console.print(line)
    console.print(f"results: {store.run_uri}", soft_wrap=True)
    if scores.n_halved:
        print(
            f"{scores.n_halved} images were drawn in smaller batches than planned, for lack of memory: the column "
            f"`{HALVED}` of the results says which; another machine may draw their last bits differently",
            file=sys.stderr,
        )
    if summary.n_failed:
        print(f"{summary.n_failed} images failed; the column `error` of the results says why", file=sys.stderr)
    if not summary.complete:
        print(
            f"incomplete: {summary.reason}; the same command with --run-id {store.run_id} continues it", file=sys.stderr
        )


def compare_variants(plan: Plan, rows: Rows) -> list[Comparison]:
    """Every other variant against the baseline: full precision where it ran, else the first one named."""
    baseline = BASELINE if BASELINE in plan.variants else plan.variants[0]
    return [
        comparison
        for variant in plan.variants
        if variant != baseline
        for benchmark, expected in images_by_tag(plan).items()
        for comparison in compare(
            benchmark=benchmark,
            baseline=baseline,
            variant=variant,
            baseline_rows=rows[baseline, benchmark],
            variant_rows=rows[variant, benchmark],
            expected=expected,
        )
    ]


def _judged(plan: Plan, rows: Rows) -> list[str]:
    """Of T2I-CompBench the mode and what took the prompts apart, as the rows say; another chunker asks otherwise."""
    lines = []
    for name in plan.workloads:
        scored = (row for v in plan.variants for row in rows[v, name] if row["correct"] is None and row["reason"])
        if reasons := sorted({row["reason"] for row in scored}):
            lines.append(f"{name} was judged by: {'; '.join(reasons)}")
    return lines


def counts(summary: "RunSummary") -> dict[str, int]:
    """Images of all variants: planned, in the results (failed ones included), failed."""
    return {"n_expected": summary.n_expected, "n_done": summary.n_done, "n_failed": summary.n_failed}


def document(summary: "RunSummary", scores: Scores) -> dict[str, Any]:
    """What was found, in plain values: counts, scores, comparisons, models."""
    fields = ("variant", "storage_bytes", "peak_memory_bytes", "seconds_per_image", "fingerprint")
    return {
        **counts(summary),
        "scores": [
            {"variant": variant, "benchmark": benchmark, **asdict(estimate)}
            for (variant, benchmark), estimates in scores.estimates.items()
            for estimate in estimates
        ],
        "n_drawn_in_smaller_batches": scores.n_halved,
        "comparisons": [asdict(comparison) for comparison in scores.comparisons],
        "models": [{field: getattr(model, field) for field in fields} for model in summary.models],
    }


def _comparison_table(comparisons: list[Comparison]) -> Table:
    baseline, variant = comparisons[0].baseline, comparisons[0].variant
    columns = (baseline, variant, "difference", "95 % interval", "detectable", "images", "lacking")
    table = _tag_table(f"{variant} against {baseline}, scores in %", columns)
    for c in comparisons:
        scores = (_percent(c.baseline_score), _percent(c.variant_score), _percent(c.delta, "+"))
        bounds = _bounds(c.ci_low, c.ci_high, "+")
        detectable = _percent(c.detectable)
        _add_tag(table, c.benchmark, c.tag, *scores, bounds, detectable, str(c.n_expected), str(c.n_failed))
    return table


def _score_table(scores: Scores) -> Table:
    (variant,) = {variant for variant, _ in scores.estimates}
    table = _tag_table(f"{variant}, scores in %", (variant, "95 % interval", "images", "lacking"))
    for (_, benchmark), estimates in scores.estimates.items():
        for e in estimates:
            bounds = _bounds(e.ci_low, e.ci_high)
            _add_tag(table, benchmark, e.tag, _percent(e.score), bounds, str(e.n_expected), str(e.n_failed))
    return table


def _correct_lines(scores: Scores) -> list[str]:
    """GenEval's summary of all images and all prompts, a line a variant and benchmark that is right or wrong."""
    overall = [(names, estimates[-1]) for names, estimates in scores.estimates.items()]
    return [
        f"{benchmark}, {variant}: {_percent(e.images_correct)} % correct images, "
        f"{_percent(e.prompts_correct)} % correct prompts"
        for (variant, benchmark), e in overall
        if e.images_correct is not None or e.prompts_correct is not None
    ]


def _tag_table(title: str, numbers: tuple[str, ...]) -> Table:
    table = Table("benchmark", "tag", title=title)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _add_tag(table: Table, benchmark: str, tag: str, *values: str) -> None:
    last = tag == OVERALL
    table.add_row(benchmark, tag, *values, style="bold" if last else None, end_section=last)


def _model_table(models: list["ModelMetrics"]) -> Table:
    kinds = {model.memory_kind for model in models if model.memory_kind}
    memory = MEMORY[kinds.pop() if len(kinds) == 1 else None]
    table = Table("model", title="what the models take")
    for heading in ("storage", memory, "seconds an image", "fingerprint"):
        table.add_column(heading, justify="right")
    for model in models:
        seconds = "-" if model.seconds_per_image is None else f"{model.seconds_per_image:.3g}"
        storage, resident = _bytes(model.storage_bytes), _bytes(model.peak_memory_bytes)
        table.add_row(model.variant, storage, resident, seconds, model.fingerprint)
    return table


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _bounds(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None or high is None else f"{_percent(low, sign)} to {_percent(high, sign)}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in UNITS if count >= size), (1.0, "B"))
    return f"{count / size:,.2f} {unit}"
