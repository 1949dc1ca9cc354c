"""How drawing scales with GPUs: whole runs, on one GPU and on more, of full-size models with random weights.

Everything is the product's own but for the weights, for the text encoder, whose embeddings are random numbers of T5's
and CLIP's sizes, and for the evaluator, which writes the images and judges none.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from bitflux_core.errors import UserError
from bitflux_core.samples import Sampling
from cluster.evaluator import EvaluatorActor
from cluster.observer import SilentObserver
from cluster.plan import build_plan
from cluster.pool_size import HELPER_CPUS
from cluster.profile import Cost, Models, Profile, Resources
from cluster.replica import ReplicaActor
from cluster.run import run
from cluster.store import ResultStore
from cluster.workers import Workers, actor_class
from cluster.workload import PromptRecord, Workload
from evaluators.base import Score

if TYPE_CHECKING:
    from bitflux_core.benchmark.models import Sizes
    from bitflux_core.generate import ImageGenerator, PromptEmbedding

NAME = "scaling"
DTYPE: Literal["bfloat16"] = "bfloat16"
WARM_UP_STEPS = 3  # the first ones compile kernels and capture graphs


@dataclass(frozen=True)
class ScalingRow:
    """One variant on a number of GPUs. None: not measured.

    Attributes:
        mode: the variant.
        gpus, images: replicas, one a GPU; images drawn, as many for each of them.
        seconds: from the first image's beginning to the last one's end.
        images_a_second: images / seconds.
        busy_share: share of the replicas' time in those seconds that they spent on drawing, by their own clocks.
        efficiency: images_a_second over that of one GPU times `gpus`.
        error: what went wrong, a line.
    """

    mode: str
    gpus: int
    images: int
    seconds: float | None = None
    images_a_second: float | None = None
    busy_share: float | None = None
    efficiency: float | None = None
    error: str | None = None


def measure_scaling(
    mode: str, sizes: "Sizes", counts: Sequence[int], images_a_gpu: int, steps: int, resolution: int
) -> Iterator[ScalingRow]:
    """A row a number of GPUs; the first number should be 1, which the others are compared with.

    Ray must be initialised; on a cluster without GPUs the replicas run on its cores. UserError for more GPUs than the
    cluster has.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus and max(counts) > gpus:
        raise UserError(f"{max(counts)} GPUs asked for and {gpus} here: ask for no more")
    alone: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(folder) / "pipeline"
        write_random_pipeline(sizes, pipeline)
        for count in counts:
            row = ScalingRow(mode, count, count * images_a_gpu)
            sampling = Sampling(resolution, resolution, steps, 3.5, sizes.text_tokens)
            watch = _watched_run(row, sizes, sampling, pipeline, f"{folder}/{count}")
            if isinstance(watch, str):
                yield replace(row, error=watch)
                continue
            rate = row.images / watch.seconds
            alone = alone or rate / count
            yield replace(
                row,
                seconds=watch.seconds,
                images_a_second=rate,
                busy_share=watch.busy / (count * watch.seconds),
                efficiency=rate / (count * alone),
            )


class _Watch(SilentObserver):
    """When replicas drew: they tell of a call at its end."""

    def __init__(self) -> None:
        self.busy = 0.0
        self._begun, self._ended = float("inf"), 0.0

    @property
    def seconds(self) -> float:
        return self._ended - self._begun

    def replica_busy(self, name: str, seconds: float) -> None:
        now = time.perf_counter()
        self.busy += seconds
        self._begun, self._ended = min(self._begun, now - seconds), max(self._ended, now)


