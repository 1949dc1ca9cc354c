"""What all command lines share: exit codes and one-line errors."""

import os
import signal

import pytest
from ray.exceptions import RayTaskError

from bitflux_core.errors import UserError
from jobs._cli import exit_code_of


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


def test_sigterm_ends_a_job_as_incomplete(capsys):
    def job() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert exit_code_of(job) == 3
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_help_is_no_interruption():
    with pytest.raises(SystemExit):
        exit_code_of(failing(SystemExit(0)))


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(failing(ZeroDivisionError()))
