"""What each detector saw in the sanity image when it first ran, kept beside the runs of an output:

    <uri>/_detectors/<the detector's fingerprint>.json      written once, by the first evaluator that uses it

Scores of two runs compare only where their detector sees alike, so an evaluator asks here before it scores anything.
"""

import json
from typing import TYPE_CHECKING

import fsspec

from bitflux_core.errors import UserError
from cluster.failing_storage import StorageError, describe, patiently
from cluster.write_once import publish

if TYPE_CHECKING:
    from evaluators.detector_check import DetectorRecord

FOLDER = "_detectors"


def check_detector(uri: str, seen: "DetectorRecord") -> None:
    """Keeps `seen` as the record of its detector at the output `uri`, or compares it with the one that is there.

    Of several that come first at once, one writes and the others compare. Raises UserError where the two differ or the
    record is damaged, and StorageError.
    """
    from evaluators.detector_check import DetectorRecord, differences

    fs, root = fsspec.core.url_to_fs(uri)
    name = f"{FOLDER}/{seen.fingerprint}.json"
    path, shown = f"{root.rstrip('/')}/{name}", f"{uri.rstrip('/')}/{name}"
    try:
        if publish(fs, path, json.dumps(seen.as_json(), indent=1, ensure_ascii=False).encode()):
            return
        content = patiently(lambda: fs.cat_file(path))
    except OSError as error:
        raise StorageError(
            f"{shown}: cannot be written or read ({describe(error)}); "
            "once the storage allows it, the same command goes on"
        ) from error
    try:
        recorded = DetectorRecord.from_json(json.loads(content))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown} is no record of a detector ({error!r}); remove it and run the same again") from error
    found = differences(recorded, seen)
    if found:
        raise UserError(
            f"detector {seen.fingerprint} on {seen.device} (torch {seen.torch}) does not see what it saw on "
            f"{recorded.device} (torch {recorded.torch}): {found[0]}, {len(found)} differences in all; "
            f"run on {recorded.device}, or remove {shown} to accept what it sees now"
        )
