"""The actor that encodes prompts, so that no replica holds the text encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.device import claim_device
from cluster.faults import poisoned_process_ends

if TYPE_CHECKING:
    from bitflux_core.generate import PromptEmbedding, TextEncoder


class TextEncoderActor:
    """T5 and CLIP of one pipeline."""

    def __init__(self, pipeline_dir: Path, dtype: str, max_sequence_length: int) -> None:
        self._settings = (pipeline_dir, dtype, max_sequence_length)
        self._encoder: TextEncoder | None = None

    def start(self) -> None:
        """Loads the models, unless they are there. Raises UserError for files that cannot be loaded."""
        import torch

        from bitflux_core.generate import TextEncoder

        if self._encoder is None:
            pipeline_dir, dtype, max_sequence_length = self._settings
            self._encoder = TextEncoder(pipeline_dir, claim_device(), getattr(torch, dtype), max_sequence_length)

    def encode(self, prompts: Sequence[str]) -> "tuple[None, *tuple[PromptEmbedding, ...]]":
        """None, then an embedding a prompt: each becomes an object of its own in Ray's store, and only the None is
        opened by the driver. Raises UserError for a prompt that is too long."""
        assert self._encoder is not None, "start comes first"
        with poisoned_process_ends():
            return (None, *self._encoder.encode(prompts))
