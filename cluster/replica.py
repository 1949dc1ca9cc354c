"""The actor that draws: one transformer at a time, and the VAE."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitflux_core.environment import gpu_driver
from bitflux_core.errors import UserError
from bitflux_core.samples import Sampling
from cluster.device import claim_device, device_name, free_memory, worker_host
from cluster.faults import ModelLoadError, poisoned_process_ends
from cluster.memory import draw_batches
from cluster.pieces import DrawBatch
from cluster.rows import DrawReport, ModelUse

if TYPE_CHECKING:
    from bitflux_core.generate import ImageGenerator, PromptEmbedding


class ReplicaActor:
    """Draws batches with whichever variant a call names, and keeps that one loaded until a call names another."""

    def __init__(self, pipeline_dir: Path, ternary_dir: Path | None, dtype: str, sampling: Sampling) -> None:
        self._pipeline_dir = pipeline_dir
        self._ternary_dir = ternary_dir
        self._dtype = dtype
        self._sampling = sampling
        self._variant: str | None = None
        self._generator: ImageGenerator | None = None

    def start(self, variant: str) -> None:
        """Claims the device and loads `variant`. Raises UserError for a checkpoint that cannot be loaded."""
        self._device = claim_device()
        self._load(variant)

    def draw(
        self, variant: str, batches: tuple[DrawBatch, ...], *embeddings: "PromptEmbedding"
    ) -> tuple[DrawReport, np.ndarray]:
        """The kept images of all batches, uint8 [N, H, W, 3], and what drawing them took.

        A batch that does not fit in memory is drawn in halves, and its images' sizes say so. Raises ModelLoadError
        where the variant cannot be loaded.
        """
        with poisoned_process_ends():
            generator = self._load(variant)
            drawn = draw_batches(
                lambda prompts, seeds: generator.draw([embeddings[p] for p in prompts], seeds, self._sampling),
                batches,
                lambda: free_memory(self._device),
            )
        return DrawReport(drawn.seconds, worker_host(), self._use(generator), drawn.batch_sizes), drawn.images

    def _load(self, variant: str) -> "ImageGenerator":
        if self._generator is None or self._variant != variant:
            # The old model goes first: two do not fit on one GPU.
            self._generator = None
            free_memory(self._device)
            try:
                self._generator = self._built(variant)
            except UserError:
                raise
            except Exception as error:
                raise ModelLoadError(f"{variant}: {type(error).__name__}: {error}") from error
            self._variant = variant
        return self._generator

    def _built(self, variant: str) -> "ImageGenerator":
        import torch

        from bitflux_core.generate import ImageGenerator
        from bitflux_core.loading import load_transformer, storage_bytes

        dtype = getattr(torch, self._dtype)
        transformer = load_transformer(
            variant, pipeline_dir=self._pipeline_dir, ternary_dir=self._ternary_dir, device=self._device, dtype=dtype
        )
        self._storage_bytes = storage_bytes(variant, pipeline_dir=self._pipeline_dir, ternary_dir=self._ternary_dir)
        return ImageGenerator(transformer, self._pipeline_dir, self._device, dtype)

    def _use(self, generator: "ImageGenerator") -> ModelUse:
        return ModelUse(
            self._storage_bytes,
            generator.peak_memory_bytes(),
            "cuda-peak" if self._device == "cuda" else "cpu-resident",
            device_name(self._device),
            gpu_driver() if self._device == "cuda" else None,
        )
