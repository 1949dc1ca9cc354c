"""How closely a protocol is kept where its own models do not load: part of an evaluator's name."""

from typing import Literal

from bitflux_core.errors import UserError

COMPBENCH = "t2i-compbench"
OFFICIAL = f"{COMPBENCH}-official"
# official: upstream's models as well; compatible: its rules, quirks included; corrected: quirks repaired; judge:
# T2I-CompBench++'s multimodal judge in place of all of them.
MODES = ("official", "compatible", "corrected", "judge")
Mode = Literal["compatible", "corrected"]  # those of them that keep the rules and run here
CORRECTIONS = 2  # raised with every repair that can change a score by `corrected`


def in_mode(evaluator: str, mode: str) -> str:
    """The evaluator that judges by another mode of the same protocol; GenEval has the official one alone."""
    return f"{COMPBENCH}-{mode}" if evaluator in {f"{COMPBENCH}-{known}" for known in MODES} else evaluator


def check_loadable(evaluator: str) -> None:
    """UserError for the official mode, whose detector no library loads. Known here, so that plans need no models."""
    if evaluator == OFFICIAL:
        raise UserError(
            f"{OFFICIAL} needs UniDet's own weights and vocabulary, which no library loads: "
            "name the mode compatible or corrected, which keep the official formulas on detectors that do load"
        )
