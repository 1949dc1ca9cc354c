"""jobs/bench.py without a GPU: what it refuses, and tiny runs through all that it measures, prints and writes."""

import contextlib
import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from bitflux_core.benchmark import models, quantize, steps
from bitflux_core.errors import UserError
from bitflux_core.samples import Sampling
from cluster.manifests import REPOSITORY
from cluster.profile import load_profile
from evaluators.compbench.categories import CATEGORIES
from jobs import bench
from jobs.quantize import parse as parse_quantize
from kernels import ops

MACHINE = {"section", "device", "driver", "cuda", "torch", "triton", "git_revision", "date"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def files(folder, section: str) -> tuple[dict, list[dict]]:
    (document,), (table,) = folder.glob(f"{section}-*.json"), folder.glob(f"{section}-*.parquet")
    return json.loads(document.read_text()), pq.read_table(table).to_pylist()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["everything"], "everything"),
        ([], "SECTION"),
        (["kernels", "--batch", "2"], "--batch"),
        (["transformer", "--tiny", "--variants", "ternary,int4"], "int4"),
        (["images", "--tiny", "--variants", "int4"], "int4"),
        (["images", "--tiny", "--resolution", "100"], "multiple of 16"),
        (["images", "--tiny", "--steps", "0"], "--steps"),
        (["distill", "--tiny", "--gpus", "0"], "--gpus"),
        (["quantize", "--tiny", "--prompts", "0"], "--prompts"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert named in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "section", ["kernels", "transformer", "images", "small-gpu", "distill", "quantize", "loading", "evaluators"]
)
def test_a_section_says_that_it_needs_a_gpu(section, capsys, tmp_path):
    assert bench.main([section, "--output", str(tmp_path / "bench")]) == 2
    error = capsys.readouterr().err
    assert f"section {section} needs a CUDA GPU" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "bench").exists()


