"""What a plan says before anything runs: images by benchmark and tag, shards, distinct prompts."""

import json
from collections import Counter

from rich.console import Console
from rich.table import Table

from cluster.plan import Plan


def images_by_tag(plan: Plan) -> dict[str, Counter[str]]:
    """Planned images of one variant, by benchmark and tag, in the plan's order."""
    return {
        name: Counter(prompt.tag for prompt in workload.prompts.values() for _ in range(workload.images_per_prompt))
        for name, workload in plan.workloads.items()
    }


def print_plan(console: Console, plan: Plan, *, as_json: bool) -> None:
    """The plan as a table on `console`; `as_json`, also as one document on standard output."""
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
        print(json.dumps({**plan.describe(), "images_by_tag": images, "distinct_prompts": len(plan.prompts)}, indent=2))
