"""What a slot makes of a dead, an unreachable and a failing actor."""

import asyncio

import pytest
from in_process import InProcessActor, ProcessEnded
from ray.exceptions import ActorUnavailableError

from cluster.actor_slot import ActorSlot
from cluster.faults import ActorLost
from cluster.limits import Limits


class Worker:
    """Answers `work(outcome)` by raising what it is given, if that is an exception."""

    def start(self):
        pass

    def work(self, outcome):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.fixture(autouse=True)
def killed(monkeypatch):
    actors = []
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: (actor.kill(), actors.append(actor)))
    return actors


def value(result):
    """What a call returned, without its seconds."""
    return result[0] if isinstance(result, tuple) else result


def outcomes(*work, limits=None):
    """The slot, and what calls that are all sent at once come to."""

    async def send_all():
        slot = ActorSlot("w", lambda: InProcessActor(Worker), lambda actor: actor.start.remote(), limits or Limits())
        await slot.ready()
        calls = [slot.call(lambda actor, what=what: actor.work.remote(what), timeout=lambda: 60) for what in work]
        results = await asyncio.gather(*calls, return_exceptions=True)
        calls = [slot.call(lambda actor: actor.work.remote("after"), timeout=lambda: 60)]
        (after,) = await asyncio.gather(*calls, return_exceptions=True)
        return slot, [value(result) for result in results], value(after)

    return asyncio.run(send_all())


def test_of_a_dead_actors_calls_only_the_one_in_work_is_blamed():
    _, results, after = outcomes("a", ProcessEnded(), "c")
    assert results[0] == "a"
    assert [(type(error), error.blamed) for error in results[1:]] == [(ActorLost, True), (ActorLost, False)]
    assert after == "after"


def test_an_unreachable_actor_that_answers_again_is_kept(killed):
    error = ActorUnavailableError("no route", b"\0" * 16)
    slot, results, after = outcomes(error, "b")
    assert (type(results[0]), results[0].blamed) == (ActorLost, False)
    assert results[1] == "b"
    assert after == "after"
    assert not killed
    assert slot.retired is None


def test_a_slot_is_retired_after_failures_in_a_row_only():
    bad = ValueError("bad")
    slot, _, _ = outcomes(bad, bad, "fine", bad, bad, limits=Limits(failures=3))
    assert slot.retired is None
    slot, results, after = outcomes(bad, bad, bad, limits=Limits(failures=3))
    assert slot.retired == "w failed 3 times in a row, at last with ValueError: bad"
    assert results == [bad] * 3
    assert (type(after), after.blamed) == (ActorLost, False)
