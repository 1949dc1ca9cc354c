"""Every way in which a ternary checkpoint can be unusable ends in one line that names the thing and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflux_core.checkpoint import load_ternary
from bitflux_core.errors import UserError
from bitflux_core.files import file_digest

LAYER = "single_transformer_blocks.0.proj_out"


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def edit_tensors(folder: Path, tensor: str, edit: Callable[[dict], object]) -> None:
    """Rewrites the shard that holds `tensor`, with a digest that fits, as a faulty program would."""
    shard = shard_of(folder, tensor)
    tensors = load_file(shard)
    edit(tensors)
    shard.unlink()
    save_file(tensors, shard)
    edit_config(folder, lambda config: config["quantization_config"]["files"].update({shard.name: file_digest(shard)}))


def truncate(folder: Path) -> None:
    shard = shard_of(folder, f"{LAYER}.packed")
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    shard = shard_of(folder, f"{LAYER}.packed")
    data = bytearray(shard.read_bytes())
    data[-50] ^= 1
    shard.write_bytes(data)


def garbage(folder: Path) -> None:
    shard = shard_of(folder, f"{LAYER}.packed")
    shard.write_bytes(b"not safetensors at all")
    edit_config(folder, lambda config: config["quantization_config"]["files"].update({shard.name: file_digest(shard)}))


def no_trits(folder: Path) -> None:
    edit_tensors(folder, f"{LAYER}.packed", lambda tensors: tensors[f"{LAYER}.packed"][7].fill_(243))


def code_three(folder: Path) -> None:
    planes = torch.zeros(32, 40, dtype=torch.uint8)
    planes[2, 3] = 0b11
    replace(f"{LAYER}.packed", planes)(folder)


def scale(value: float) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(
        folder, f"{LAYER}.scale", lambda tensors: tensors[f"{LAYER}.scale"][1].fill_(value)
    )


def replace(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, name, lambda tensors: tensors.update({name: tensor}))


def header(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: config["quantization_config"].update({key: value}))


DAMAGES = {
    "truncated": (truncate, [".safetensors", "truncated"]),
    "one flipped bit": (flip_a_bit, [".safetensors", "damaged"]),
    "missing file": (lambda folder: shard_of(folder, f"{LAYER}.packed").unlink(), [".safetensors", "is missing"]),
    "not safetensors": (garbage, [".safetensors", "cannot be read"]),
    "byte above 242": (no_trits, [".safetensors", f"{LAYER}.packed", "byte 243 (byte 7)"]),
    "code value 3": (code_three, [".safetensors", f"{LAYER}.packed", "code value 3"]),
    "negative scale": (scale(-1.0), [".safetensors", f"{LAYER}.scale", "negative"]),
    "scale not a number": (scale(float("nan")), [".safetensors", f"{LAYER}.scale", "not finite"]),
    "infinite scale": (scale(float("inf")), [".safetensors", f"{LAYER}.scale", "not finite"]),
    "bias not a number": (
        replace("proj_out.bias", torch.full((64,), float("nan"))),
        [".safetensors", "proj_out.bias", "not finite"],
    ),
    "mismatched codes": (
        replace(f"{LAYER}.packed", torch.zeros(32, 39, dtype=torch.uint8)),
        [f"{LAYER}.packed", "[32, 39]", "[32, 40]"],
    ),
    "too few trits": (
        replace(f"{LAYER}.packed", torch.zeros(1000, dtype=torch.uint8)),
        [f"{LAYER}.packed", "[1000]", "[1024]"],
    ),
    "mismatched norm": (replace("proj_out.bias", torch.zeros(3)), ["proj_out.bias", "[3]", "[64]"]),
    "scale in bf16": (
        replace(f"{LAYER}.scale", torch.zeros(32, dtype=torch.bfloat16)),
        [f"{LAYER}.scale", "BF16", "F32"],
    ),
    "bias of integers": (
        replace(f"{LAYER}.bias", torch.zeros(32, dtype=torch.int64)),
        [f"{LAYER}.bias", "I64"],
    ),
    "tensor left out": (
        lambda folder: edit_tensors(folder, f"{LAYER}.scale", lambda tensors: tensors.pop(f"{LAYER}.scale")),
        ["lacks", f"{LAYER}.scale"],
    ),
    "foreign tensor": (
        lambda folder: edit_tensors(folder, "proj_out.bias", lambda tensors: tensors.update(alien=torch.zeros(2))),
        ["alien", "does not belong"],
    ),
    "unknown format": (header("format_version", 99), ["format 99", "reads 2"]),
    "unknown codes": (header("codes", "decimal"), ["config.json", "'decimal'", "make the checkpoint again"]),
    "no list of files": (header("files", 5), ["checkpoint format"]),
    "plain transformer": (
        lambda folder: edit_config(folder, lambda c: c.pop("quantization_config")),
        ["no ternary checkpoint"],
    ),
    "senseless configuration": (
        lambda folder: edit_config(folder, lambda config: config.update(num_layers="two")),
        ["config.json", "no FLUX transformer"],
    ),
    "another size": (
        lambda folder: edit_config(folder, lambda config: config.update(num_attention_heads=4)),
        ["has shape"],
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), ["config.json", "cannot be read"]),
    "torn configuration": (lambda folder: (folder / "config.json").write_text('{"a": '), ["config.json", "JSON"]),
    "binary configuration": (lambda folder: (folder / "config.json").write_bytes(b"\xff\x00"), ["config.json", "JSON"]),
    "list for a configuration": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json", "object"]),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_in_one_line(ternary_dir, tmp_path, damage, words):
    folder = tmp_path / "copy"
    shutil.copytree(ternary_dir, folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_ternary(folder, dtype=torch.bfloat16, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert all(word in message for word in words), message


def test_an_undamaged_copy_loads(ternary_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(ternary_dir, folder)
    edit_tensors(folder, f"{LAYER}.packed", lambda tensors: None)
    load_ternary(folder, dtype=torch.bfloat16, device="cpu")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json cannot be read \(No such file or directory\): name"):
        load_ternary(tmp_path / "nowhere", dtype=torch.bfloat16, device="cpu")
