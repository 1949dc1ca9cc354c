"""verdict.json: how a job ended, for programs. The exit code of `ray job submit` says nothing of a stopped job.

It lies in the output's folder (the last job there) and in the run's own (the last job that worked on that run; the one
to read where several jobs share an output). Each is replaced whole: when a job begins, by one that says it has not
ended, and again when it ends. So a verdict is never that of an earlier job, even where the present one was killed.
A mistake that is found before the output or the run exists leaves none behind: no file means not complete.

`verdict` is complete, incomplete (`resumable`: the same command goes on) or error (a mistake that the user can mend;
`reason` names it), and `exit_code` the job's own: 0, 3 and 2; 1 with incomplete is a defect.
"""

import json
import os
import shlex
import sys
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import fsspec

from bitflux_core.errors import UserError
from cluster.overwrite import overwrite
from cluster.store import ResultStore
from jobs._cli import BAD_INPUT, COMPLETE, DEFECT, INCOMPLETE, message_of, stopped_by
from jobs._ray import submission_id

NAME = "verdict.json"
SCHEMA_VERSION = 1
NOT_ENDED = "the job has not ended: it is still running, or it was killed"


class Verdict:
    """The verdict files of one job. As a context manager it writes how the job began and, whatever happens, ended."""

    def __init__(self, output: str) -> None:
        """`output` is a path or an fsspec URI, as `cluster.output.check_output` returns it."""
        self._fs, root = fsspec.core.url_to_fs(output)
        self._folders = [root.rstrip("/")]
        self._document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            **_ending(INCOMPLETE, NOT_ENDED),
            "run_id": None,
            "results": None,
            "submission_id": submission_id(),
            "command": shlex.join(sys.argv),
            "pid": os.getpid(),
            "started": _now(),
            "ended": None,
        }

    def __enter__(self) -> Self:
        self._write(only_where_output_exists=True)
        return self

    def begin(self, store: ResultStore) -> None:
        """Names the run, whose folder must be this job's to write to."""
        _, folder = fsspec.core.url_to_fs(store.run_uri)
        self._folders = [self._folders[0], folder]
        self._document |= {"run_id": store.run_id, "results": store.run_uri}
        self._write()

    def end(self, exit_code: int, reason: str | None, findings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes how the job ends, with what it found, and returns the whole document. May be called again.

        UserError where the output cannot be written.
        """
        self._document |= {**_ending(exit_code, reason), "ended": _now(), **(findings or {})}
        self._write()
        return self._document

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is None:
            return
        self._document |= {**_ending(*_how(error)), "ended": _now()}
        with suppress(UserError):  # the error itself is what the user must hear of
            self._write(only_where_output_exists=True)

    def _write(self, only_where_output_exists: bool = False) -> None:
        content = json.dumps(self._document, indent=1, ensure_ascii=False, allow_nan=False).encode()
        try:
            if only_where_output_exists and not self._fs.exists(self._folders[0]):
                return
            for folder in self._folders:
                overwrite(self._fs, f"{folder}/{NAME}", content)
        except OSError as error:
            where = f"{self._folders[0]}/{NAME}"
            raise UserError(f"output {where}: cannot be written ({error.strerror or error})") from error


def _ending(exit_code: int, reason: str | None) -> dict[str, Any]:
    verdict = {COMPLETE: "complete", BAD_INPUT: "error"}.get(exit_code, "incomplete")
    return {"verdict": verdict, "exit_code": exit_code, "reason": reason, "resumable": verdict == "incomplete"}


def _how(error: BaseException) -> tuple[int, str]:
    """Exit code and reason of a job that ended in `error`, as `exit_code_of` has them."""
    if isinstance(error, UserError):
        return BAD_INPUT, message_of(error)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return INCOMPLETE, stopped_by(error) or "interrupted"
    return DEFECT, f"{type(error).__name__}: {message_of(error)}"


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
