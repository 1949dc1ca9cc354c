"""What the nightly regression keeps beside its runs, at the same output:

    nights/<night>/verdict.json, comparison.parquet, report.md      one folder a night, verdict.json last
    accepted/<series>/00007.json                                    which runs an accepted night consists of

A series is what nights have in common that may be compared: profile, sampler, precision, batches, prompts. An accepted
night is written once and never changed or deleted; the highest number is the one that counts. A verdict is final unless
it says that the night is incomplete: finishing the night replaces that one.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import fsspec

from bitflux_core.errors import UserError
from cluster.failing_storage import patiently
from cluster.overwrite import overwrite
from cluster.plan import Plan
from cluster.store import ResultStore
from cluster.write_once import publish

VERDICT = "verdict.json"
ACCEPTED_FIELDS = ("night", "series", "verdict", "runs", "variants")


@dataclass(frozen=True)
class Accepted:
    """An accepted night: the ids of the runs that hold its baseline and its ternary variants."""

    number: int
    night: str
    baseline_run: str
    variants_run: str
    variants: tuple[str, ...]


class NightFiles:
    """The nights at one output, a path or an fsspec URI."""

    def __init__(self, uri: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(uri)
        self._root = root.rstrip("/")
        self.uri = uri.rstrip("/")

    def folder_uri(self, night: str) -> str:
        return f"{self.uri}/nights/{night}"

    def store(self, run_id: str) -> ResultStore:
        return ResultStore(self.uri, run_id)

    def verdict(self, night: str) -> dict[str, Any] | None:
        """The night's verdict, final or not; None where there is none."""
        return self._read(f"nights/{night}/{VERDICT}")

    def write(self, night: str, name: str, content: bytes) -> None:
        """Writes a file of a night whole, in place of an earlier one of that name."""
        path = f"{self._root}/nights/{night}/{name}"
        try:
            overwrite(self._fs, path, content)
        except OSError as error:
            raise UserError(
                f"output {path}: cannot be written ({error.strerror or error}); free space there, or name another"
            ) from error

    def accepted(self, series: str) -> Accepted | None:
        """The night of this series that was accepted last. UserError where its record or its runs are damaged."""
        numbers = self._numbers(series)
        if not numbers:
            return None
        name = f"accepted/{series}/{max(numbers):05}.json"
        try:
            record = self._read(name) or {}
            runs = record["runs"]
            found = Accepted(
                max(numbers), record["night"], runs["baseline"], runs["variants"], tuple(record["variants"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.uri}/{name}: no record of an accepted night ({error!r}); restore it") from error
        for run_id in (found.baseline_run, found.variants_run):
            if self.store(run_id).manifest() is None:
                raise UserError(
                    f"{self.uri}: the accepted night {found.night} lacks its run {run_id}; restore the run, "
                    f"or give another --output"
                )
        return found

    def accept(self, night: str) -> tuple[int, bool]:
        """Records `night` as accepted: its number, and False where it was the last accepted one already.

        UserError for a night without a verdict, an incomplete one, and where another was accepted at the same moment.
        """
        verdict = self.verdict(night)
        if verdict is None:
            raise UserError(f"--accept {night}: no such night at {self.uri}; `ls {self.uri}/nights` names them")
        if verdict["verdict"] == "incomplete":
            raise UserError(f"--accept {night}: it is incomplete; finish it first with --night {night}")
        series = verdict["series"]
        numbers = self._numbers(series)
        if numbers:
            last = self._read(f"accepted/{series}/{max(numbers):05}.json") or {}
            if last.get("night") == night:
                return max(numbers), False
        number = max(numbers, default=0) + 1
        record = {field: verdict[field] for field in ACCEPTED_FIELDS}
        content = json.dumps({"number": number, **record}, indent=1).encode()
        try:
            won = publish(self._fs, f"{self._root}/accepted/{series}/{number:05}.json", content)
        except OSError as error:
            raise UserError(f"output {self.uri}: cannot be written ({error.strerror or error})") from error
        if not won:
            raise UserError(f"--accept {night}: another night was accepted at the same moment; look at it, try again")
        return number, True

    def _numbers(self, series: str) -> list[int]:
        self._fs.invalidate_cache()
        try:
            paths = patiently(lambda: self._fs.ls(f"{self._root}/accepted/{series}", detail=False))
        except FileNotFoundError:
            return []
        stems = [path.rstrip("/").rpartition("/")[2].removesuffix(".json") for path in paths if path.endswith(".json")]
        return [int(stem) for stem in stems if stem.isdigit()]

    def _read(self, name: str) -> Any:
        try:
            return json.loads(patiently(lambda: self._fs.cat_file(f"{self._root}/{name}")))
        except FileNotFoundError:
            return None


def series_of(plan: Plan) -> str:
    """Which nights compare: 16 hex digits over all that `plan` fixes but the models and the variants."""
    described = plan.describe()
    fields = ("profile", "sampling", "dtype", "batch_size", "benchmarks")
    text = json.dumps({field: described[field] for field in fields}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
