"""One place in a pool of actors: the actor that fills it now, its calls, and its replacement when it dies.

Ray's own restarts are left off: they lose count of what was running, and do not cover a failing start.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from bitflux_core.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How long the run keeps trying.

    attempts: failures of one shard before it is cut, of one sample before it is given up, of one image's scoring.
    starts: failures to start one actor in a row. failures: of an actor's calls in a row, none succeeding, before its
    slot is retired. start_timeout_s: how long an actor may wait for its node and load its models; generous, since a
    cluster may have to grow first. grace_s: for commits in hand when the run is stopped.
    """

    attempts: int = 3
    starts: int = 2
    failures: int = 32
    start_timeout_s: float = 900.0
    grace_s: float = 2.0


class ActorLost(Exception):
    """The actor died or could not be reached. `blamed` where the call was the one it was working on."""

    def __init__(self, message: str, blamed: bool) -> None:
        super().__init__(message)
        self.blamed = blamed


@dataclass
class _Life:
    """One actor, and the calls that it has not answered, oldest first: the first one is being worked on."""

    actor: Any
    calls: dict[object, None] = field(default_factory=dict)


class ActorSlot:
    """Keeps one actor running. `retired` holds the reason once that was given up."""

    def __init__(self, name: str, create: Callable[[], Any], start: Callable[[Any], Any], limits: Limits) -> None:
        """`create` makes an actor's handle, `start` sends it the call that loads its models and returns the call's
        reference; that call must be harmless to repeat."""
        self.name = name
        self.retired: str | None = None
        self._create = create
        self._start = start
        self._limits = limits
        self._failures = 0
        self._life: _Life | None = None
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Starts the first actor, or retires the slot. Raises UserError where the actor's models are at fault."""
        async with self._changing:
            await self._begin()

    async def call(self, send: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
        """The value of the first reference that `send(actor)` returns, and its other references unopened.

        Raises ActorLost once the actor has been replaced or the slot retired, and whatever the call itself raises.
        """
        async with self._changing:
            life = self._life
        if life is None:
            raise ActorLost(f"{self.name} is retired: {self.retired}", blamed=False)
        call = object()
        life.calls[call] = None
        references = send(life.actor)
        first, *others = references if isinstance(references, list) else [references]
        try:
            value = await first
        except ActorUnavailableError as error:
            life.calls.pop(call, None)
            await self._recover(life, error)
            raise ActorLost(explain(error), blamed=False) from error
        except RayActorError as error:
            blamed = next(iter(life.calls), None) is call  # a dead actor's calls stay listed: the first stays first
            await self._recover(life, error)
            raise ActorLost(explain(error), blamed) from error
        except Exception as error:
            life.calls.pop(call, None)
            self._count(error)
            raise
        life.calls.pop(call, None)
        self._failures = 0
        return value, others

    def stop(self) -> None:
        """Ends the actor and its process. None of its calls is to blame for that."""
        if self._life is not None:
            self._life.calls.clear()
            ray.kill(self._life.actor)
            self._life = None

    async def _recover(self, life: _Life, error: Exception) -> None:
        """Replaces a dead actor once, however many of its calls report it; lets an unreachable one answer first."""
        async with self._changing:
            if self._life is not life:
                return
            self._count(error)
            if self.retired:
                return
            if isinstance(error, ActorUnavailableError):
                if await self._answers(life.actor):
                    return
                self.stop()
            log.warning("%s is replaced (%s)", self.name, explain(error))
            self._life = None
            await self._begin()

    async def _begin(self) -> None:
        for _ in range(self._limits.starts):
            actor = self._create()
            self._life = _Life(actor)
            try:
                await asyncio.wait_for(_result(self._start(actor)), self._limits.start_timeout_s)
                return
            except UserError:
                raise
            except TimeoutError:
                failure = f"no answer in {self._limits.start_timeout_s:.0f} s; does the cluster have room for it?"
            except Exception as error:
                failure = explain(error)
            log.warning("%s does not start: %s", self.name, failure)
            self.stop()
        self.retired = f"{self.name} does not start: {failure}"

    async def _answers(self, actor: Any) -> bool:
        try:
            await asyncio.wait_for(_result(self._start(actor)), self._limits.start_timeout_s)
        except Exception:
            return False
        return True

    def _count(self, error: Exception) -> None:
        self._failures += 1
        if self._failures >= self._limits.failures and not self.retired:
            self.retired = f"{self.name} failed {self._failures} times in a row, at last with {explain(error)}"
            self.stop()


async def _result(reference: Any) -> Any:
    return await reference


def explain(error: BaseException) -> str:
    """An error on one line: its type and message as the actor raised them, or why its process ended."""
    if isinstance(error, ActorLost):
        return str(error)
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayActorError):
        if "error raised in its creation task" in str(error):
            return lines[-1]
        detail = next((line for line in lines if line.startswith("The actor is dead")), lines[0] if lines else "")
        return f"its process ended: {detail[:200]}"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
