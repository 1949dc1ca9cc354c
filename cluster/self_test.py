"""Whether the nightly regression works here: a night drawn twice passes, and one of a damaged model does not.

Three nights in a folder of their own: one that is accepted, the same again (A/A), and one of a copy of the ternary
checkpoint with a known share of its codes flipped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitflux_core.errors import UserError

FLIPPED_SHARE = 0.05
SEED = 20241218  # the day of the 1.58-bit FLUX paper, arXiv 2412.18653
QUALITY = ("score", "fidelity")  # a model made worse must show there: time and memory would be chance


@dataclass(frozen=True)
class SelfTest:
    """What became of it. `exit_code`: 0 both as they must be, 1 not so, 3 a night did not end."""

    exit_code: int
    message: str
    nights: tuple[str, ...]


def self_test(
    run_night: Callable[[str, Path | None], dict], accept: Callable[[str], object], ternary: Path, folder: Path
) -> SelfTest:
    """Runs the nights by `run_night(name, ternary folder or None for the profile's own)`, which returns a verdict.

    `folder` takes the damaged checkpoint and must be one that all replicas see.
    """
    from bitflux_core.degrade import flip_codes

    names = ("reference", "again", "damaged")
    done: list[str] = []

    def finished(name: str, checkpoint: Path | None) -> dict | None:
        done.append(name)
        verdict = run_night(name, checkpoint)
        return None if verdict["verdict"] == "incomplete" else verdict

    reference = finished(names[0], None)
    if reference is None:
        return SelfTest(3, "the first night is incomplete", tuple(done))
    accept(names[0])
    again = finished(names[1], None)
    if again is None:
        return SelfTest(3, "the second night is incomplete", tuple(done))
    shown = [f for f in again["findings"] if f["status"] == "regression" and f["against"] == "accepted"]
    shown += [f for f in again["findings"] if f["status"] == "regression" and f["kind"] == "canary"]
    if shown:
        return SelfTest(1, f"the same night drawn again shows a regression: {shown[0]['message']}", tuple(done))
    damaged = folder / f"ternary-{FLIPPED_SHARE:g}-flipped"
    try:
        flip_codes(ternary, damaged, FLIPPED_SHARE, SEED)
    except OSError as error:
        raise UserError(f"{damaged}: cannot be written ({error.strerror}); give another --output") from error
    worse = finished(names[2], damaged)
    if worse is None:
        return SelfTest(3, "the night of the damaged model is incomplete", tuple(done))
    caught = [f for f in worse["findings"] if f["status"] == "regression" and f["kind"] in QUALITY]
    caught = [f for f in caught if f["against"] == "accepted"]
    if not caught:
        return SelfTest(1, f"{FLIPPED_SHARE:.0%} of the codes flipped and no gate noticed", tuple(done))
    what = "; ".join(f"{f['kind']} {f['tag'] or ''}".strip() + f" ({f['message']})" for f in caught[:3])
    undecided = sum(f["status"] == "undecided" for f in again["findings"])
    lacking = f" ({undecided} of {len(again['findings'])} gates undecided: too little was drawn)" if undecided else ""
    message = f"drawn again, no regression{lacking}; {FLIPPED_SHARE:.0%} of the codes flipped, caught: {what}"
    return SelfTest(0, message, tuple(done))