def _watched_run(row: ScalingRow, sizes: "Sizes", sampling: Sampling, pipeline: Path, output: str) -> "_Watch | str":
    """What was seen of one run, or why it did not end well."""
    on_gpus = bool(ray.cluster_resources().get("GPU"))
    profile = Profile(
        name=NAME,
        models=Models(pipeline=str(pipeline), ternary=None, detector="none", clip="none"),
        sampling=sampling,
        batch_size=1,
        dtype=DTYPE,
        benchmarks=(NAME,),
        variants=(row.mode,),
        resources=Resources(replica_gpus=1.0 if on_gpus else 0.0),
        cost=Cost(),
        shard_seconds=1e-3,  # an image a shard
    )
    prompts = tuple(PromptRecord(index, NAME, f"image {index}", {}) for index in range(row.images))
    workload = Workload(NAME, NAME, prompts, 1, 0, "none")
    plan = build_plan(profile, [workload], [row.mode], fingerprints={row.mode: "random", "pipeline": "random"})
    store = ResultStore(output, NAME)
    replica = actor_class(RandomReplica, 0.5, 1 if on_gpus else 0)
    encoder, evaluator = actor_class(RandomTextEncoder, HELPER_CPUS), actor_class(Unjudged, HELPER_CPUS)
    workers = Workers(
        lambda *_: replica.remote(sizes, pipeline, sampling),
        lambda: encoder.remote(sizes),
        lambda: evaluator.remote(store),
    )
    watch = _Watch()
    summary = run(plan, profile, None, store, replicas=row.gpus, workers=workers, observer=watch)  # type: ignore[arg-type]
    if summary.complete and not summary.n_failed:
        return watch
    return summary.reason or f"{summary.n_failed} of {row.images} images failed"


class RandomReplica(ReplicaActor):
    """A replica whose transformer's weights are random; it draws an image before it says that it is ready."""

    def __init__(self, sizes: "Sizes", pipeline_dir: Path, sampling: Sampling) -> None:
        super().__init__(pipeline_dir, None, DTYPE, sampling)
        self._sizes = sizes

    def _built(self, variant: str) -> "ImageGenerator":
        import torch

        from bitflux_core.accounting import resident_bytes
        from bitflux_core.benchmark.models import build_transformer
        from bitflux_core.generate import ImageGenerator

        transformer = build_transformer(variant, self._sizes, torch.device(self._device))
        self._storage_bytes = resident_bytes(transformer)
        generator = ImageGenerator(transformer, self._pipeline_dir, self._device, torch.bfloat16)
        generator.draw([random_embedding(self._sizes)], [0], replace(self._sampling, steps=WARM_UP_STEPS))
        return generator


class RandomTextEncoder:
    """Gives every prompt the same random embedding, an object for each."""

    def __init__(self, sizes: "Sizes") -> None:
        self._sizes = sizes

    def start(self) -> None:
        pass

    def encode(self, prompts: Sequence[str]) -> tuple[Any, ...]:
        return (None, *(random_embedding(self._sizes) for _ in prompts))


class Unjudged(EvaluatorActor):
    """Writes the images and scores all of them alike."""

    def __init__(self, store: ResultStore) -> None:
        super().__init__({}, {}, store)

    def start(self) -> None:
        self._evaluators = {NAME: _NoJudge()}


class _NoJudge:
    fingerprint = "none"

    def score(self, images: Sequence[Any], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        return [Score(0.0, None, "not judged", [])] * len(images)


def random_embedding(sizes: "Sizes") -> "PromptEmbedding":
    import torch

    from bitflux_core.generate import PromptEmbedding

    embeds = torch.randn(sizes.text_tokens, sizes.t5["d_model"], dtype=torch.bfloat16)
    return PromptEmbedding(embeds, torch.randn(sizes.clip["hidden_size"], dtype=torch.bfloat16))


def write_random_pipeline(sizes: "Sizes", folder: Path) -> None:
    """A pipeline's folder with a random VAE and a scheduler, and neither text encoders nor transformer."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"])
    vae = AutoencoderKL(**sizes.vae).to(torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(**sizes.scheduler)
    FluxPipeline(vae=vae, scheduler=scheduler, **parts).save_pretrained(folder)
