"""A run's metrics, through Ray: every node's metrics agent exports them to Prometheus under `ray_` and these names.

Prometheus sees counters as `ray_<name>_total`, histograms as `ray_<name>_bucket`, `_sum` and `_count`. All carry the
run's id. `manifests/grafana` draws them.
"""

import time
from collections.abc import Callable

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.observer import Observer, Stage

RUN = "run_id"
SHARD = (RUN, "variant", "benchmark")
SECONDS = [0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800]

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bitflux_images": ("Images in the results, those with an error included.", SHARD),
    "bitflux_shards": ("Shards in the results.", SHARD),
    "bitflux_retries": ("Pieces of shards that failed and were tried again, whole or cut.", (RUN, "stage")),
    "bitflux_quarantined": ("Images that were given up, with a row that has the error.", (RUN,)),
    "bitflux_replica_busy_seconds": ("Seconds that a replica has drawn.", (RUN, "replica")),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bitflux_replicas": ("Replicas whose models are loaded.", (RUN,)),
    "bitflux_replica_busy_share": ("Share of the replicas' time since the first one that was drawing.", (RUN,)),
}
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bitflux_stage_seconds": ("Seconds of one call or commit: encode, draw, score, commit.", (RUN, "stage")),
    "bitflux_shard_seconds": ("Seconds from a shard's first piece to its commit.", SHARD),
}
NAMES = (*COUNTERS, *GAUGES, *HISTOGRAMS)


class BusyShare:
    """Which share of their time the replicas of a changing pool have drawn, since there was one.

    A call counts when it has ended, so the share lags behind by the calls that are going on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas = 0
        self._since = clock()
        self._available = self._busy = 0.0

    def resize(self, replicas: int) -> None:
        """From now on there are so many replicas."""
        self._advance()
        self._replicas = replicas

    def busy(self, seconds: float) -> None:
        """One of them has drawn for so long."""
        self._busy += seconds

    def share(self) -> float | None:
        """From 0 to 1; None before there was a replica."""
        self._advance()
        return min(1.0, self._busy / self._available) if self._available else None

    def _advance(self) -> None:
        now = self._clock()
        self._available += self._replicas * (now - self._since)
        self._since = now


class RayMetrics(Observer):
    """Sends what the scheduler tells to Ray's metrics. Ray must be initialised."""

    def __init__(self, run_id: str) -> None:
        def tagged(metric: Counter | Gauge | Histogram) -> None:
            metric.set_default_tags({RUN: run_id})

        self._counters = {name: Counter(name, text, tags) for name, (text, tags) in COUNTERS.items()}
        self._gauges = {name: Gauge(name, text, tags) for name, (text, tags) in GAUGES.items()}
        self._histograms = {name: Histogram(name, text, SECONDS, tags) for name, (text, tags) in HISTOGRAMS.items()}
        for metric in (*self._counters.values(), *self._gauges.values(), *self._histograms.values()):
            tagged(metric)
        self._busy = BusyShare()

    def pool_size(self, replicas: int) -> None:
        self._busy.resize(replicas)
        self._gauges["bitflux_replicas"].set(replicas)

    def stage_ended(self, stage: Stage, seconds: float) -> None:
        self._histograms["bitflux_stage_seconds"].observe(seconds, {"stage": stage})

    def replica_busy(self, name: str, seconds: float) -> None:
        if seconds > 0:
            self._counters["bitflux_replica_busy_seconds"].inc(seconds, {"replica": name})
        self._busy.busy(seconds)
        share = self._busy.share()
        if share is not None:
            self._gauges["bitflux_replica_busy_share"].set(share)

    def shard_committed(self, variant: str, benchmark: str, rows: int, seconds: float) -> None:
        tags = {"variant": variant, "benchmark": benchmark}
        self._counters["bitflux_shards"].inc(1, tags)
        self._counters["bitflux_images"].inc(rows, tags)
        self._histograms["bitflux_shard_seconds"].observe(seconds, tags)

    def retried(self, stage: Stage) -> None:
        self._counters["bitflux_retries"].inc(1, {"stage": stage})

    def quarantined(self, images: int) -> None:
        self._counters["bitflux_quarantined"].inc(images)
