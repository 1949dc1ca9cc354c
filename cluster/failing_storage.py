"""A storage that fails: which failures pass, how long to wait for that, and what to say of those that do not."""

import errno
import logging
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from bitflux_core.errors import UserError

# Pauses between tries. A volume that fails over or a throttled bucket is back within seconds; more is an outage.
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

_LASTING_KINDS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_LASTING = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EINVAL,  # also s3fs's word for a request that S3 refuses
    errno.ENAMETOOLONG,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ELOOP,
}

T = TypeVar("T")

log = logging.getLogger(__name__)


class StorageError(UserError):
    """The storage refused or did not answer; what was committed before stays good, and the same command goes on."""


def patiently(call: Callable[[], T]) -> T:
    """The value of `call()`, called again while it fails in a way that may pass.

    `call` must be harmless to repeat, even where a try took effect without an answer. Raises OSError: the last failure,
    or at once one that waiting does not mend (nothing there, no permission, no space).
    """
    for pause in PAUSES_S:
        try:
            return _with_os_errors(call)
        except OSError as error:
            if isinstance(error, _LASTING_KINDS) or error.errno in _LASTING:
                raise
            log.warning("the storage fails (%s); trying again in %.1f s", describe(error), pause)
            time.sleep(pause)
    return _with_os_errors(call)


def describe(error: OSError) -> str:
    """An error of the storage on one line."""
    return " ".join(str(error.strerror or error or type(error).__name__).split())


def _with_os_errors(call: Callable[[], T]) -> T:
    """Botocore's own errors (no connection, no credentials) as what they are elsewhere."""
    try:
        return call()
    except Exception as error:
        # Slow to import and of no use for local storage: where nobody imported it, the error is not its own.
        botocore = sys.modules.get("botocore.exceptions")
        if botocore is None or not isinstance(error, botocore.BotoCoreError):
            raise
        passes = isinstance(error, botocore.ConnectionError | botocore.HTTPClientError)
        raise OSError(errno.EIO if passes else errno.EINVAL, str(error)) from error
