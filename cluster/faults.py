"""What an error means: whose fault it is, and whether the process that raised it can go on."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

# After these a process's CUDA context fails every call, or returns what cannot be trusted.
POISONED = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "device-side assert",
    "launch failure",
    "uncorrectable ecc error",
    "hardware stack error",
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
NODE_GONE = ("node has died", "node was terminated", "node is dead")

log = logging.getLogger(__name__)


class ActorLost(Exception):
    """The actor died, hung or could not be reached. `blamed` where the call that it was working on is to blame."""

    def __init__(self, message: str, blamed: bool) -> None:
        super().__init__(message)
        self.blamed = blamed


class RunStopped(Exception):
    """The run cannot go on, or was told to end; what is committed stays, and the same command resumes."""


class ActorHung(Exception):
    """A call took far longer than its like."""


class ModelLoadError(Exception):
    """A variant could not be loaded: the replica's trouble, not that of the samples it was to draw."""


# With one of these a call's actor is gone, or is to go.
ACTOR_GONE = (RayActorError, NodeDiedError, OutOfMemoryError, ActorHung)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed where this was raised: by the device's allocator or by the host's."""
    if isinstance(error, MemoryError):
        return True
    # By name, for nothing here imports torch: torch.OutOfMemoryError, and RuntimeErrors of the CPU's allocator.
    known = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError", "RuntimeError")
    return known and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def is_poisoned(error: BaseException) -> bool:
    """Whether this process's CUDA context is lost."""
    if type(error).__name__ == "AcceleratorError":
        return not is_out_of_memory(error)
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in POISONED)


@contextmanager
def poisoned_process_ends() -> Iterator[None]:
    """Ends this process where the CUDA context is lost: the scheduler then makes another, with a context of its own."""
    try:
        yield
    except RuntimeError as error:
        if is_poisoned(error):
            log.error("the CUDA context is lost, this process ends: %s", error)
            end_process()
        raise


def end_process() -> None:
    """Ends this process at once; a clean exit would wait for the device."""
    sys.stderr.flush()
    time.sleep(0.2)  # the answer to the call before may still be on its way
    os._exit(1)


def is_machines_fault(error: BaseException) -> bool:
    """Whether the same work may well succeed elsewhere: a lost node or object, a host without memory or disk."""
    if isinstance(error, ActorLost):
        return not error.blamed
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    lost = (ObjectLostError, ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, ModelLoadError)
    return isinstance(error, lost) or is_node_gone(error)


def is_node_gone(error: BaseException) -> bool:
    """Whether the actor went with its node."""
    if isinstance(error, RayActorError):
        return error.preempted or any(text in str(error) for text in NODE_GONE)
    return isinstance(error, NodeDiedError)


def is_lost_object(error: BaseException) -> bool:
    """Whether an argument of the call left Ray's object store, with its node for instance: it must be made again."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return isinstance(error, ObjectLostError)


def explain(error: BaseException) -> str:
    """An error on one line: its type and message as the actor raised them, or why its process ended."""
    if isinstance(error, (ActorLost, ActorHung)):
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
