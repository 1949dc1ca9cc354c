"""Runs over fake actors that are exported, scored again from their files, and compared row by row; and bad files."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cluster_fakes import FINGERPRINTS, PROFILE, FakeEncoder, FakeReplica, Faults, finished_run
from in_process import in_process
from PIL import Image

from bitflux_core.errors import UserError
from cluster.evaluator import EvaluatorActor
from cluster.exported_images import planned_export, write_export
from cluster.image_layouts import CompBenchLayout, GenEvalLayout
from cluster.imported_images import ImageFolder, ImportedReplica, check_seen, find_images, import_plan
from cluster.imported_results import RecordedEvaluator, read_results
from cluster.plan import build_plan
from cluster.rescoring import rescoring_plan, rescoring_run_id
from cluster.store import ResultStore
from cluster.stored_images import StoredEncoder, StoredReplica, stored_images
from cluster.workers import Workers
from cluster.workload import PromptRecord, Workload
from evaluators.base import Score, image_fault

LAYOUTS = ("geneval", "t2i-compbench")
SCORED = ("score", "correct", "reason", "detections", "image_digest", "error", "tag", "prompt")
PROMPTS = [
    ("color", "a red car."),
    ("spatial", "a cat on the left of a dog"),
    ("color", "ein grüner Apfel, 緑"),
    ("color", "a red car."),
    ("non_spatial", "l'été d'une \"reine\""),
]
TOY = Workload(
    "toy",
    "toy-evaluator",
    tuple(PromptRecord(i, tag, text, {"tag": tag, "prompt": text}) for i, (tag, text) in enumerate(PROMPTS)),
    4,
    7,
    "f6",
)


class Looker:
    """Scores what is in the picture, so that no image can stand for another one."""

    fingerprint = "looker"

    def score(self, images, metadata):
        return [self._score(image, about) for image, about in zip(images, metadata, strict=True)]

    def _score(self, image, about):
        if fault := image_fault(image):
            return Score.failed(fault)
        red, green, blue = (float(value) for value in image.mean(axis=(0, 1)))
        shares = zip(("car", "dog", "car"), (red, green, blue), strict=True)
        found = [{"label": label, "score": round(v / 255, 4), "box": [0.0, 1.0, v, 9.5]} for label, v in shares]
        found.sort(key=lambda one: -one["score"])
        return Score(round(red / 255, 4), round(red * 16) % 2 == 1, f"{about['prompt']}: {green}", found)


class LookingEvaluator(EvaluatorActor):
    def start(self) -> None:
        self._evaluators = {"toy": Looker()}


@pytest.fixture(autouse=True)
def actors_end_without_ray(monkeypatch):
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())


def workers(store, replica, encoder) -> Workers:
    return Workers(replica, encoder, in_process(LookingEvaluator, {}, {}, store))


@pytest.fixture
def drawn(tmp_path) -> ResultStore:
    """A complete run of both variants."""
    store, faults = ResultStore(str(tmp_path / "results"), "drawn"), Faults(tmp_path)
    plan = build_plan(PROFILE, [TOY], ("bf16", "ternary"), fingerprints=FINGERPRINTS)
    draw = workers(store, in_process(FakeReplica, faults), in_process(FakeEncoder, faults))
    finished_run(plan, store, workers=draw, replicas=1)
    return store


@pytest.fixture
def export(drawn, tmp_path):
    """Writes the ternary images in a layout and returns the folder."""

    def write(layout: str) -> Path:
        write_export(planned_export(drawn, TOY, "ternary", layout), drawn, str(tmp_path / layout))
        return tmp_path / layout

    return write


@pytest.fixture
def score(tmp_path):
    """Scores a folder and returns plan and rows by prompt and image."""

    def run(
        folder: Path | str, layout: str, workload: Workload = TOY, name: str = "imported", *, recorded: bool = False
    ):
        plan = import_plan(PROFILE, workload, "theirs", None, None)
        counts = [workload.images_per_prompt]
        made = {"geneval": GenEvalLayout(workload.prompts), "t2i-compbench": CompBenchLayout(workload.prompts, counts)}
        images = find_images(ImageFolder(str(folder)), made[layout], plan)
        plan = replace(plan, fingerprints={"theirs": images.fingerprint})
        store = ResultStore(str(tmp_path / "results"), name)
        read = workers(store, in_process(ImportedReplica, images), in_process(StoredEncoder))
        if recorded:
            results = read_results(images.folder, layout, images.found)
            read = replace(read, evaluator=in_process(RecordedEvaluator, "toy", results, store))
        summary, rows = finished_run(plan, store, workers=read, replicas=1)
        return images, summary, {(row["prompt_index"], row["image_index"]): row for row in rows}

    return run


def scored(rows: list[dict], variant: str) -> dict:
    return {
        (row["prompt_index"], row["image_index"]): {column: row[column] for column in SCORED}
        for row in rows
        if row["variant"] == variant
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_exported_to_a_bucket_scores_as_it_did(drawn, score, s3, layout):
    export = planned_export(drawn, TOY, "ternary", layout)
    write_export(export, drawn, f"s3://bucket/{layout}")
    _, _, rows = score(f"s3://bucket/{layout}", layout)
    assert scored([*rows.values()], "theirs") == scored(drawn.read_rows().to_pylist(), "ternary")
    with pytest.raises(UserError, match=f"s3://bucket/{layout} is there already and not empty"):
        write_export(export, drawn, f"s3://bucket/{layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_run_scores_as_it_did(drawn, export, score, layout):
    images, summary, rows = score(export(layout), layout)
    original = drawn.read_rows().to_pylist()
    assert scored([*rows.values()], "theirs") == scored(original, "ternary")
    assert {row["pair_id"] for row in rows.values()} == {row["pair_id"] for row in original}
    assert len({row["image_digest"] for row in rows.values()}) == 20
    assert (images.left_over, summary.n_failed) == (0, 0)
    # No model drew them here.
    (model,) = summary.models
    assert (model.storage_bytes, model.seconds_per_image, model.fingerprint) == (None, None, images.fingerprint)


def test_geneval_results_read_back(drawn, export, score):
    _, _, rows = score(export("geneval"), "geneval", recorded=True)
    original = scored(drawn.read_rows().to_pylist(), "ternary")
    assert len({row["correct"] for row in original.values()}) == 2
    right_or_wrong = {place: {**row, "score": float(row["correct"])} for place, row in original.items()}
    assert scored([*rows.values()], "theirs") == right_or_wrong


def test_compbench_results_read_back(drawn, export, score):
    _, _, rows = score(export("t2i-compbench"), "t2i-compbench", recorded=True)
    original = scored(drawn.read_rows().to_pylist(), "ternary")
    kept = ("score", "image_digest", "error")
    assert {p: [r[k] for k in kept] for p, r in rows.items()} == {p: [r[k] for k in kept] for p, r in original.items()}


def test_results_numbered_by_order_or_by_file_are_the_same(export, score):
    """Upstream counts BLIP-VQA's and CLIP's results from 0, whatever the files are numbered."""
    folder = export("t2i-compbench")
    for path in (folder / "spatial" / "samples").iterdir():
        path.unlink() if "_000001" in path.name else None
    by_file = folder / "spatial" / "labels" / "annotation_obj_detection_2d" / "vqa_result.json"
    results = [result for result in json.loads(by_file.read_text()) if result["question_id"] != 1]
    by_file.write_text(json.dumps(results[::-1]))
    _, _, before = score(folder, "t2i-compbench", recorded=True)
    by_file.write_text(json.dumps([{**result, "question_id": i} for i, result in enumerate(results)]))
    _, _, after = score(folder, "t2i-compbench", recorded=True, name="after")
    assert before[1, 1]["score"] is None
    assert before[1, 3]["score"] == results[-1]["answer"]
    assert {p: r["score"] for p, r in before.items()} == {p: r["score"] for p, r in after.items()}


@pytest.mark.parametrize(
    ("ids", "scores"),
    [
        ((0, 1, 3), (0.0, 0.1, 0.3)),  # the files' own numbers
        ((3, 1, 0), (0.0, 0.1, 0.3)),
        ((0, 1, 2), (0.0, 0.1, 0.2)),  # their order
        ((0, 2, 3), (0.0, None, 0.3)),  # numbers of files, one of which is another
        ((1, 3), (None, 0.1, 0.3)),
        ((0, 1), (0.0, 0.1, None)),
    ],
)
def test_an_answer_is_its_own_images(export, score, ids, scores):
    """Images 0, 1 and 3 are there, each answer is a tenth of its id."""
    folder = export("t2i-compbench")
    (removed,) = (folder / "spatial" / "samples").glob("*_000002.png")
    removed.unlink()
    file = folder / "spatial" / "labels" / "annotation_obj_detection_2d" / "vqa_result.json"
    file.write_text(json.dumps([{"question_id": each, "answer": each / 10} for each in ids]))
    _, _, rows = score(folder, "t2i-compbench", recorded=True)
    assert tuple(rows[1, image]["score"] for image in (0, 1, 3)) == scores
    said = [rows[1, image]["reason"] for image in (0, 1, 3)]
    assert said == ["" if answer is None else "their scores" for answer in scores]


def test_an_image_without_a_result_is_an_error(export, score):
    folder = export("geneval")
    lines = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(lines[1:]) + "\n")
    _, summary, rows = score(folder, "geneval", recorded=True)
    assert summary.n_failed == 1
    assert rows[0, 0]["error"] == "the result files have no score of it"
    assert rows[0, 0]["image_path"]


@pytest.mark.parametrize(
    ("layout", "name", "text"),
    [
        ("geneval", "results.jsonl", "{}\n"),
        ("geneval", "results.jsonl", "[]\n"),
        ("geneval", "results.jsonl", "not JSON\n"),
        ("t2i-compbench", "color/annotation_blip/vqa_result.json", '[{"question_id": 0, "answer": "high"}]'),
        ("t2i-compbench", "color/annotation_blip/vqa_result.json", '[{"question_id": 0, "answer": NaN}]'),
        ("t2i-compbench", "color/annotation_blip/vqa_result.json", "{"),
        (
            "t2i-compbench",
            "color/annotation_blip/vqa_result.json",
            '[{"question_id": 0, "answer": 0.5}, {"question_id": "0", "answer": 0.25}]',
        ),
    ],
)
def test_a_damaged_result_file_is_named(export, score, layout, name, text):
    folder = export(layout)
    (folder / name).unlink()
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="not a result file") as error:
        score(folder, layout, recorded=True)
    assert name in str(error.value)


def test_a_folder_without_result_files_is_named(export, score):
    folder = export("geneval")
    (folder / "results.jsonl").unlink()
    with pytest.raises(UserError, match="no result file"):
        score(folder, "geneval", recorded=True)


def test_geneval_files_are_upstreams(drawn, export):
    folder = export("geneval")
    assert json.loads((folder / "00002" / "metadata.jsonl").read_text()) == TOY.prompts[2].metadata
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows = [row for row in drawn.read_rows().to_pylist() if row["variant"] == "ternary"]
    assert len(lines) == len(rows) == 20
    for line, row in zip(lines, rows, strict=True):
        assert list(line) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
        assert (folder / line["filename"]).read_bytes() == drawn.read(row["image_path"])
        assert [line[key] for key in ("tag", "prompt", "correct")] == [row[key] for key in ("tag", "prompt", "correct")]
        assert json.loads(line["metadata"])["prompt"] == row["prompt"]
        details: dict[str, list] = {}
        for one in json.loads(row["detections"]):
            details.setdefault(one["label"], []).append([*one["box"], one["score"]])
        assert json.loads(line["details"]) == details


def test_compbench_files_are_upstreams(drawn, export):
    folder = export("t2i-compbench")
    rows = scored(drawn.read_rows().to_pylist(), "ternary")
    answers = json.loads((folder / "color" / "annotation_blip" / "vqa_result.json").read_text())
    # The category's prompts are the benchmark's 0, 2 and 3.
    expected = [f"{rows[prompt, image]['score']:.4f}" for prompt in (0, 2, 3) for image in range(4)]
    assert answers == [{"question_id": i, "answer": answer} for i, answer in enumerate(expected)]
    spatial = folder / "spatial" / "labels" / "annotation_obj_detection_2d" / "vqa_result.json"
    assert json.loads(spatial.read_text())[3] == {"question_id": 3, "answer": rows[1, 3]["score"]}
    assert (folder / "non_spatial" / "annotation_clip" / "vqa_result.json").is_file()
    assert (folder / "color" / "samples" / "a red car._000011.png").is_file()


def spoil(folder: Path) -> dict[tuple[int, int], str]:
    """Damages files of a GenEval layout; a word of each one's error, by place."""
    pixels = np.arange(48 * 32 * 3, dtype=np.uint8).reshape(48, 32, 3)

    def at(prompt: int, image: int) -> Path:
        return folder / f"{prompt:05}" / "samples" / f"{image:05}.png"

    def save(path: Path, image: Image.Image, form: str = "PNG") -> None:
        image.save(path, form)

    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(noise, "PNG")
    at(0, 0).write_bytes(noise.getvalue()[:-2000])
    at(0, 1).write_text("<html>404</html>")
    at(0, 2).write_bytes(b"")
    save(at(1, 0), Image.fromarray(pixels).convert("RGBA"))
    save(at(1, 1), Image.fromarray(pixels[..., 0]))
    save(at(1, 2), Image.fromarray(pixels.astype(np.uint16)[..., 0] * 256))
    at(1, 3).unlink()
    at(1, 3).mkdir()
    save(at(2, 0), Image.new("RGB", (4097, 4097)))
    damaged = bytearray(noise.getvalue())
    damaged[len(damaged) // 2] ^= 0xFF
    at(2, 1).write_bytes(damaged)
    at(3, 0).unlink()
    at(3, 0).symlink_to(folder / "nowhere")
    at(3, 1).unlink()
    at(3, 1).symlink_to(folder / "00004")
    save(at(0, 3), Image.new("RGB", (3000, 1)))
    save(at(2, 2), Image.fromarray(pixels))  # of another size, and good
    save(at(2, 3), Image.fromarray(pixels[:1, :16]), "JPEG")  # so is this, long and under the wrong name
    return {
        (0, 0): "cannot be read",
        (0, 1): "not a PNG",
        (0, 2): "not a PNG",
        (0, 3): "3000x1 pixels, one side over 16 times the other",
        (1, 0): "mode RGBA",
        (1, 1): "mode L",
        (1, 2): "mode I;16",
        (1, 3): "no such file",
        (2, 0): "scale it down",
        (2, 1): "cannot be read",
        (3, 0): "no such file",
        (3, 1): "cannot be read",
    }


def test_bad_files_are_rows_with_errors_at_the_first_try(export, score):
    folder = export("geneval")
    faults = spoil(folder)
    _, summary, rows = score(folder, "geneval")
    assert summary.n_failed == len(faults)
    assert {place for place, row in rows.items() if row["error"]} == faults.keys()
    for place, word in faults.items():
        row = rows[place]
        assert word in row["error"]
        assert f"{place[0]:05}/samples/{place[1]:05}.png" in row["error"]
        assert [row[key] for key in ("score", "correct", "image_path", "image_digest")] == [None] * 4
    assert {row["attempts"] for row in rows.values()} == {1}
    assert rows[2, 2]["score"] is not None
    assert rows[2, 3]["score"] is not None


def test_a_folder_of_bad_files_alone_is_a_run(export, score):
    folder = export("t2i-compbench")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    _, summary, rows = score(folder, "t2i-compbench")
    assert summary.n_failed == len(rows) == 20


def test_files_that_the_plan_does_not_ask_for_are_counted(export, score):
    folder = export("t2i-compbench")
    shutil.copy(
        folder / "color" / "samples" / "a red car._000000.png", folder / "color" / "samples" / "a bus_000001.png"
    )
    images, summary, _ = score(folder, "t2i-compbench")
    assert (images.left_over, summary.n_failed) == (1, 0)


def test_repeated_prompts_keep_their_own_files_whatever_the_seed_rule(drawn, export, score):
    _, _, rows = score(export("t2i-compbench"), "t2i-compbench", replace(TOY, seed_rule="image"))
    original = scored(drawn.read_rows().to_pylist(), "ternary")
    assert {place: row["image_digest"] for place, row in rows.items()} == {
        place: row["image_digest"] for place, row in original.items()
    }


def test_other_files_are_another_fingerprint(export, score):
    folder = export("geneval")
    before, _, _ = score(folder, "geneval")
    again, _, _ = score(folder, "geneval", name="again")
    Image.new("RGB", (64, 64)).save(folder / "00000" / "samples" / "00000.png")
    after, _, _ = score(folder, "geneval", name="after")
    assert before.fingerprint == again.fingerprint != after.fingerprint


def rewrite(folder: Path, text: str | None) -> None:
    (folder / "00001" / "metadata.jsonl").unlink()
    if text is not None:
        (folder / "00001" / "metadata.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "no such file"),
        ("{", "JSON object"),
        ("[]", "JSON object"),
        ('{"tag": "spatial"}', "JSON object"),
        ('{"prompt": "a bus"}', "'a bus', the benchmark's is 'a cat on the left of a dog'"),
    ],
)
def test_geneval_metadata_of_another_list_are_refused(export, score, text, named):
    folder = export("geneval")
    rewrite(folder, text)
    with pytest.raises(UserError, match=r"00001/metadata\.jsonl") as error:
        score(folder, "geneval")
    assert named in str(error.value)


