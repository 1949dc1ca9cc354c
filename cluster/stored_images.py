"""Scoring a finished run's images again without drawing: actors that stand in for the models and hand out its files."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cluster.device import worker_host
from cluster.image_files import decode_image
from cluster.pieces import DrawBatch
from cluster.plan import Plan
from cluster.pool_size import HELPER_CPUS
from cluster.rows import DrawReport, ModelUse, shard_uses
from cluster.store import ResultStore
from cluster.workers import Workers, actor_class
from evaluators.base import NoImage


@dataclass(frozen=True)
class StoredImages:
    """A run's images: each one's file and seconds by variant, prompt and noise seed, which prompts may share; and what
    the variants' models took. Images that were made elsewhere have neither seconds nor a model."""

    store: ResultStore
    files: dict[tuple[str, str, int], tuple[str, float | None]]
    uses: dict[str, ModelUse]


class StoredReplica:
    """Has a replica's methods; what it draws are the stored images."""

    def __init__(self, stored: StoredImages) -> None:
        self._stored = stored

    def start(self, variant: str) -> None:
        """Nothing to load."""

    def draw(
        self, variant: str, batches: tuple[DrawBatch, ...], *prompts: str
    ) -> tuple[DrawReport, list[np.ndarray | NoImage]]:
        """The kept images, or why there is none. Raises StorageError."""
        slots = [(batch.prompts[slot], batch.noise_seeds[slot]) for batch in batches for slot in batch.kept]
        found = [self._stored.files.get((variant, prompts[place], seed), (None, None)) for place, seed in slots]
        report = DrawReport(tuple(seconds for _, seconds in found), worker_host(), self._stored.uses.get(variant))
        return report, [self._image(name) for name, _ in found]

    def _image(self, name: str | None) -> np.ndarray | NoImage:
        store = self._stored.store
        if name is None:
            return NoImage(f"run {store.run_id} has no image of this sample")
        try:
            return decode_image(store.read(name), f"{store.run_uri}/{name}")
        except FileNotFoundError:
            return NoImage(f"{store.run_uri}/{name}: no such file")


class StoredEncoder:
    """Has a text encoder's methods; stored images are found by the prompts themselves."""

    def start(self) -> None:
        """Nothing to load."""

    def encode(self, prompts: Sequence[str]) -> tuple[str | None, ...]:
        return (None, *prompts)


def stored_images(store: ResultStore, plan: Plan) -> StoredImages:
    """What a complete run drew of `plan`'s samples and variants; those without an image are left out.

    Raises LookupError where the run has no image of a variant.
    """
    inputs = {x.pair_id: (x.prompt, x.noise_seed) for shard in plan.shards for x in shard.samples}
    files: dict[tuple[str, str, int], tuple[str, float | None]] = {}
    uses: dict[str, ModelUse] = {}
    for table in store.tables():
        variant = table["variant"][0].as_py()  # a file is of one variant
        if variant not in plan.variants:
            continue
        for use in filter(None, shard_uses(table)):
            uses[variant] = use.joined(uses.get(variant))
        for row in table.select(["pair_id", "image_path", "seconds"]).to_pylist():
            if row["image_path"] and row["pair_id"] in inputs:
                files[variant, *inputs[row["pair_id"]]] = (row["image_path"], row["seconds"])
    there = {variant for variant, *_ in files}
    lacking = [variant for variant in plan.variants if variant not in there]
    if lacking:
        raise LookupError(f"run {store.run_id} has no images of {lacking[0]}")
    return StoredImages(store, files, uses)


def read_image(store: ResultStore, name: str) -> np.ndarray:
    """An image's uint8 RGB values [H, W, 3]."""
    with Image.open(io.BytesIO(store.read(name))) as image:
        return np.asarray(image.convert("RGB"))


def with_stored_images(workers: Workers, stored: StoredImages) -> Workers:
    """`workers` with Ray actors that hand out stored images in place of replicas and text encoders."""
    return reading_workers(StoredReplica, stored, workers.evaluator, workers.evaluators)


def reading_workers(reader: type, images: Any, evaluator: Callable[[], Any], evaluators: int) -> Workers:
    """Ray actors of the class `reader`, which has a replica's methods, over `images`; nothing is encoded."""
    replica, encoder = actor_class(reader, HELPER_CPUS), actor_class(StoredEncoder, HELPER_CPUS)
    return Workers(lambda *_: replica.remote(images), encoder.remote, evaluator, evaluators)
