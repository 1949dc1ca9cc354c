"""Real actors with random mini models: what one replica draws and scores in this process, two give bit for bit."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from cluster_fakes import VOLATILE
from in_process import in_process

from bitflux_core.errors import UserError
from bitflux_core.samples import Sampling
from cluster.evaluator import EvaluatorActor
from cluster.model_files import ModelFiles, fingerprints
from cluster.plan import build_plan
from cluster.profile import Profile
from cluster.replica import ReplicaActor
from cluster.run import run
from cluster.store import ResultStore
from cluster.text_encoder import TextEncoderActor
from cluster.workers import Workers
from cluster.workload import PromptRecord, Workload

# What the models are does not matter here: a prompt of GenEval's own form does.
PROMPTS = tuple(
    PromptRecord(index, "single_object", f"a photo of a red {shape}", {"tag": "single_object", "include": [include]})
    for index, shape in enumerate(["circle", "square", "triangle"])
    for include in [{"class": shape, "count": 1}]
)
WORKLOAD = Workload("random", "mini-geneval", PROMPTS, images_per_prompt=2, seed=3, digest="0")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    from bitflux_core.checkpoint import save_ternary
    from bitflux_core.convert import quantize_transformer
    from bitflux_core.mini import clip, detector
    from bitflux_core.mini.models import build_pipeline

    folder: Path = tmp_path_factory.mktemp("models")
    pipeline = build_pipeline(seed=0)
    pipeline.save_pretrained(folder / "flux")
    quantize_transformer(pipeline.transformer)
    save_ternary(pipeline.transformer, folder / "ternary", {"source": "a test"}, method="least_squares")
    torch.manual_seed(0)
    detector.save_detector(detector.build_detector(), folder / "detector")
    clip.write_config(folder / "clip")
    clip.save_weights(clip.build_clip(folder / "clip"), folder / "clip")
    return ModelFiles(folder / "flux", folder / "ternary", {"detector": folder / "detector", "clip": folder / "clip"})


@pytest.fixture
def profile(files) -> Profile:
    return Profile(
        name="random",
        models={"pipeline": str(files.pipeline), "ternary": str(files.ternary)}
        | {role: str(path) for role, path in files.scoring.items()},
        sampling=Sampling(width=64, height=64, steps=2, guidance=2.0, max_sequence_length=16),
        batch_size=4,
        shard_seconds=1e-3,
        dtype="bfloat16",
        benchmarks=("random",),
        variants=("bf16", "ternary"),
    )


def workers_in_process(plan, files, store) -> Workers:
    models = files.scoring
    return Workers(
        in_process(ReplicaActor, files.pipeline, files.ternary, plan.dtype, plan.sampling),
        in_process(TextEncoderActor, files.pipeline, plan.dtype, plan.sampling.max_sequence_length),
        in_process(EvaluatorActor, {"random": "mini-geneval"}, models, store),
    )


@pytest.fixture
def one_replica(files, profile, tmp_path, monkeypatch):
    """Results of a single replica in this process, whose actors set its number of threads."""
    threads = torch.get_num_threads()
    plan = planned(profile, files)
    store = ResultStore(str(tmp_path / "one"), "r1")
    with monkeypatch.context() as patch:
        patch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
        summary = run(plan, profile, files, store, replicas=1, workers=workers_in_process(plan, files, store))
    torch.set_num_threads(threads)
    return results(summary, store)


def planned(profile, files):
    return build_plan(profile, [WORKLOAD], profile.variants, fingerprints=fingerprints(files, profile.variants))


def results(summary, store) -> list[dict]:
    assert summary.complete, summary.reason
    table = store.read_rows()
    assert table["error"].null_count == table.num_rows == 12, table["error"]
    return table.drop_columns(list(VOLATILE)).sort_by("sample_id").to_pylist()


@pytest.mark.usefixtures("local_ray")
def test_two_replicas_on_ray_give_the_results_of_one(files, profile, tmp_path, one_replica):
    store = ResultStore(str(tmp_path / "two"), "r1")
    summary = run(planned(profile, files), profile, files, store, replicas=2)
    rows = results(summary, store)
    assert rows == one_replica
    images = [store.read(row["image_path"]) for row in rows]
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert len(set(images)) == 12  # each another one, in both variants
    bf16, ternary = summary.models
    assert bf16.storage_bytes > ternary.storage_bytes
    assert bf16.peak_memory_bytes > ternary.peak_memory_bytes
    assert {bf16.memory_kind, ternary.memory_kind} == {"cpu-resident"}


@pytest.fixture
def connections(monkeypatch) -> list[str]:
    """Hosts that this process looks up; none is reached."""
    asked: list[str] = []

    def refuse(host, *_, **__):
        asked.append(str(host))
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("cluster.device.ray.get_gpu_ids", list)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def test_actors_load_their_models_from_folders_and_ask_no_hub(files, profile, tmp_path, connections):
    threads = torch.get_num_threads()
    try:
        replica = ReplicaActor(files.pipeline, files.ternary, profile.dtype, profile.sampling)
        for variant in ("bf16", "ternary", "ternary-int8", "ternary-reference"):
            replica.start(variant)
        TextEncoderActor(files.pipeline, profile.dtype, profile.sampling.max_sequence_length).start()
        store = ResultStore(str(tmp_path), "r1")
        models = files.scoring
        EvaluatorActor({"random": "mini-geneval"}, models, store).start()
        assert connections == []

        # A part that open_clip would fetch: named, and not fetched.
        lacking = tmp_path / "clip"
        shutil.copytree(models["clip"], lacking)
        config = json.loads((lacking / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"]["hf_model_name"] = "someone/text-tower"
        (lacking / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="clip cannot be loaded"):
            EvaluatorActor({"random": "mini-geneval"}, {**models, "clip": lacking}, store).start()
        assert connections == []
    finally:
        torch.set_num_threads(threads)
