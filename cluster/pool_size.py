"""How many replicas the cluster holds: asked at the start of a run, and again while it goes on."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from bitflux_core.errors import UserError
from cluster.profile import Resources

# A replica a core, and the helpers beside them, fit on any machine. Not 0: a head node without cores runs no models.
REPLICA_CPUS = 0.8
HELPER_CPUS = 0.1
ROUNDING = 1e-6  # three replicas of 0.3333 fill a GPU

GpuType = str | None  # Ray's accelerator type, None for any
_TYPE = "accelerator_type:"  # how Ray's nodes list theirs among their resources


@dataclass
class _Place:
    """One GPU, or as many as a replica takes where that is several: who shares it, and what share is free."""

    gpu_type: GpuType
    replicas: int
    free: float


@dataclass(frozen=True)
class PoolSize:
    """The replicas that a run wants. `fixed` is the user's own number, None for as many as the cluster holds."""

    resources: Resources
    variants: int
    fixed: int | None = None

    def check(self) -> None:
        """Raises UserError where the cluster has GPUs and none of them holds a replica."""
        if self.fixed:
            return
        nodes = _nodes()
        if not self.resources.replica_gpus or not any(node.get("GPU") for node in nodes):
            return
        if not self._on_gpus(nodes).total():
            asked = self.resources
            gpus = sum(node.get("GPU", 0.0) for node in nodes)
            named = f" of {asked.replica_gpus:g} on {' or '.join(asked.gpu_types or ['any of them'])}"
            raise UserError(
                f"{gpus:g} GPUs hold no replica{named} beside {sum(self._helpers()):g} for the text encoder and the "
                "evaluators; correct `resources` in the profile"
            )

    def wanted(self) -> Mapping[GpuType, int]:
        """Replicas by the type of GPU that they are to run on, for the cluster as it is now.

        At least one: where there is no room for it, asking for it tells an autoscaler what to bring. Of a fixed number
        those that find no room yet wait for it, on the first type named.
        """
        if self.fixed and not self.resources.gpu_types:
            return {None: self.fixed}
        if not uses_gpus(self.resources) or not self.resources.replica_gpus:
            cores = int(sum(node.get("CPU", 0.0) for node in _nodes()))
            return {None: self.fixed or max(1, min(cores, self.variants))}
        held = self._on_gpus(_nodes())
        first = next(iter(self.resources.gpu_types), None)
        if not self.fixed:
            return held if held.total() else {first: 1}
        wanted: Counter[GpuType] = Counter()
        for gpu_type in sorted(held, key=lambda each: -self.speed(each)):
            wanted[gpu_type] = min(held[gpu_type], self.fixed - wanted.total())
        wanted[first] += self.fixed - wanted.total()
        return wanted

    def speed(self, gpu_type: GpuType) -> float:
        """How fast a type is, relative to others."""
        return self.resources.gpu_types.get(gpu_type, 1.0) if gpu_type else 1.0

    def _helpers(self) -> list[float]:
        return [self.resources.text_encoder_gpus] + [self.resources.evaluator_gpus] * self.resources.evaluators

    def _on_gpus(self, nodes: list[dict[str, float]]) -> Counter[GpuType]:
        """Replicas that fit beside the helpers, which give way to none: the slowest replicas make room for them."""
        places = [place for node in nodes for place in self._places(node)]
        places.sort(key=lambda place: self.speed(place.gpu_type))
        for share in sorted(self._helpers(), reverse=True):
            place = next((p for p in places if p.free >= share - ROUNDING), None)
            place = place or next((p for p in places if p.replicas), None)
            if place is None:
                break
            while place.free < share - ROUNDING and place.replicas:
                place.replicas -= 1
                place.free += self.resources.replica_gpus
            place.free -= share
        held: Counter[GpuType] = Counter()
        for place in places:
            held[place.gpu_type] += place.replicas
        return +held

    def _places(self, node: Mapping[str, float]) -> list[_Place]:
        gpus, a_replica = int(node.get("GPU", 0.0)), self.resources.replica_gpus
        gpu_type = None
        if self.resources.gpu_types:
            gpu_type = next((name for name in self.resources.gpu_types if _TYPE + name in node), None)
            if gpu_type is None:
                return [_Place(None, 0, 1.0) for _ in range(gpus)]  # helpers may use it
        left = int(node.get("CPU", 0.0) / REPLICA_CPUS + ROUNDING)
        size = max(1, math.ceil(a_replica))
        places = []
        for _ in range(gpus // size):
            replicas = min(left, math.floor(size / a_replica + ROUNDING))
            places.append(_Place(gpu_type, replicas, size - replicas * a_replica))
            left -= replicas
        return places + [_Place(gpu_type, 0, 1.0) for _ in range(gpus % size)]


def uses_gpus(resources: Resources) -> bool:
    """Whether actors ask for GPUs: where the cluster has any, or the profile cannot do without."""
    return resources.needs_gpu or any(node.get("GPU") for node in _nodes())


def _nodes() -> list[dict[str, Any]]:
    """Resources of the nodes that live, those in use included."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
