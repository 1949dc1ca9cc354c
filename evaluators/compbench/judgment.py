"""What a rule of T2I-CompBench says about one image."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Judgment:
    """A score in [0, 1] and what was seen, in plain values for the results."""

    score: float
    details: list[dict[str, Any]] = field(default_factory=list)
