"""How long a run keeps trying, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Counts and seconds after which something is tried otherwise, or given up.

    Failures. attempts: of one shard before it is cut, of one sample before it is given up, of one image's scoring.
    excused: failures of one piece that were the machine's fault; from there on they count as the piece's own.
    starts: failures to start one actor in a row. failures: of an actor's calls in a row, none succeeding, before its
    slot is retired. backoff_s: the pause of an actor that goes on failing, doubled each time, so that others take the
    work. unavailable: times in a row that an actor may be out of reach before it is replaced.

    Time. start_timeout_s: how long an actor may wait for its node and load its models, and how long a run waits while
    no actor of one kind is left; generous, since a cluster may have to grow first. A call that takes `call_factor`
    times what its like took is given up and its actor replaced: not before `call_floor_s`, since a call may load
    another model first; after `call_ceiling_s` in any case. A piece that takes `late_factor` times as long as its
    like, and `late_floor_s` at least, is drawn a second time by a replica with nothing to do. pool_period_s: how often
    the cluster is asked what it holds. grace_s: for commits in hand when the run is stopped.
    """

    attempts: int = 3
    excused: int = 16
    starts: int = 3
    failures: int = 32
    backoff_s: float = 0.5
    unavailable: int = 3
    start_timeout_s: float = 900.0
    call_factor: float = 10.0
    call_floor_s: float = 900.0
    call_ceiling_s: float = 14_400.0
    late_factor: float = 3.0
    late_floor_s: float = 30.0
    pool_period_s: float = 5.0
    grace_s: float = 2.0
