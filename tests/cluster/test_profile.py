"""Profiles: the embedded ones load, a user's own is checked, and every fault is one line that names it."""

import pickle
import shutil

import pytest
import yaml

from bitflux_core.errors import UserError
from bitflux_core.samples import Sampling
from cluster.manifests import MANIFESTS
from cluster.profile import load_profile

MINI = yaml.safe_load((MANIFESTS / "profiles" / "mini.yaml").read_text())


def write(folder, **changes):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**MINI, **changes}))
    return str(path)


def test_mini_draws_252_pairs_of_both_benchmarks_by_default():
    profile = load_profile("mini")
    assert (profile.sampling.width, profile.sampling.height, profile.sampling.max_sequence_length) == (128, 128, 16)
    assert profile.variants == ("bf16", "ternary")
    assert profile.benchmarks == ("mini-geneval", "mini-t2i-compbench")
    assert (6 + 8) * profile.limit * profile.images_per_prompt == 252


def test_flux_dev_states_what_the_paper_leaves_open():
    profile = load_profile("flux-dev")
    assert profile.sampling == Sampling(1024, 1024, 50, 3.5, 512)
    assert profile.limit is None
    assert [assumption.split(":")[0] for assumption in profile.assumptions] == [
        "50 steps",
        "guidance 3.5",
        "512 T5 tokens",
    ]


def test_a_profile_travels_to_actors():
    profile = load_profile("mini")
    assert pickle.loads(pickle.dumps(profile)) == profile


def test_paths_beside_a_users_profile_become_absolute(tmp_path):
    (tmp_path / "weights").mkdir()
    shutil.copy(MANIFESTS / "workloads" / "mini-geneval.yaml", tmp_path / "own-workload.yaml")
    models = {**MINI["models"], "pipeline": "weights"}
    profile = load_profile(write(tmp_path, models=models, benchmarks=["own-workload.yaml", "geneval"], name="own"))
    assert profile.models.pipeline == str(tmp_path / "weights")
    assert profile.models.detector == MINI["models"]["detector"]
    assert profile.benchmarks == (str(tmp_path / "own-workload.yaml"), "geneval")


def test_a_folder_still_to_be_made_beside_a_users_profile(tmp_path):
    models = {**MINI["models"], "ternary": "./ternary", "clip": "../clip", "detector": "someone/detector"}
    profile = load_profile(write(tmp_path, models=models, name="own"))
    assert profile.models.ternary == str(tmp_path / "ternary")
    assert profile.models.clip == str(tmp_path / ".." / "clip")
    assert profile.models.detector == "someone/detector"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_sise": 8}, "batch_sise"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "float8"}, "dtype"),
        ({"variants": []}, "variants"),
        ({"variants": ["bf16", "bf16"]}, "bf16 named more than once"),
        ({"limit": -1}, "limit"),
        ({"name": "a/b"}, "name"),
        ({"models": {"detector": "x"}}, "models.pipeline"),
        ({"resources": {"replica_gpus": -1}}, "resources.replica_gpus"),
        ({"resources": {"gpu_types": {"H100": 0}}}, "resources.gpu_types.H100"),
        ({"cost": {"megapixel_step": 0}}, "cost.megapixel_step"),
        ({"shard_seconds": -1}, "shard_seconds"),
        ({"sampling": {**MINI["sampling"], "stepz": 3}}, "stepz"),
        ({"sampling": {**MINI["sampling"], "steps": 0}}, "steps"),
        ({"sampling": {**MINI["sampling"], "width": 100}}, "width must be a positive multiple of 16"),
        ({"sampling": {**MINI["sampling"], "guidance": float("nan")}}, "guidance"),
        ({"sampling": {**MINI["sampling"], "max_sequence_length": 513}}, "max_sequence_length must be from 1 to 512"),
        ({"images_per_prompt": 10**20}, "images_per_prompt"),
    ],
)
def test_a_faulty_profile_is_one_line_that_names_the_fault(tmp_path, changes, named):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_profile(path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a list", "models: [unclosed", "", b"\xff\xfe"])
def test_a_file_that_is_no_profile(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"own\.yaml") as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"unknown profile 'maxi': choose one of flux-dev, mini"):
        load_profile("maxi")
    with pytest.raises(UserError, match="no such file"):
        load_profile(str(tmp_path / "absent.yaml"))
