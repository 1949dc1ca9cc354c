"""How long calls take: what was observed of their like, and what follows from that for a call under way."""

import statistics
from collections import defaultdict, deque
from collections.abc import Hashable

from cluster.limits import Limits

REMEMBERED = 64  # calls of one kind: enough for a median, few enough to follow a pool that changes


class Pace:
    """Seconds a unit (an image slot, an image, a prompt), by kind of call. Of actors with another speed than 1, as many
    units count as one of speed 1 would have done meanwhile."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._observed: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def observe(self, kind: Hashable, units: float, seconds: float) -> None:
        """Notes that a call of `units` took so long."""
        self._observed[kind].append(seconds / units)

    def expected(self, kind: Hashable, units: float) -> float | None:
        """Seconds that a call of `units` should take; None while no call of its kind was answered."""
        observed = self._observed.get(kind)
        # A median: a call that had to load its model first, or a straggler, does not shift it.
        return statistics.median(observed) * units if observed else None

    def timeout(self, kind: Hashable, units: float) -> float:
        """Seconds after which a call of `units` is given up."""
        limits = self._limits
        expected = self.expected(kind, units)
        if expected is None:
            return limits.call_ceiling_s
        return min(max(limits.call_factor * expected, limits.call_floor_s), limits.call_ceiling_s)

    def late_after(self, kind: Hashable, units: float) -> float | None:
        """Seconds after which a call of `units` is late; None while nothing is known of its kind."""
        expected = self.expected(kind, units)
        return None if expected is None else max(self._limits.late_factor * expected, self._limits.late_floor_s)
