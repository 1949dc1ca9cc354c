"""Stand-ins for the actors that hold models. They keep the actors' contracts and misbehave when told to.

Every image that is drawn, padding left out, leaves a line in `draws.txt`, so tests can count draws across processes.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
from in_process import ProcessEnded, ProcessHangs, in_process
from ray.exceptions import ActorUnavailableError

from bitflux_core.errors import UserError
from bitflux_core.samples import Sampling
from cluster.evaluator import EvaluatorActor
from cluster.faults import poisoned_process_ends
from cluster.memory import draw_batches
from cluster.pieces import DrawBatch
from cluster.plan import Plan, build_plan
from cluster.profile import Profile
from cluster.rows import DrawReport, ModelUse
from cluster.run import RunSummary, run
from cluster.store import ResultStore
from cluster.workers import Workers
from cluster.workload import PromptRecord, Workload
from evaluators.base import Score

VOLATILE = ("seconds", "worker", "attempts")
MOST_ATTEMPTS = 11  # a shard's 3, a cut to each of 8 images' halves, 3 alone, and two losses to others' faults
SAMPLING = Sampling(width=16, height=16, steps=1, guidance=1.0, max_sequence_length=8)
PROFILE = Profile(
    name="small",
    models={"pipeline": "p", "ternary": "t", "detector": "d", "clip": "c"},
    sampling=SAMPLING,
    batch_size=4,
    dtype="float32",
    benchmarks=("toy",),
    variants=("bf16", "ternary"),
    cost={"megapixel_step": 1e6 / 16**2},
    shard_seconds=8.0,  # two batches, at a second an image
)
FINGERPRINTS = {"bf16": "a1", "ternary": "b2", "pipeline": "c3", "detector": "d4", "clip": "e5"}


def small_workload(name: str = "toy", prompts_a_tag: int = 5, images_per_prompt: int = 2) -> Workload:
    """Two tags; the prompts of the second one are known to the evaluator by a count."""
    records = [
        PromptRecord(index, tag, f"{tag} number {number}", {"tag": tag, "count": number})
        for index, (tag, number) in enumerate((tag, n) for tag in ("colors", "counting") for n in range(prompts_a_tag))
    ]
    return Workload(name, "toy-evaluator", tuple(records), images_per_prompt, 7, "f6")


def small_plan(profile: Profile = PROFILE, variants: tuple[str, ...] = ("bf16", "ternary")) -> Plan:
    """20 images a variant: three shards of 8, 8 and 4."""
    return build_plan(profile, [small_workload()], variants, fingerprints=FINGERPRINTS)


@dataclass(frozen=True)
class Faults:
    """What goes wrong. Noise seeds name images; `once` faults strike the first time only, over all processes."""

    folder: Path
    raise_on: frozenset[int] = frozenset()
    exit_on: frozenset[int] = frozenset()
    exit_once_on: frozenset[int] = frozenset()
    hang_on: frozenset[int] = frozenset()
    hang_once_on: frozenset[int] = frozenset()
    poison_cuda_on: frozenset[int] = frozenset()
    poison_cuda_once_on: frozenset[int] = frozenset()
    unavailable_once_on: frozenset[int] = frozenset()
    memory: int = 1000  # images of one batch that fit; of `greedy` ones none
    greedy: frozenset[int] = frozenset()
    score_raise_on: frozenset[str] = frozenset()
    score_hang_once: bool = False
    start: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    gather: int = 0  # replicas that must have started before the third shard is drawn
    driver: int = field(default_factory=os.getpid)

    def first_time(self, name: str) -> bool:
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def strike(self, seed: int) -> None:
        """Does what is to go wrong with an image."""
        if seed in self.raise_on:
            raise RuntimeError(f"seed {seed} is poisoned")
        if seed in self.exit_on or (seed in self.exit_once_on and self.first_time(f"exit-{seed}")):
            self.die()
        if seed in self.hang_on or (seed in self.hang_once_on and self.first_time(f"hang-{seed}")):
            self.hang()
        if seed in self.poison_cuda_on or (seed in self.poison_cuda_once_on and self.first_time(f"cuda-{seed}")):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")
        if seed in self.unavailable_once_on and self.first_time(f"unavailable-{seed}"):
            raise ActorUnavailableError("no route", b"\0" * 16)

    def wait_for_all(self) -> None:
        while len(draws(self.folder)) >= 16 and len(list(self.folder.glob("replica-*.pid"))) < self.gather:
            time.sleep(0.05)

    def die(self) -> None:
        """Ends the actor's process, or what stands for it where the actor lives in the driver's own."""
        if os.getpid() == self.driver:
            raise ProcessEnded
        time.sleep(0.1)  # the answer to the call before may still be on its way
        os._exit(1)

    def hang(self) -> None:
        """Never answers, until the process is ended."""
        if os.getpid() == self.driver:
            raise ProcessHangs
        time.sleep(3600)


class FakeReplica:
    """Draws a flat image whose colour is made of variant and seed, whatever else is in the batch."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def start(self, variant: str) -> None:
        _start("replica", self._faults)

    def draw(self, variant: str, batches: tuple[DrawBatch, ...], *embeddings: str):
        assert all(len(batch.noise_seeds) == len(batch.prompts) == PROFILE.batch_size for batch in batches)

        def images(prompts: tuple[int, ...], seeds: tuple[int, ...]) -> np.ndarray:
            if len(seeds) > self._faults.memory or self._faults.greedy & set(seeds):
                raise MemoryError(f"{len(seeds)} images do not fit")
            self._faults.wait_for_all()
            slots = {seed: embeddings[prompt] for prompt, seed in zip(prompts, seeds, strict=True)}
            drawn = {seed: self._image(variant, seed, embedding) for seed, embedding in slots.items()}
            return np.stack([drawn[seed] for seed in seeds])  # padding repeats one

        with poisoned_process_ends():
            drawn = draw_batches(images, batches, lambda: None)
        use = ModelUse(1000, 2000, "cpu-resident", "cpu")
        seconds = (0.5,) * len(drawn.images)
        return DrawReport(seconds, f"host:{os.getpid()}", use, drawn.batch_sizes), drawn.images

    def _image(self, variant: str, seed: int, embedding: str) -> np.ndarray:
        assert embedding.startswith("encoded ")
        time.sleep(self._faults.seconds)
        self._faults.strike(seed)
        with (self._faults.folder / "draws.txt").open("a") as file:
            file.write(f"{variant} {seed}\n")
        color = np.frombuffer(f"{variant}{seed}".encode().ljust(48)[:48], np.uint8).reshape(4, 4, 3)
        return np.tile(color, (4, 4, 1))


