"""Joining Ray: the cluster that RAY_ADDRESS names (Ray sets it in a submitted job), else our own on this machine.

`prepare` must run before anything imports ray, which reads these variables then.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator

from bitflux_core.errors import UserError

# Ray hands the driver of `ray job submit` its runtime environment and its metadata in this variable.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def in_submitted_job() -> bool:
    """True in the driver of `ray job submit`."""
    return JOB_CONFIG in os.environ


def submission_id() -> str | None:
    """The id that `ray job` knows this job by; None where it was not submitted."""
    metadata = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata") or {}
    return metadata.get("job_submission_id")


def prepare() -> None:
    """Settings that Ray reads on import."""
    # Workers start from the environment that runs this job; Ray would build one anew for each worker under `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if "RAY_ADDRESS" not in os.environ:
        # Our own Ray lives as long as this job. Without a mode Ray would leave a token in the home folder, which
        # changes how every Ray that starts there later authenticates.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Ray for the length of a job; one that was started here ends with it."""
    import ray

    # A bare ray.init() would also join any Ray that happens to run here; only RAY_ADDRESS asks for that.
    address = None if "RAY_ADDRESS" in os.environ else "local"
    dashboard = False if address else None
    try:
        ray.init(address=address, include_dashboard=dashboard, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise UserError(f"Ray at {where} cannot be joined ({error}): correct or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()