def test_an_output_that_cannot_be_made_is_refused_before_measuring(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert bench.main(["kernels", "--tiny", "--output", str(tmp_path / "file" / "bench")]) == 2
    assert "--output" in capsys.readouterr().err


def test_kernels(capsys, tmp_path):
    assert bench.main(["kernels", "--tiny", "--output", str(tmp_path)]) == 0
    assert "48x64" in capsys.readouterr().out
    document, table = files(tmp_path, "kernels")
    assert document["machine"]["torch"] == torch.__version__
    assert document["settings"]["copy_gb_s"] > 0
    assert [(row["out_features"], row["in_features"], row["tokens"]) for row in table] == [
        (48, 64, 1),
        (48, 64, 24),
        (96, 32, 2),
    ]
    for row, in_document in zip(table, document["rows"], strict=True):
        assert set(row) >= MACHINE
        assert row.items() >= in_document.items()
        assert row["error"] is None
        for column in ("bf16_ms", "fp8_ms", "unpack_fp8_ms", "ternary_ms", "ternary_int8_ms"):
            assert row[column] > 0
        assert row["int8_speed_of_fp8"] == row["fp8_ms"] / row["ternary_int8_ms"]
        assert (row["int8_of_copy"] is None) == (row["tokens"] == 24)


def test_a_wrong_product_gets_no_time_and_exit_code_3(capsys, tmp_path, monkeypatch):
    right = ops.matmul

    def wrong(x_MK, *weight):
        y_MN = right(x_MK, *weight)
        y_MN[-1, 7] += 1
        return y_MN

    monkeypatch.setattr(ops, "matmul", wrong)
    assert bench.main(["kernels", "--tiny", "--output", str(tmp_path)]) == 3
    assert "wrong result: 1 of" in capsys.readouterr().out
    for row in files(tmp_path, "kernels")[1]:
        assert row["ternary_ms"] is None
        assert row["ternary_speed_of_bf16"] is None
        assert row["ternary_int8_ms"] > 0


def test_json_is_one_document(capsys, tmp_path):
    options = ["--tiny", "--variants", "bf16,ternary-int8", "--profile", "--json", "--output", str(tmp_path)]
    assert bench.main(["transformer", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == files(tmp_path, "transformer")[0]
    full, ternary = document["rows"]
    assert (full["mode"], ternary["mode"]) == ("bf16", "ternary-int8")
    assert full["speedup"] == 1
    assert ternary["speedup"] == full["step_ms"] / ternary["step_ms"]
    assert ternary["storage_gb"] < full["storage_gb"]
    assert ternary["resident_gb"] < full["resident_gb"]
    assert ternary["steps"] >= 10
    assert "share" in (tmp_path / "profile-ternary-int8.txt").read_text()


def test_a_failure_is_a_row_and_the_others_are_measured(capsys, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(models, "fuse", broken)
    options = ["--tiny", "--variants", "ternary,ternary-reference", "--output", str(tmp_path)]
    assert bench.main(["transformer", *options]) == 3
    assert "ternary: RuntimeError: no such kernel" in capsys.readouterr().out
    failed, measured = files(tmp_path, "transformer")[1]
    assert failed["step_ms"] is None
    assert "no such kernel" in failed["error"]
    assert measured["step_ms"] > 0
    assert measured["baseline"] is None  # no bf16 was measured


def test_what_does_not_fit_is_a_finding(tmp_path, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(steps, "build_transformer", too_large)
    assert bench.main(["transformer", "--tiny", "--variants", "bf16", "--output", str(tmp_path)]) == 0
    (row,) = files(tmp_path, "transformer")[1]
    assert row["error"] == "does not fit: CUDA out of memory. Tried to allocate 20 GiB"


def test_images(capsys, tmp_path):
    options = ["--tiny", "--variants", "bf16,ternary", "--steps", "1,2", "--output", str(tmp_path)]
    assert bench.main(["images", *options]) == 0
    assert "s an image" in capsys.readouterr().out
    rows = files(tmp_path, "images")[1]
    assert [(row["mode"], row["steps"]) for row in rows] == [("bf16", 1), ("bf16", 2), ("ternary", 1), ("ternary", 2)]
    for row in rows:
        assert row["error"] is None
        assert row["image_s"] == pytest.approx(row["text_s"] + row["denoise_s"] + row["decode_s"])


def test_the_scheduler_is_measured_on_a_ray_of_its_own(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert bench.main(["scheduler", "--output", str(tmp_path)]) == 2
    assert "unset RAY_ADDRESS" in capsys.readouterr().err


def test_the_schedulers_tables(capsys, tmp_path, monkeypatch):
    from cluster.benchmark import Measurement

    drawing = {"samples": 32, "wall_s": 16.1, "draw_s": 32.0, "busy_share": 0.9938, "idle": 0.0062, "gap_ms": 3.0}
    measured = [
        Measurement("scheduler", 2, **drawing, target="idle <= 2%", met=True),
        Measurement("Ray Data", 2, error="ModuleNotFoundError: No module named 'pandas'"),
        Measurement("resume scan", samples=200, wall_s=2.5, target="<= 2 s", met=False),
    ]
    monkeypatch.setattr("cluster.benchmark.measure", lambda *_: iter(measured))
    monkeypatch.setattr("jobs._ray.connected", contextlib.nullcontext)
    assert bench.main(["scheduler", "--output", str(tmp_path)]) == 3
    said = capsys.readouterr().out
    words = [line.replace("│", " ").split() for line in said.splitlines()]
    assert ["scheduler", "2", "32", "16.1", "99.38%", "0.62%", "3.0", "-", "idle", "<=", "2%", "met"] in words
    assert ["resume", "scan", "200", "2.50", "-", "<=", "2", "s", "missed"] in words
    assert "Ray Data, 2 replicas: ModuleNotFoundError" in said
    document, table = files(tmp_path, "scheduler")
    assert document["settings"]["cores"] > 0
    assert [row["met"] for row in table] == [True, None, False]


@pytest.mark.slow  # a Ray of its own
def test_the_scheduler_for_real(tmp_path):
    command = [sys.executable, str(REPOSITORY / "jobs" / "bench.py"), "scheduler", "--output", str(tmp_path)]
    knobs = ["--replicas", "2", "--seconds", "8", "--samples", "400"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([*command, *knobs], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in files(tmp_path, "scheduler")[1]}
    assert set(rows) == {"scheduler", "Ray Data", "plan", "driver's memory", "resume scan", "merging the files"}
    for engine in ("scheduler", "Ray Data"):
        assert (rows[engine]["samples"], rows[engine]["replicas"]) == (16, 2)
        assert rows[engine]["draw_s"] >= 16  # every sample waited its second
        assert 0 < rows[engine]["busy_share"] <= 1
    assert rows["driver's memory"]["samples"] == 800
    assert rows["resume scan"]["samples"] == 400
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".parquet"]


@pytest.mark.slow  # two runs, each on a Ray of its own
def test_scaling_draws_through_the_scheduler(tmp_path):
    """On cores in place of GPUs, where nothing can be said of the efficiency."""
    command = [sys.executable, "jobs/bench.py", "scaling", "--tiny", "--gpus", "1,2", "--images", "2", "--steps", "1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document, rows = files(tmp_path, "scaling")
    assert [(row["gpus"], row["images"], row["error"]) for row in rows] == [(1, 2, None), (2, 4, None)]
    assert rows[0]["efficiency"] == pytest.approx(1.0)
    assert all(0 < row["busy_share"] <= 1 and row["images_a_second"] > 0 for row in rows)
    assert document["settings"]["tiny"]


@pytest.mark.slow
def test_what_scoring_costs_beside_drawing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluators.benchmark.CALLS", 1)
    assert bench.main(["evaluators", "--tiny", "--drawing", "0.5", "--output", str(tmp_path)]) == 0
    assert "of drawing" in capsys.readouterr().out
    _, rows = files(tmp_path, "evaluators")
    assert [row["error"] for row in rows] == [None] * 10
    assert [row["category"] for row in rows[1:9]] == list(CATEGORIES)
    *parts, whole = rows
    assert whole["images"] == 2_212 + 8 * 3_000
    mean = sum(row["images"] * row["image_ms"] for row in parts) / whole["images"]
    assert whole["image_ms"] == pytest.approx(mean)
    assert whole["drawing_share"] == pytest.approx(mean / 500)
    by_category = {row["category"]: row for row in rows}
    assert all(2 < by_category[name]["objects"] < 20 for name in ("spatial", "numeracy"))


def test_training_end_to_end(capsys, tmp_path):
    assert bench.main(["distill", "--tiny", "--batch", "1,2", "--output", str(tmp_path)]) == 0
    assert "hours in all" in capsys.readouterr().out
    document, rows = files(tmp_path, "distill")
    assert [(row["gpus"], row["batch"], row["error"]) for row in rows] == [(1, 1, None), (1, 2, None)]
    for row in rows:
        assert row["planned_gb"] > 0
        assert row["peak_gb"] is None
        steps = row["recipe_steps"] * min(row["step_s"], row["int8_step_s"])
        assert row["recipe_hours"] > steps / 3600
    assert document["settings"]["recipe_steps"] == rows[0]["recipe_steps"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".parquet"]  # no checkpoint stays


def test_training_that_does_not_fit_is_refused_with_the_figures(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bitflux_core.benchmark.distill.check_memory", _refuse)
    assert bench.main(["distill", "--tiny", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: 54.8 GB asked, 24 GB free\n"


def test_quantizing_the_blocks(capsys, tmp_path):
    assert bench.main(["quantize", "--tiny", "--prompts", "2", "--output", str(tmp_path)]) == 0
    assert "s reading" in capsys.readouterr().out
    document, rows = files(tmp_path, "quantize")
    settings = document["settings"]
    assert (settings["prompts"], settings["tiny"]) == (2, True)
    assert [(row["part"], row["block"], row["times"]) for row in rows[:-2]] == [
        ("calibration", "double", 4),
        ("calibration", "single", 4),
        ("calibration", "outside", 4),
        ("codes", "double", 1),
        ("codes", "single", 1),
        ("codes", "outside", 1),
        ("reconstruction", "double", 1),
        ("reconstruction", "single", 1),
    ]
    for row in rows:
        assert row["error"] is None
        assert row["planned_gb"] > 0
        assert row["peak_gb"] is None
        assert row["hours"] == pytest.approx(row["times"] * row["seconds"] / 3600)
        assert row["seconds"] > (row["read_s"] or 0)
        assert (row["step_s"] is None) == (row["part"] != "reconstruction")
    *parts, plain, trained = rows
    assert trained["hours"] == pytest.approx(sum(row["hours"] for row in parts))
    assert plain["hours"] == pytest.approx(sum(row["hours"] for row in parts[:6]))
    assert settings["teacher_step_s"] == pytest.approx(sum(row["seconds"] for row in parts[:3]))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".parquet"]  # no pipeline stays


def test_quantizing_that_does_not_fit_is_refused_with_the_figures(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bitflux_core.benchmark.quantize.check_memory", _refuse)
    assert bench.main(["quantize", "--tiny", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: 54.8 GB asked, 24 GB free\n"


def test_what_is_quantized_is_the_shipped_recipe():
    profile, recipe = load_profile("flux-dev"), quantize.FLUX_DEV
    assert recipe.prompts == profile.quantize.calibration_prompts
    assert recipe.states_a_prompt == parse_quantize([]).states_a_prompt
    assert recipe.batch == profile.batch_size
    sampling = Sampling(1024, 1024, recipe.sampler_steps, quantize.GUIDANCE, models.FLUX_DEV.text_tokens)
    assert sampling == profile.sampling
    assert models.FLUX_DEV.resolution == sampling.width


def _refuse(*_):
    raise UserError("54.8 GB asked, 24 GB free")


@pytest.mark.slow  # a Ray of its own
def test_training_on_ranks_that_share_the_model(tmp_path):
    command = [sys.executable, "jobs/bench.py", "distill", "--tiny", "--gpus", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = files(tmp_path, "distill")[1]
    assert (row["gpus"], row["batch"], row["error"]) == (2, 2, None)
    assert row["step_s"] > 0
    assert row["save_s"] > 0


@pytest.mark.slow  # processes that load, one a checkpoint
def test_loading_is_measured_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bitflux_core.benchmark.loading.CASES", (("bf16", None), ("ternary", "trits")))
    assert bench.main(["loading", "--tiny", "--output", str(tmp_path)]) == 0
    assert "trits" in capsys.readouterr().out
    document, (dense, trits) = files(tmp_path, "loading")
    assert document["settings"]["tiny"]
    assert [(row["mode"], row["codes"]) for row in (dense, trits)] == [("bf16", None), ("ternary", "trits")]
    assert all(min(row["from_storage_s"], row["from_cache_s"], row["host_peak_gb"]) > 0 for row in (dense, trits))
    assert trits["stored_gb"] < dense["stored_gb"]
    assert trits["faster"] == pytest.approx(dense["from_cache_s"] / trits["from_cache_s"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".parquet"}


@pytest.mark.slow  # a process that loads
def test_a_checkpoint_that_cannot_be_loaded_is_a_row_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr("bitflux_core.benchmark.loading.CASES", (("ternary", "trits"),))
    monkeypatch.setattr("bitflux_core.benchmark.loading._drop_from_cache", lambda file: file.write_bytes(b"no"))
    assert bench.main(["loading", "--tiny", "--output", str(tmp_path)]) == 3
    (row,) = files(tmp_path, "loading")[1]
    assert row["error"].startswith("UserError")
    assert "truncated or damaged" in row["error"]
    assert row["from_cache_s"] is None
