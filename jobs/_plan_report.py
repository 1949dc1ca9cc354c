"""What a plan says before anything runs: images by benchmark and tag, shards, hours, bytes, distinct prompts."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from cluster.plan import Plan
from jobs._plan_cost import VariantCost


def images_by_tag(plan: Plan) -> dict[str, Counter[str]]:
    """Planned images of one variant, by benchmark and tag, in the plan's order."""
    return {
        name: Counter(prompt.tag for prompt in workload.prompts.values() for _ in range(workload.images_per_prompt))
        for name, workload in plan.workloads.items()
    }


def print_plan(console: Console, plan: Plan, costs: Sequence[VariantCost], *, hours: str, as_json: bool) -> None:
    """The plan as tables on `console`, the hours named `hours`; `as_json`, also as one document on standard output."""
    images = images_by_tag(plan)
    shards = Counter(shard.key.benchmark for shard in plan.shards)
    table = Table("benchmark", "tag", title=f"profile {plan.profile}: {', '.join(plan.variants)}")
    for heading in ("prompts", "images a variant", "shards a variant"):
        table.add_column(heading, justify="right")
    for name, workload in plan.workloads.items():
        prompts = Counter(prompt.tag for prompt in workload.prompts.values())
        for tag, count in prompts.items():
            table.add_row(name, tag, f"{count:,}", f"{images[name][tag]:,}", "")
        total = (f"{prompts.total():,}", f"{images[name].total():,}", f"{shards[name] // len(plan.variants):,}")
        table.add_row(name, "all", *total, style="bold", end_section=True)
    console.print(table)
    console.print(_cost_table(costs, hours))
    sampling = plan.sampling
    console.print(
        f"{sampling.width}x{sampling.height}, {sampling.steps} steps, guidance {sampling.guidance}, "
        f"{sampling.max_sequence_length} T5 tokens, {plan.dtype}, batches of {plan.batch_size}",
    )
    for assumption in plan.assumptions:
        console.print(f"assumed: {assumption}")
    console.print(
        f"{plan.n_samples:,} images in {len(plan.shards):,} shards over {len(plan.variants)} variants, "
        f"{len(plan.prompts):,} distinct prompts",
    )
    if as_json:
        found = {"images_by_tag": images, "distinct_prompts": len(plan.prompts), "costs": [asdict(c) for c in costs]}
        print(json.dumps({**plan.describe(), **found}, indent=2))


def _cost_table(costs: Sequence[VariantCost], hours: str) -> Table:
    table = Table("variant", title="expected")
    for heading in ("images", "seconds to draw one", hours, "GB of images", "GB of results"):
        table.add_column(heading, justify="right")
    for cost in costs:
        seconds = f"{cost.draw_s:.2f} ({'measured' if cost.measured else 'declared'})"
        table.add_row(cost.variant, f"{cost.images:,}", seconds, *_sums([cost]), end_section=cost is costs[-1])
    table.add_row("all", f"{sum(cost.images for cost in costs):,}", "", *_sums(costs), style="bold")
    return table


def _sums(costs: Sequence[VariantCost]) -> tuple[str, ...]:
    n_bytes = (sum(cost.image_bytes for cost in costs), sum(cost.result_bytes for cost in costs))
    return f"{sum(cost.hours for cost in costs):,.2f}", *(f"{count / 1e9:,.3f}" for count in n_bytes)
