"""What one sample is, and the ids that tie its two variants together.

`pair_id` hashes what every variant of a sample shares; it drives the noise and the pairing.
`sample_id` adds what differs between variants. Both are the first 32 hex digits of a SHA-256.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

# FLUX packs 2x2 latents of 8x8 pixels into one token.
PIXELS_PER_TOKEN = 16

# Where an image's noise comes from. "pair": from its own pair_id. "image": from seed + image_index, so image n of every
# prompt starts from the same noise, as T2I-CompBench draws.
SeedRule = Literal["pair", "image"]

_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Sampling:
    """How an image is drawn: sizes in pixels, Euler steps, guidance scale, T5 tokens."""

    width: int
    height: int
    steps: int
    guidance: float
    max_sequence_length: int

    @property
    def tokens(self) -> int:
        """Of text and image together, as the transformer sees them."""
        return self.max_sequence_length + (self.height // PIXELS_PER_TOKEN) * (self.width // PIXELS_PER_TOKEN)


@dataclass(frozen=True)
class Sample:
    """One image to draw: the prompt's place in its benchmark, the image's place among the prompt's images, the seed."""

    benchmark: str
    tag: str
    prompt_index: int
    prompt: str
    image_index: int
    seed: int
    sampling: Sampling
    seed_rule: SeedRule = "pair"

    @property
    def pair_id(self) -> str:
        """Id shared by all variants of this sample. The tag is left out: it labels the sample, it does not draw it."""
        shared = [self.benchmark, self.prompt_index, self.prompt, self.image_index, self.seed, vars(self.sampling)]
        # The default rule adds nothing: ids of results from before there was a choice stay what they are.
        return _digest(shared if self.seed_rule == "pair" else [*shared, self.seed_rule])

    def sample_id(self, variant: str, dtype: str, fingerprint: str) -> str:
        """Id of this sample drawn by one variant, in one dtype, with the weights of one fingerprint."""
        return _digest([self.pair_id, variant, dtype, fingerprint])

    @property
    def noise_seed(self) -> int:
        """Seed of the initial latent noise, 63 bits: the same for every variant, by the rule its own for every pair."""
        if self.seed_rule == "image":
            return (self.seed + self.image_index) % 2**63
        return int(self.pair_id[:16], 16) >> 1


def _digest(value: object) -> str:
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()[:32]