def test_a_folder_without_any_of_the_images_is_refused(export, score, tmp_path):
    with pytest.raises(UserError, match="none of its 26 files"):
        score(export("geneval"), "t2i-compbench")
    with pytest.raises(UserError, match="no such folder"):
        score(tmp_path / "absent", "geneval")


def test_a_folder_that_a_node_does_not_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("cluster.imported_images.on_nodes", lambda nodes, call, path: [call(path), call(path + "-")])
    with pytest.raises(UserError, match="1 of 2 nodes do not see it"):
        check_seen(ImageFolder(str(tmp_path)), ["a", "b"])
    check_seen(ImageFolder(str(tmp_path)), ["a"])


def test_nothing_is_overwritten(drawn, tmp_path):
    export = planned_export(drawn, TOY, "bf16", "geneval")
    (tmp_path / "there").mkdir()
    write_export(export, drawn, str(tmp_path / "there"))  # empty
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "there").rglob("*"))
    for folder in ("there", "there/results.jsonl"):
        with pytest.raises(UserError, match="not empty"):
            write_export(export, drawn, str(tmp_path / folder))
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "there").rglob("*")) == before


def test_a_prompt_that_no_file_name_holds_is_refused_before_anything_is_written(tmp_path):
    odd = replace(TOY, prompts=(PromptRecord(0, "color", "either/or", {"tag": "color", "prompt": "either/or"}),))
    store, faults = ResultStore(str(tmp_path / "results"), "odd"), Faults(tmp_path)
    plan = build_plan(PROFILE, [odd], ("bf16",), fingerprints=FINGERPRINTS)
    draw = workers(store, in_process(FakeReplica, faults), in_process(FakeEncoder, faults))
    finished_run(plan, store, workers=draw, replicas=1)
    with pytest.raises(UserError, match="either/or"):
        planned_export(store, odd, "bf16", "t2i-compbench")
    assert planned_export(store, odd, "bf16", "geneval").n_scored == 4
    with pytest.raises(UserError, match="digest"):
        planned_export(store, replace(odd, digest="e7"), "bf16", "geneval")


