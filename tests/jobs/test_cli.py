"""What all command lines share, and the estimate of the time left."""

from dataclasses import dataclass

import pytest
from ray.exceptions import RayTaskError

from bitflux_core.errors import UserError
from jobs._cli import exit_code_of
from jobs._progress import Pace


def failing(error: BaseException):
    def job() -> int:
        raise error

    return job


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    assert exit_code_of(failing(UserError("first\n  second"))) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_a_mistake_found_by_an_actor_is_one_line_too(capsys):
    """Ray raises an error of its own that is a UserError as well and whose text is the actor's whole traceback."""
    cause = UserError("weights.safetensors is damaged: copy it again")

    wrapped = RayTaskError("start", "ray::Actor.start()\n  File 'replica.py'\nUserError: ...", cause)
    assert exit_code_of(failing(wrapped.as_instanceof_cause())) == 2
    assert capsys.readouterr().err == "error: weights.safetensors is damaged: copy it again\n"


def test_an_interrupted_job_is_incomplete(capsys):
    assert exit_code_of(failing(KeyboardInterrupt())) == 3
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(failing(ZeroDivisionError()))


@dataclass
class Event:
    done: int
    resumed: int = 100
    total: int = 1000
    failed: int = 0
    stage: str = "drawing"


def test_the_time_left_is_that_of_the_images_still_to_draw():
    pace = Pace()
    assert pace.time_left(Event(done=100), now=60.0) == ""
    assert pace.time_left(Event(done=200), now=150.0) == ""  # 90 s of mostly starting up say nothing
    assert pace.time_left(Event(done=300), now=160.0) == "ETA 0:01:10"  # 100 images in 10 s
    assert pace.time_left(Event(done=1000), now=200.0) == ""
