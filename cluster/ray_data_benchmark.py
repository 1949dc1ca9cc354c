"""The same pipeline by Ray Data, as the measured baseline: encode, draw, score and write by actors in `map_batches`.

It has no bounded retries of a shard, no quarantine of one sample, no second draw of a straggler's and no files of fixed
names, so it does less; it also stops where a worker's death cannot be retried.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.plan import Plan
from cluster.stub_workers import DrawLog, Gate, stub_draw, stub_embedding, stub_scores

Batch = dict[str, Any]


class Encode:
    def __call__(self, batch: Batch) -> Batch:
        return batch | {"embedding": np.stack([stub_embedding(prompt) for prompt in batch["prompt"]])}


class Draw:
    def __init__(self, seconds_a_sample: float, gate: Gate, log: DrawLog) -> None:
        self._seconds, self._log = seconds_a_sample, log
        gate.pass_together()

    def __call__(self, batch: Batch) -> Batch:
        seconds, pixels = stub_draw(len(batch["prompt"]), self._seconds, self._log)
        return batch | {"image": pixels, "seconds": np.full(len(pixels), seconds / len(pixels))}


class Score:
    def __call__(self, batch: Batch) -> Batch:
        kept = {name: column for name, column in batch.items() if name not in ("image", "embedding")}
        return kept | {"score": np.array(stub_scores(batch["image"]))}


def draw_with_ray_data(plan: Plan, replicas: int, gate: Gate, log: DrawLog, folder: Path) -> None:
    """Draws all samples of a plan with `replicas` actors and writes their rows."""
    import ray.data

    from cluster.benchmark import SECONDS_A_SAMPLE, STUB_CPUS

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [
        {
            "sample_id": sample_id,
            "prompt": sample.prompt,
            "prompt_index": sample.prompt_index,
            "image_index": sample.image_index,
            "noise_seed": sample.noise_seed,
        }
        for shard in plan.shards
        for sample_id, sample in zip(plan.sample_ids(shard), shard.samples, strict=True)
    ]
    # A block is what an actor is given: without this all rows are one, and a single actor draws.
    samples = ray.data.from_arrow(pa.Table.from_pylist(rows)).repartition(target_num_rows_per_block=plan.batch_size)
    one, many = ray.data.ActorPoolStrategy(size=1), ray.data.ActorPoolStrategy(size=replicas)
    scored = (
        samples.map_batches(Encode, batch_size=plan.batch_size, compute=one, num_cpus=STUB_CPUS)
        .map_batches(
            Draw,
            fn_constructor_args=(SECONDS_A_SAMPLE, gate, log),
            batch_size=plan.batch_size,
            compute=many,
            num_cpus=STUB_CPUS,
        )
        .map_batches(Score, batch_size=plan.batch_size, compute=one, num_cpus=STUB_CPUS)
    )
    scored.write_parquet(str(folder / "results"))
