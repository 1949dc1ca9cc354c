"""One place in a pool of actors: the actor that fills it now, its calls, and its replacement when it dies or hangs.

Ray's own restarts are left off: they lose count of what was running, and do not cover a failing start.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from bitflux_core.errors import UserError
from cluster.faults import (
    ACTOR_GONE,
    ActorHung,
    ActorLost,
    ModelLoadError,
    RunStopped,
    explain,
    is_machines_fault,
    is_node_gone,
)
from cluster.limits import Limits

LANES = 2  # calls sent to an actor: one is worked on while the next one waits with its inputs at hand
REASONS = 3  # of actors that do not start: more say nothing new
TOLERATED = 3  # failures in a row before an actor rests: isolating a poisoned sample takes about as many
LONGEST_REST_S = 30.0

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """A call without an answer. Its time counts from `begun`, when it became the one that is worked on; `timeout` says
    how long it may take, by what is known at the time."""

    timeout: Callable[[], float]
    begun: float | None = None
    alarm: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class _Life:
    """One actor, and the calls that it has not answered, oldest first: the first one is being worked on.

    `given_up` gets an exception where the actor is to be ended although Ray holds it for alive. `unavailable` counts
    times out of reach in a row; `doubtful` after such a one, until it has answered.
    """

    actor: Any
    given_up: asyncio.Future[None]
    calls: dict[_Call, None] = field(default_factory=dict)
    unavailable: int = 0
    doubtful: bool = False

    def worked_on(self, call: _Call) -> bool:
        return next(iter(self.calls), None) is call


class ActorSlot:
    """Keeps one actor running, from the first call of `ready` on. `retired` holds the reason once that was given up."""

    def __init__(self, name: str, create: Callable[[], Any], start: Callable[[Any], Any], limits: Limits) -> None:
        """`create` makes an actor's handle, `start` sends it the call that loads its models and returns the call's
        reference; that call must be harmless to repeat."""
        self.name = name
        self.retired: str | None = None
        self.failures = 0  # of calls in a row
        self._create = create
        self._start = start
        self._limits = limits
        self._life: _Life | None = None
        self._changing = asyncio.Lock()
        self._starting_since: float | None = None
        self._trouble = ""

    @property
    def running(self) -> bool:
        """Whether an actor stands ready for calls."""
        return self._life is not None and self._starting_since is None

    def stuck(self) -> str | None:
        """Why no actor stands here, where that was tried in vain for `start_timeout_s`."""
        if self.retired or self._starting_since is None or _now() - self._starting_since < self._limits.start_timeout_s:
            return self.retired
        return f"{self.name} does not start: {self._trouble or self._no_answer()}"

    async def ready(self) -> bool:
        """Waits until an actor stands ready, starting one where there is none; False once the slot is retired.

        Waits on while the cluster has no room. Raises UserError where the actor's models are at fault.
        """
        async with self._changing:
            if self._life is not None and self._life.doubtful and not self.retired:
                await self._probe(self._life)
            if self._life is None and not self.retired:
                await self._begin()
        return self.retired is None

    async def call(self, send: Callable[[Any], Any], timeout: Callable[[], float]) -> tuple[Any, list[Any], float]:
        """The value of the first reference that `send(actor)` returns, its other references unopened, and the seconds
        that the actor took, those spent behind other calls left out.

        Raises ActorLost where the actor died, was out of reach or took longer than `timeout` (in seconds) allows, and
        whatever the call itself raises. `ready` then sees to the actor.
        """
        await self.ready()
        life = self._life
        if life is None:
            raise ActorLost(f"{self.name} is retired: {self.retired}", blamed=False)
        call = _Call(timeout)
        life.calls[call] = None
        self._set_clock(life)
        answer: asyncio.Future[Any] | None = None
        try:
            references = send(life.actor)
            first, *others = references if isinstance(references, list) else [references]
            answer = asyncio.ensure_future(_result(first))
            await asyncio.wait({answer, life.given_up}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                life.given_up.result()
            value = answer.result()
        except ActorUnavailableError as error:
            self._drop(life, call)
            life.doubtful = True
            life.unavailable += 1
            self._count(error)
            raise ActorLost(explain(error), blamed=False) from error
        except ACTOR_GONE as error:
            # A dead actor's calls stay listed: the first stays first.
            blamed = life.worked_on(call) and not is_machines_fault(error)
            self._bury(life, error)
            raise ActorLost(explain(error), blamed) from error
        except ModelLoadError as error:
            # Most likely this process or its machine: a start elsewhere shows which.
            life.calls.clear()
            self._bury(life, error)
            raise
        except Exception as error:
            self._drop(life, call)
            self._count(error)
            raise
        finally:
            if answer is not None and not answer.done():
                answer.cancel()
            if call.alarm:
                call.alarm.cancel()
        seconds = _now() - (call.begun or _now())
        self._drop(life, call)
        self.failures = life.unavailable = 0
        return value, others, seconds

    async def rest(self, peers: Iterable["ActorSlot"]) -> None:
        """Leaves the work to its peers for a while, if this actor goes on failing and one of them does not."""
        if self.failures > TOLERATED and any(peer.running and peer.failures <= TOLERATED for peer in peers):
            pause = self._limits.backoff_s * 2 ** (self.failures - TOLERATED - 1)
            await asyncio.sleep(min(pause, LONGEST_REST_S))

    def stop(self) -> None:
        """Ends the actor and its process. None of its calls is to blame for that."""
        if self._life is not None:
            self._life.calls.clear()
            self._end(self._life)

    def _set_clock(self, life: _Life) -> None:
        """Starts the clock of the call that is worked on now."""
        call = next(iter(life.calls), None)
        if call is not None and call.begun is None:
            call.begun = _now()
            self._watch(life, call, call.begun)

    def _watch(self, life: _Life, call: _Call, begun: float) -> None:
        """Gives the actor up once its call has taken too long; until then looks again, for what is known may change."""
        allowed, taken = call.timeout(), _now() - begun
        if taken < allowed:
            wait = min(allowed - taken, self._limits.call_floor_s)
            call.alarm = asyncio.get_running_loop().call_later(wait, self._watch, life, call, begun)
        elif not life.given_up.done():
            life.given_up.set_exception(ActorHung(f"{self.name} gave no answer in {allowed:.0f} s"))
            life.given_up.exception()  # nobody may wait for it

    def _drop(self, life: _Life, call: _Call) -> None:
        life.calls.pop(call, None)
        self._set_clock(life)

    def _bury(self, life: _Life, error: Exception) -> None:
        """Clears the slot of a dead actor once, however many of its calls report it."""
        if self._life is life:
            log.warning("%s is replaced (%s)", self.name, explain(error))
            self._end(life)
            self._count(error)

    def _end(self, life: _Life) -> None:
        ray.kill(life.actor)
        self._life = None

    def _count(self, error: Exception) -> None:
        self.failures += 1
        if self.failures >= self._limits.failures and not self.retired:
            self.retired = f"{self.name} failed {self.failures} times in a row, at last with {explain(error)}"
            self.stop()

    async def _begin(self) -> None:
        """Starts an actor, trying for as long as it takes to get a place for it, or retires the slot."""
        self._starting_since = _now()
        failed = 0
        try:
            while True:
                actor = self._create()
                self._life = _Life(actor, asyncio.get_running_loop().create_future())
                try:
                    await asyncio.wait_for(_result(self._start(actor)), self._limits.start_timeout_s)
                    return
                except UserError:
                    raise
                except TimeoutError:
                    self._trouble = self._no_answer()
                except Exception as error:
                    self._trouble = explain(error)
                    failed += not is_node_gone(error)  # that node's loss says nothing of the next one
                log.warning("%s does not start: %s", self.name, self._trouble)
                self.stop()
                if failed >= self._limits.starts:
                    self.retired = f"{self.name} does not start: {self._trouble}"
                    return
                await asyncio.sleep(self._limits.backoff_s)
        finally:
            self._starting_since = None

    async def _probe(self, life: _Life) -> None:
        """Waits for an actor that was out of reach; ends it where it does not answer, or was so too often."""
        self._starting_since = _now()
        try:
            if life.unavailable < self._limits.unavailable:
                await asyncio.wait_for(_result(self._start(life.actor)), self._limits.start_timeout_s)
                life.doubtful = False
                return
            failure = f"out of reach {life.unavailable} times in a row"
        except Exception as error:
            failure = explain(error)
        finally:
            self._starting_since = None
        if self._life is life:
            log.warning("%s is replaced (%s)", self.name, failure)
            life.calls.clear()
            self._end(life)

    def _no_answer(self) -> str:
        return f"no answer in {self._limits.start_timeout_s:.0f} s; does the cluster have room for it?"


def check_left(slots: Sequence[ActorSlot]) -> None:
    """Raises RunStopped once none of these slots has an actor, or will have: nobody is left to do their work."""
    reasons = [slot.stuck() for slot in slots]
    if reasons and all(reasons):
        told = list(dict.fromkeys(str(reason) for reason in reasons))
        more = f"; and {len(told) - REASONS} more" if len(told) > REASONS else ""
        raise RunStopped("; ".join(told[:REASONS]) + more)


async def _result(reference: Any) -> Any:
    return await reference


def _now() -> float:
    return asyncio.get_running_loop().time()
