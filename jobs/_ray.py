"""Joining Ray: the cluster that RAY_ADDRESS names (Ray sets it in a submitted job), else our own on this machine.

`prepare` must run before anything imports ray, which reads these variables then.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

from bitflux_core.errors import UserError


def in_submitted_job() -> bool:
    """True in the driver of `ray job submit`: Ray hands it its runtime environment in this variable."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


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
