"""What a scheduler tells of a run while it goes on, for progress, metrics and dashboards."""

from typing import Literal, Protocol

Stage = Literal["encode", "draw", "score", "commit"]


class Observer(Protocol):
    """Told from the driver's event loop: methods return at once and raise nothing."""

    def pool_size(self, replicas: int) -> None:
        """So many replicas have their models loaded now; told whenever the number changes."""

    def stage_ended(self, stage: Stage, seconds: float) -> None:
        """One call of an actor, or one commit, was answered without an error; seconds as the driver saw them."""

    def replica_busy(self, name: str, seconds: float) -> None:
        """Replica `name` has drawn for `seconds` more, by its own clock; loading and waiting do not count."""

    def shard_committed(self, variant: str, benchmark: str, rows: int, seconds: float) -> None:
        """A shard of `rows` images, error rows included, is in the store; `seconds` since its first piece was sent."""

    def retried(self, stage: Stage) -> None:
        """A piece of a shard failed at `stage` and is tried again, whole or cut."""

    def quarantined(self, images: int) -> None:
        """So many images were given up: each has a row with its error."""


class SilentObserver:
    """Tells nobody."""

    def pool_size(self, replicas: int) -> None: ...

    def stage_ended(self, stage: Stage, seconds: float) -> None: ...

    def replica_busy(self, name: str, seconds: float) -> None: ...

    def shard_committed(self, variant: str, benchmark: str, rows: int, seconds: float) -> None: ...

    def retried(self, stage: Stage) -> None: ...

    def quarantined(self, images: int) -> None: ...
