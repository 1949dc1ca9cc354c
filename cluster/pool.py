"""The replicas of a run. Their number follows the cluster: lost ones are replaced when room appears, and new room is
used."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.actor_slot import ActorSlot
from cluster.limits import Limits
from cluster.pool_size import GpuType
from cluster.workers import Workers


@dataclass(eq=False)
class Replica:
    """One place for a replica. `variant` is that of the last piece sent: the next one should be of the same."""

    slot: ActorSlot
    gpu_type: GpuType
    speed: float
    variant: str
    in_hand: int = 0  # pieces sent and not yet drawn


class ReplicaPool:
    """All replicas that were ever wanted; those of a node that is gone wait for another one."""

    def __init__(self, workers: Workers, limits: Limits, speed: Callable[[GpuType], float]) -> None:
        self._workers = workers
        self._limits = limits
        self._speed = speed
        self.replicas: list[Replica] = []

    @property
    def running(self) -> int:
        """Replicas with their models loaded."""
        return sum(replica.slot.running for replica in self.replicas)

    def grow(
        self, wanted: Mapping[GpuType, int], most: int, variant: Callable[[Mapping[str, int]], str]
    ) -> list[Replica]:
        """Adds the replicas that lack to `wanted`, up to `most` of all types, and returns them.

        `variant` says what a new one is to draw, from how many draw each. Retired ones count: what retired them would
        retire their successors.
        """
        added = []
        have = Counter(replica.gpu_type for replica in self.replicas)
        for gpu_type, number in wanted.items():
            for _ in itertools.repeat(None, max(0, min(number - have[gpu_type], most - len(self.replicas)))):
                added.append(self._add(gpu_type, variant(self._variants())))
        return added

    def _add(self, gpu_type: GpuType, variant: str) -> Replica:
        create = self._workers.replica if gpu_type is None else lambda: self._workers.replica(gpu_type)
        slot = ActorSlot(
            f"replica-{len(self.replicas)}", create, lambda actor: actor.start.remote(replica.variant), self._limits
        )
        replica = Replica(slot, gpu_type, self._speed(gpu_type), variant)
        self.replicas.append(replica)
        return replica

    def _variants(self) -> Counter[str]:
        return Counter(replica.variant for replica in self.replicas if not replica.slot.retired)
