import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from bitflux_core.accounting import resident_bytes, size_report
from bitflux_core.benchmark.models import FLUX_DEV, random_transformer
from bitflux_core.checkpoint import empty_transformer, load_ternary, save_ternary
from bitflux_core.convert import quantize_transformer
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears


class CreatedTensors(TorchDispatchMode):
    """Records every tensor with memory that comes out of an operation."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.seen.append((tuple(tensor.shape), tensor.dtype))
        return result


def full_weights(created: CreatedTensors, transformer) -> list:
    """Floating tensors among the created ones that are as large as a block's weight and belong to nothing else."""
    layers = block_linears(transformer).values()
    blocks = {(layer.out_features, layer.in_features) for layer in layers}
    others = {tuple(tensor.shape) for tensor in transformer.state_dict().values()}
    return [(shape, dtype) for shape, dtype in created.seen if shape in blocks - others and dtype.is_floating_point]


@pytest.mark.parametrize("codes", ["planes", "trits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_saved_comes_back(transformer, tmp_path, dtype, codes):
    quantize_transformer(transformer)
    transformer.to(torch.bfloat16)
    save_ternary(transformer, tmp_path / "ternary", {"source": "a test"}, method="least_squares", codes=codes)
    loaded = load_ternary(tmp_path / "ternary", dtype=dtype, device="cpu", activations="int8", execution="reference")

    assert len({file.stat().st_mode for file in (tmp_path / "ternary").iterdir()}) == 1  # whoever reads one reads all
    saved = transformer.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (saved[name].dtype if name.endswith((".packed", ".scale")) else dtype)
        assert torch.equal(tensor, saved[name].to(tensor.dtype)), name
    assert loaded.state_dict().keys() == saved.keys()
    assert loaded.dtype == dtype
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {(layer.activations, layer.execution) for layer in block_linears(loaded).values()} == {("int8", "reference")}


@pytest.mark.parametrize("first", ["planes", "trits"])
@pytest.mark.parametrize("then", ["planes", "trits"])
def test_a_loaded_checkpoint_is_saved_in_either_layout(transformer, tmp_path, first, then):
    quantize_transformer(transformer)
    save_ternary(transformer, tmp_path / "first", {}, method="test", codes=first)
    loaded = load_ternary(tmp_path / "first", dtype=torch.bfloat16, device="cpu")
    save_ternary(loaded, tmp_path / "then", {}, method="test", codes=then)
    again = load_ternary(tmp_path / "then", dtype=torch.bfloat16, device="cpu").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("codes", ["planes", "trits"])
def test_files_hold_exactly_the_bytes_of_the_accounting(transformer, tmp_path, codes):
    quantize_transformer(transformer)
    save_ternary(transformer, tmp_path / "new", {}, method="least_squares", codes=codes, max_shard_size=40_000)
    shards = sorted((tmp_path / "new").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    loaded = load_ternary(tmp_path / "new", dtype=torch.bfloat16, device="cpu")
    assert sum(sizes) == size_report(loaded, codes).storage_bytes
    assert len(shards) > 1
    assert max(sizes) <= 40_000


def test_config_is_the_models_own_with_provenance(ternary_dir, transformer):
    config = json.loads((ternary_dir / "config.json").read_text())
    header = config.pop("quantization_config")
    assert config == json.loads(transformer.to_json_string())
    assert (header["quant_method"], header["codes"]) == ("bitflux", "trits")
    assert (header["format_version"], header["method"], header["provenance"]) == (
        2,
        "least_squares",
        {"source": "a test"},
    )
    assert "least_squares" in (ternary_dir / "README.md").read_text()


def test_loading_never_holds_a_full_block_weight(ternary_dir):
    with CreatedTensors() as created:
        loaded = load_ternary(ternary_dir, dtype=torch.bfloat16, device="cpu")
    assert created.seen
    assert not full_weights(created, loaded)


def test_the_recorder_would_see_a_full_weight(ternary_dir):
    loaded = load_ternary(ternary_dir, dtype=torch.bfloat16, device="cpu")
    with CreatedTensors() as created:
        loaded.single_transformer_blocks[0].proj_out.dequantize()
    assert full_weights(created, loaded)


def test_a_folder_in_use_is_not_written_over(transformer, tmp_path):
    quantize_transformer(transformer)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is in use: name a new or an empty folder"):
        save_ternary(transformer, tmp_path, {}, method="least_squares")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dense_transformer_is_not_saved(transformer, tmp_path):
    with pytest.raises(ValueError, match="not ternary"):
        save_ternary(transformer, tmp_path / "ternary", {}, method="least_squares")
    assert not (tmp_path / "ternary").exists()


_LOADED = """
import sys, torch
from pathlib import Path
import bitflux_core
from bitflux_core.checkpoint import load_ternary
from diffusers import FluxTransformer2DModel
def kilobytes(what):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(what))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports, or of the process that forked this
before = kilobytes("VmRSS")
{load}
print(1024 * (kilobytes("VmHWM") - before))
"""
_LOADERS = {
    "load_ternary": "load_ternary(sys.argv[1], dtype=torch.bfloat16, device='cpu')",
    "from_pretrained": "FluxTransformer2DModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16)",
}


_BESIDE = 100_000_000  # bytes beside the model while it loads: a shard's pages, buffers of decoding, allocators' slack


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of FLUX.1-dev's single blocks, six in place of 38, in the shards of all checkpoints; bytes in memory."""
    sizes = replace(FLUX_DEV, transformer={"num_layers": 0, "num_single_layers": 6, "guidance_embeds": True})
    folder = tmp_path_factory.mktemp("large") / "ternary"
    transformer = random_transformer("ternary", sizes, torch.device("cpu"))
    save_ternary(transformer, folder, {}, method="random")
    return folder, resident_bytes(transformer)


@pytest.mark.slow
@pytest.mark.parametrize("loader", _LOADERS)
def test_loading_takes_little_more_memory_than_the_model(large, loader):
    folder, resident = large
    command = [sys.executable, "-c", _LOADED.format(load=_LOADERS[loader]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.99 * resident < int(done.stdout) < resident + _BESIDE, int(done.stdout) - resident


def test_loading_flux_dev_takes_less_than_1_3_of_its_checkpoint():
    """By its exact size and what the test above measures."""
    model = empty_transformer(FLUX_DEV.transformer)
    in_memory, stored = (size_report(model, codes).storage_bytes for codes in ("planes", "trits"))
    assert in_memory + _BESIDE < 1.3 * stored
