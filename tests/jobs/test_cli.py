"""What all command lines share: exit codes and one-line errors."""

import argparse
import os
import signal
import time

import pytest
from ray.exceptions import RayTaskError

from bitflux_core.errors import UserError
from jobs._cli import BAD_INPUT, INCOMPLETE, exit_code_of, natural, seed


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


def test_a_sigterm_that_comes_in_a_finalizer_is_not_lost(capsys):
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def job() -> int:
        Finalized()
        time.sleep(10)
        return 0

    assert exit_code_of(job) == 3
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_help_is_no_interruption():
    with pytest.raises(SystemExit):
        exit_code_of(failing(SystemExit(0)))


@pytest.mark.parametrize("code", [signal.SIGTERM, 1])
def test_sigterm_is_said_whichever_handler_of_ray_had_it(capsys, code):
    assert exit_code_of(failing(SystemExit(code))) == INCOMPLETE
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_what_object_storage_refuses_is_one_line(capsys):
    from botocore.exceptions import NoCredentialsError

    assert exit_code_of(failing(NoCredentialsError())) == BAD_INPUT
    error = capsys.readouterr().err
    assert error == "error: object storage: Unable to locate credentials: correct the URI or the AWS_* variables\n"


def test_whole_numbers():
    assert (natural("0"), natural("12"), seed(str(2**63 - 1))) == (0, 12, 2**63 - 1)
    for text in ("-1", "1.5", "", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number of at least 0"):
            natural(text)
    with pytest.raises(argparse.ArgumentTypeError, match="below 2\\^63"):
        seed(str(2**63))


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(failing(ZeroDivisionError()))
