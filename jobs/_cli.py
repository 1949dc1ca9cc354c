"""What every job's command line shares: exit codes, one-line errors, checked option values."""

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from rich.console import Console

from bitflux_core.errors import UserError

COMPLETE, DEFECT, BAD_INPUT, INCOMPLETE = 0, 1, 2, 3
DEFAULT_OUTPUT = "results"
TABLE_WIDTH = 120  # columns of text where the output is no terminal

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, as every other mistake is answered."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def exit_code_of(job: Callable[[], int]) -> int:
    """Runs a job. A UserError becomes one line on standard error and exit code 2, SIGTERM and Ctrl-C end it as
    incomplete; any other exception is a defect. Call it in the main thread."""
    # As Ray's own handler does, once there is one.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    hook, sys.unraisablehook = sys.unraisablehook, _lost_exit_again(sys.unraisablehook)
    try:
        return job()
    except UserError as error:
        print("error:", message_of(error), file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        # s3fs passes on botocore's own errors for what is wrong with keys, addresses and rights.
        if not any(kind.__module__.partition(".")[0] == "botocore" for kind in type(error).__mro__):
            raise
        print(f"error: object storage: {message_of(error)}: correct the URI or the AWS_* variables", file=sys.stderr)
        return BAD_INPUT
    except (KeyboardInterrupt, SystemExit) as error:
        reason = stopped_by(error)
        if reason is None:
            raise
        print(reason, file=sys.stderr)
        return INCOMPLETE
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def _lost_exit_again(otherwise: Callable[[Any], object]) -> Callable[[Any], object]:
    """A hook for exceptions that Python drops, as all that leave a finalizer: a SIGTERM that came then comes again."""

    def hook(dropped: Any) -> None:
        if isinstance(dropped.exc_value, SystemExit):
            again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
            again.daemon = True
            again.start()
        else:
            otherwise(dropped)

    return hook


def message_of(error: BaseException) -> str:
    """What an error says, in one line, whatever a library said."""
    # An actor's error comes as Ray's own, whose text is the actor's traceback; the error itself is its cause.
    return " ".join(str(getattr(error, "cause", None) or error).split())


def stopped_by(error: KeyboardInterrupt | SystemExit) -> str | None:
    """By what a job was stopped from outside; None where it left by itself, as `--help` does."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # Ray's handlers leave with the signal's number or, in a process that began a cluster, with 1; no job does itself.
    return "stopped by SIGTERM" if error.code in (signal.SIGTERM, 1) else None


def console_on(stream: TextIO) -> Console:
    """A console as wide as the terminal; wide enough for every table where there is none."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console


def output_of(args: argparse.Namespace) -> str:
    """Where `--output` says that results lie, by default ./results. UserError for an empty one."""
    if args.output == "":  # an unset variable of a shell: it would mean the current folder
        raise UserError("--output is empty: name a folder or URI, or leave it out")
    return DEFAULT_OUTPUT if args.output is None else args.output


def nonempty(text: str) -> str:
    """Any text but the empty one, which an unset variable of a shell gives."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave the option out")
    return text


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number that torch's generators take, with room for those that are counted up from it."""
    number = natural(text)
    if number >= 1 << 63:
        raise argparse.ArgumentTypeError(f"'{text}' is not below 2^63")
    return number


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names, none empty."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of names separated by commas")
    return parts


def run_id(text: str) -> str:
    """A run's id: part of file names, so letters, digits, dots, dashes and underscores only."""
    if not RUN_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"'{text}' may hold only letters, digits, '.', '_' and '-'")
    return text