class FakeEncoder:
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def start(self) -> None:
        _start("text_encoder", self._faults)

    def encode(self, prompts: list[str]):
        with (self._faults.folder / "encoded.txt").open("a") as file:
            file.writelines(f"{prompt}\n" for prompt in prompts)
        return (None, *(f"encoded {prompt}" for prompt in prompts))


class FakeEvaluator(EvaluatorActor):
    """The real actor around a scorer without models."""

    def __init__(self, faults: Faults, store: ResultStore) -> None:
        super().__init__({}, {}, store)
        self._faults = faults

    def start(self) -> None:
        _start("evaluator", self._faults)
        self._evaluators = {"toy": FakeScorer(self._faults)}


class FakeScorer:
    fingerprint = "toy-1"

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def score(self, images, metadata) -> list[Score]:
        if self._faults.score_hang_once and self._faults.first_time("score-hang"):
            self._faults.hang()
        bad = [m for m in metadata if f"{m['tag']} {m['count']}" in self._faults.score_raise_on]
        if bad:
            raise RuntimeError(f"cannot look at {bad[0]}")
        return [Score(float(m["count"] % 2), m["count"] % 2 == 1, "", [{"label": m["tag"]}]) for m in metadata]


def _start(role: str, faults: Faults) -> None:
    (faults.folder / f"{role}-{os.getpid()}.pid").touch()
    fault = faults.start.get(role)
    if fault == "user":
        raise UserError("the checkpoint is damaged: copy it again")
    if fault == "raise":
        raise RuntimeError("no such device")
    if fault == "exit":
        faults.die()


def fake_workers(faults: Faults, store: ResultStore) -> Workers:
    """Actors in this process."""
    return Workers(
        in_process(FakeReplica, faults), in_process(FakeEncoder, faults), in_process(FakeEvaluator, faults, store)
    )


def ray_workers(faults: Faults, store: ResultStore, resources: dict | None = None) -> Workers:
    """Actors of Ray; `resources` are what a replica asks for."""
    replica, encoder, evaluator = (ray.remote(cls) for cls in (FakeReplica, FakeEncoder, FakeEvaluator))
    resources = resources or {"num_cpus": 1}
    helpers = {"num_cpus": 0, "resources": {"head": 0.01}}  # they live on as nodes go
    return Workers(
        lambda: replica.options(**resources).remote(faults),
        lambda: encoder.options(**helpers).remote(faults),
        lambda: evaluator.options(**helpers).remote(faults, store),
    )


def draws(folder: Path) -> list[str]:
    """One line for each image that was drawn to the end."""
    path = folder / "draws.txt"
    return path.read_text().splitlines() if path.exists() else []


def by_id(rows: list[dict]) -> dict[str, dict]:
    """Rows by sample id, without what may differ between two runs of one plan."""
    return {row["sample_id"]: {k: v for k, v in row.items() if k not in VOLATILE} for row in rows}


def finished_run(plan: Plan, store: ResultStore, **options) -> tuple[RunSummary, list[dict]]:
    """Runs the plan to its end: the summary and the rows, once their ids are known to be exactly the plan's."""
    summary = run(plan, PROFILE, None, store, **options)
    assert summary.complete, summary.reason
    rows = store.read_rows().to_pylist()
    expected = [sample_id for shard in plan.shards for sample_id in plan.sample_ids(shard)]
    assert sorted(row["sample_id"] for row in rows) == sorted(expected)
    return summary, rows
