import hashlib
import re
import shutil

import pytest

from bitflux_core.errors import UserError
from bitflux_core.files import file_digest, fingerprint


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "part" / "weights.safetensors").write_bytes(b"0123")
    return folder


def test_digest_is_sha256_of_the_bytes(model):
    expected = hashlib.sha256(b"0123").hexdigest()
    assert file_digest(model / "part" / "weights.safetensors") == expected


def test_fingerprint_does_not_depend_on_the_place(model, tmp_path):
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(model))
    assert fingerprint(shutil.copytree(model, tmp_path / "elsewhere")) == fingerprint(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text("{ }"),
        lambda folder: (folder / "part" / "weights.safetensors").write_bytes(b"0124"),
        lambda folder: (folder / "part" / "weights.safetensors").rename(folder / "weights.safetensors"),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    ],
    ids=["configuration", "weights", "file's place", "one file more"],
)
def test_fingerprint_changes_with_the_model(model, change):
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_fingerprint_overlooks_what_no_model_reads(model):
    before = fingerprint(model)
    (model / "README.md").write_text("hello")
    assert fingerprint(model) == before


def test_several_folders_count_in_their_order(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert len({fingerprint(model, other), fingerprint(other, model), fingerprint(model)}) == 3


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no model files: name the folder of a saved model"):
        fingerprint(tmp_path / "nowhere")
