"""Which pieces replicas have in hand, and which of them an idle replica should draw as well, for they are late.

Of two draws of one piece the first result counts. The other leaves no row and no attempt.
"""

import asyncio
from dataclasses import dataclass

from cluster.pace import Pace
from cluster.pieces import Piece

COPIES = 2  # draws of one piece, over all its time in hand


@dataclass(eq=False)
class Assignment:
    """A piece in the hands of one replica, or of two once it was late.

    `slots` are the image slots to draw. `work` adds those of its first holder's other pieces, all in slots of a replica
    of speed 1. `sent` is when its first holder was called, None while its prompts are being encoded.
    """

    piece: Piece
    slots: int
    work: float
    holders: list[str]
    copies: int = 1
    sent: float | None = None
    drawn: bool = False


class Assignments:
    """All pieces in hand."""

    def __init__(self, pace: Pace, look_again_s: float) -> None:
        """`look_again_s`: how soon to look again where nothing says yet when a piece will be late."""
        self._pace = pace
        self._look_again_s = look_again_s
        self._in_hand: list[Assignment] = []

    def begin(self, piece: Piece, batch_size: int, holder: str, speed: float) -> Assignment:
        """Hands `piece` to the replica of that name and speed."""
        slots = batch_size * len({position // batch_size for position in piece.positions})
        ahead = sum(each.slots for each in self._in_hand if holder in each.holders)
        assignment = Assignment(piece, slots, (slots + ahead) / speed, [holder])
        self._in_hand.append(assignment)
        return assignment

    def sent(self, assignment: Assignment) -> None:
        """Notes that a holder has been called; the first time counts."""
        assignment.sent = assignment.sent or _now()

    def next_late_s(self, holder: str) -> float:
        """Seconds until it is worth asking `late` for the idle replica `holder`; 0 where a piece is late already."""
        soonest = min((self._late_in(each) for each in self._in_hand if self._may_copy(each, holder)), default=1e9)
        return max(0.0, min(soonest, self._look_again_s))

    def late(self, holder: str) -> Assignment | None:
        """The piece that is late by most, handed to the idle replica `holder` as well. None where there is none."""
        candidates = [each for each in self._in_hand if self._may_copy(each, holder) and self._late_in(each) <= 0]
        if not candidates:
            return None
        assignment = min(candidates, key=self._late_in)
        assignment.holders.append(holder)
        assignment.copies += 1
        return assignment

    def end(self, assignment: Assignment, holder: str, drawn: bool) -> bool:
        """Takes the piece out of one replica's hands. Whether that decides it: drawn for the first time, or failed and
        in nobody else's hands."""
        assignment.holders.remove(holder)
        if not assignment.holders:
            self._in_hand.remove(assignment)
        if assignment.drawn:
            return False
        assignment.drawn = drawn
        return drawn or not assignment.holders

    def _may_copy(self, assignment: Assignment, holder: str) -> bool:
        return not assignment.drawn and assignment.copies < COPIES and holder not in assignment.holders

    def _late_in(self, assignment: Assignment) -> float:
        """Seconds until the piece is late, negative once it is."""
        allowed = self._pace.late_after(assignment.piece.shard.key.variant, assignment.work)
        if allowed is None or assignment.sent is None:
            return self._look_again_s
        return assignment.sent + allowed - _now()


def _now() -> float:
    return asyncio.get_running_loop().time()
