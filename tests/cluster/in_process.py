"""Actors without processes: the handles of Ray's actors, as far as the scheduler uses them, over one event loop.

Calls run one after the other, in the order they were sent. ProcessEnded, raised by a method, kills the actor: that call
and all later ones fail with Ray's own ActorDiedError. ProcessHangs leaves that call and all later ones without an
answer until the actor is killed.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError


class ProcessEnded(BaseException):
    """Stands for os._exit in an actor's process."""


class ProcessHangs(BaseException):
    """Stands for a call that never returns."""


class InProcessActor:
    def __init__(self, make: Callable[[], Any]) -> None:
        self._instance = make()
        self._alive = True
        self._killed = asyncio.Event()
        self._last: asyncio.Task[None] | None = None
        self._unanswered = 0
        self.most_unanswered = 0  # calls at any one time

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self, method, 1)

    def kill(self) -> None:
        self._alive = False
        self._killed.set()

    def send(self, method: str, args: tuple[Any, ...], num_returns: int) -> Any:
        results = [asyncio.get_running_loop().create_future() for _ in range(num_returns)]
        self._unanswered += 1
        self.most_unanswered = max(self.most_unanswered, self._unanswered)
        self._last = asyncio.get_running_loop().create_task(self._answer(self._last, method, args, results))
        return results[0] if num_returns == 1 else results

    async def _answer(self, previous: Any, method: str, args: tuple[Any, ...], results: list[Any]) -> None:
        if previous is not None:
            await previous
        try:
            values = [await arg if isinstance(arg, asyncio.Future) else arg for arg in args]
            await asyncio.sleep(0)  # as between processes, an answer takes a turn of the loop at least
            if not self._alive:
                raise ProcessEnded
            value = await self._returned(getattr(self._instance, method), values)
        except ProcessEnded:
            self._alive = False
            _fail(results, ActorDiedError())
        except Exception as error:
            _fail(results, error)
        else:
            for result, part in zip(results, [value] if len(results) == 1 else value, strict=True):
                if not result.done():  # whoever waited may have given up
                    result.set_result(part)
        finally:
            self._unanswered -= 1

    async def _returned(self, method: Callable[..., Any], values: list[Any]) -> Any:
        try:
            value = method(*values)
        except ProcessHangs:
            await self._killed.wait()
            raise ProcessEnded from None
        if not asyncio.iscoroutine(value):
            return value
        answer, killed = asyncio.ensure_future(value), asyncio.ensure_future(self._killed.wait())
        await asyncio.wait({answer, killed}, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        if not answer.done():
            answer.cancel()
            raise ProcessEnded
        return answer.result()


class _Method:
    def __init__(self, actor: InProcessActor, name: str, num_returns: int) -> None:
        self._actor, self._name, self._num_returns = actor, name, num_returns

    def options(self, num_returns: int) -> "_Method":
        return _Method(self._actor, self._name, num_returns)

    def remote(self, *args: Any) -> Any:
        return self._actor.send(self._name, args, self._num_returns)


def _fail(results: list[Any], error: Exception) -> None:
    for result in results:
        if not result.done():
            result.set_exception(error)
            result.exception()  # nobody may ask for it


def in_process(cls: type, *args: Any) -> Callable[[], InProcessActor]:
    """A factory of such actors."""
    return partial(InProcessActor, partial(cls, *args))