def test_images_made_elsewhere_score_again_from_the_store(drawn, export, score, tmp_path, monkeypatch):
    folder = export("geneval")
    (folder / "00000" / "samples" / "00002.png").unlink()
    _, _, first = score(folder, "geneval")
    shutil.rmtree(folder)
    monkeypatch.setattr(Looker, "fingerprint", "looker-2")
    source = ResultStore(str(tmp_path / "results"), "imported")
    plan = rescoring_plan(source, PROFILE, [TOY])
    images = stored_images(source, plan)
    store = ResultStore(str(tmp_path / "results"), rescoring_run_id(plan, source))
    assert store.run_id.startswith("imported-rescored-")
    read = workers(store, in_process(StoredReplica, images), in_process(StoredEncoder))
    summary, rows = finished_run(plan, store, workers=read, replicas=1)
    again = {(row["prompt_index"], row["image_index"]): row for row in rows}
    assert {row["sample_id"] for row in rows} == {row["sample_id"] for row in first.values()}
    assert {row["evaluator_fingerprint"] for row in rows} == {"looker-2"}
    assert summary.n_failed == 1
    assert again[0, 2]["error"] == "run imported has no image of this sample"
    assert again[0, 2]["attempts"] == 1
    before, after = scored([*first.values()], "theirs"), scored(rows, "theirs")
    del before[0, 2], after[0, 2]
    assert before == after


def test_a_part_of_a_run_scores_again_as_that_part(drawn, tmp_path):
    """Prompts, images a prompt and settings are the run's, whatever the profile says today."""
    store, faults = ResultStore(str(tmp_path / "results"), "part"), Faults(tmp_path)
    plan = build_plan(PROFILE, [TOY], ("bf16",), limit=1, images_per_prompt=2, fingerprints=FINGERPRINTS)
    draw = workers(store, in_process(FakeReplica, faults), in_process(FakeEncoder, faults))
    finished_run(plan, store, workers=draw, replicas=1)
    today = PROFILE.model_copy(update={"dtype": "bfloat16", "variants": ("ternary",)})
    again = rescoring_plan(store, today, [TOY])
    ids = [sample_id for shard in plan.shards for sample_id in plan.sample_ids(shard)]
    assert [sample_id for shard in again.shards for sample_id in again.sample_ids(shard)] == ids
    with pytest.raises(UserError, match="drew no benchmark 'other'"):
        rescoring_plan(store, today, [replace(TOY, name="other")])
    with pytest.raises(UserError, match="no complete run absent"):
        rescoring_plan(ResultStore(str(tmp_path / "results"), "absent"), today, [TOY])
