"""Writing a run's images and scores as the benchmarks' own harnesses lay them out.

    geneval          results.jsonl beside the folders: filename, tag, prompt, correct, reason, metadata, details
    t2i-compbench    <category>/<its annotation folder>/vqa_result.json: [{"question_id", "answer"}, ...]

A result file holds the images that have a score: a failed one is no zero, and is left out.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec

from bitflux_core.errors import UserError
from cluster.failing_storage import describe
from cluster.image_layouts import GENEVAL_RESULTS, CompBenchLayout, GenEvalLayout, compbench_results
from cluster.rescoring import drawn_benchmark
from cluster.store import ResultStore
from cluster.workload import PromptRecord, Workload
from cluster.write_once import publish
from evaluators.compbench.categories import ATTRIBUTES

WRITERS = 8
COLUMNS = ["variant", "benchmark", "tag", "prompt", "prompt_index", "image_index"]
COLUMNS += ["score", "correct", "reason", "detections", "image_path", "error"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Export:
    """What to write of one variant and benchmark: each image's file, and the files beside the images. `n_expected`
    counts the samples, failed ones included, `n_scored` those in the result files."""

    n_expected: int
    names: dict[str, str]  # of the run's file -> of the layout's
    others: dict[str, bytes]
    n_scored: int


def planned_export(store: ResultStore, workload: Workload, variant: str, layout: str) -> Export:
    """What a complete run's images of one variant are in `layout`. UserError where the layout cannot hold a prompt, and
    where the workload's prompts are not those that the run drew."""
    drawn = drawn_benchmark(store, workload)
    table = store.read_rows().select(COLUMNS)
    rows = [row for row in table.to_pylist() if (row["variant"], row["benchmark"]) == (variant, workload.name)]
    rows.sort(key=lambda row: (row["prompt_index"], row["image_index"]))
    try:
        return _LAYOUTS[layout](rows, workload.prompts, drawn["images_per_prompt"])
    except ValueError as error:
        raise UserError(f"layout {layout}: {error}; export it in another layout") from error


def write_export(export: Export, store: ResultStore, to: str, written: Callable[[], None] = lambda: None) -> None:
    """Writes the files into the folder `to`, a local path or an fsspec URI, which must be empty or not there;
    `written` is called after each image. UserError where it is not empty or cannot be written."""
    if not to:
        raise UserError("--to is empty: name a new folder or URI")
    try:
        fs, root = fsspec.core.url_to_fs(to)
        if fs.exists(root) and (not fs.isdir(root) or fs.ls(root)):
            raise UserError(f"{to} is there already and not empty; name another folder with --to")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"folder {to}: {error}") from error

    def put(name: str, content: bytes) -> None:
        try:
            publish(fs, f"{root.rstrip('/')}/{name}", content)
        except OSError as error:
            raise UserError(f"{to}/{name}: cannot be written ({describe(error)})") from error

    def copy(pair: tuple[str, str]) -> None:
        ours, theirs = pair
        try:
            put(theirs, store.read(ours))
        except FileNotFoundError as error:
            raise UserError(f"{store.run_uri}/{ours}: no such file; the run's images are not whole") from error
        written()

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(copy, export.names.items()))
    for name, content in export.others.items():
        put(name, content)


def _geneval(rows: list[Row], prompts: Sequence[PromptRecord], images_per_prompt: int) -> Export:
    layout = GenEvalLayout(prompts)
    names: dict[str, str] = {}
    others: dict[str, bytes] = {}
    lines: list[str] = []
    for row in rows:
        prompt = prompts[row["prompt_index"]]
        name = layout.image_name(prompt, row["image_index"])
        others[layout.metadata_name(prompt)] = (json.dumps(prompt.metadata) + "\n").encode()
        if row["image_path"]:
            names[row["image_path"]] = name
        if row["correct"] is not None:
            lines.append(json.dumps(_result(row, prompt, name)) + "\n")
    others[GENEVAL_RESULTS] = "".join(lines).encode()
    return Export(len(rows), names, others, len(lines))


def _result(row: Row, prompt: PromptRecord, name: str) -> dict[str, Any]:
    details: dict[str, list[list[float]]] = {}
    for found in json.loads(row["detections"]):
        details.setdefault(found["label"], []).append([*found["box"], found["score"]])
    return {
        "filename": name,
        "tag": row["tag"],
        "prompt": row["prompt"],
        "correct": row["correct"],
        "reason": row["reason"],
        "metadata": json.dumps(prompt.metadata),
        "details": json.dumps(details),
    }


def _compbench(rows: list[Row], prompts: Sequence[PromptRecord], images_per_prompt: int) -> Export:
    layout = CompBenchLayout(prompts, [images_per_prompt])
    names: dict[str, str] = {}
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        prompt = prompts[row["prompt_index"]]
        name = layout.image_name(prompt, row["image_index"])
        if row["image_path"]:
            names[row["image_path"]] = name
        if row["score"] is not None:
            number = layout.number(prompt, row["image_index"])
            answers[compbench_results(name)].append({"question_id": number, "answer": _answer(row)})
    others = {name: json.dumps(part).encode() for name, part in answers.items()}
    return Export(len(rows), names, others, sum(map(len, answers.values())))


def _answer(row: Row) -> str | float:
    """BLIP-VQA's results are text with four decimals upstream, all others numbers."""
    return f"{row['score']:.4f}" if row["tag"] in ATTRIBUTES else row["score"]


_LAYOUTS = {"geneval": _geneval, "t2i-compbench": _compbench}
