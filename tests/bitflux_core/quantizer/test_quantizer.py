"""The whole way from a pipeline to a checkpoint: resumed alike, and better when trained."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflux_core.checkpoint import load_ternary
from bitflux_core.convert import quantize_transformer
from bitflux_core.distill_recipe import EndToEndSettings
from bitflux_core.errors import UserError
from bitflux_core.generate import ImageGenerator, TextEncoder
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.loading import load_transformer
from bitflux_core.quantizer import block_walk
from bitflux_core.quantizer.quantize import PLOT, TABLE, quantize
from bitflux_core.quantizer.snr import SCHEMA, Snr

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def ignore(_name, _rows):
    pass


@pytest.fixture(scope="module")
def compensated(lively_dir, settings, tmp_path_factory):
    """A finished compensated checkpoint."""
    output = tmp_path_factory.mktemp("made") / "twin"
    quantize(lively_dir, output, settings(), CPU, ignore)
    return output


def blocks(folder):
    table = pq.read_table(folder / TABLE).to_pylist()
    return {row["name"]: row["output_snr_db"] for row in table if row["level"] == "block"}


def test_the_checkpoint_loads_with_its_table_and_plot(compensated, lively_dir):
    transformer = load_ternary(compensated, dtype=torch.float32, device="cpu")
    layers = block_linears(transformer)
    assert all(isinstance(layer, TernaryLinear) for layer in layers.values())
    assert not compensated.with_name("twin.partial").exists()
    assert (compensated / PLOT).stat().st_size > 1000
    table = pq.read_table(compensated / TABLE)
    assert table.schema.equals(SCHEMA)
    rows = [Snr(**row) for row in table.to_pylist()]
    assert {row.name for row in rows if row.level == "layer"} == layers.keys()
    assert [row.name for row in rows if row.level == "block"] == ["transformer_blocks.0", "single_transformer_blocks.0"]
    teacher = load_transformer("bf16", pipeline_dir=lively_dir, ternary_dir=None, device="cpu", dtype=torch.float32)
    for row in (row for row in rows if row.level == "layer"):
        weight, ternary = teacher.get_parameter(f"{row.name}.weight"), layers[row.name].dequantize()
        expected = 10 * torch.log10(weight.square().sum() / (weight - ternary).square().sum())
        assert row.weight_snr_db == pytest.approx(expected.item(), abs=1e-3)


def test_compensation_gains_decibels_at_every_block(settings, compensated, lively_dir, tmp_path):
    quantize(lively_dir, tmp_path / "twin", settings(init="least-squares"), CPU, ignore)
    plain, better = blocks(tmp_path / "twin"), blocks(compensated)
    assert all(better[name] > plain[name] + 3 for name in plain)


def test_corrections_are_part_of_the_checkpoint_and_gain_at_every_block(settings, compensated, lively_dir, tmp_path):
    made = [compensated]
    for rank in (4, 16):
        made.append(tmp_path / f"rank-{rank}")
        returned = quantize(lively_dir, made[-1], settings(low_rank=rank, codes="planes"), CPU, ignore)
        loaded = load_ternary(made[-1], dtype=torch.bfloat16, device="cpu")
        for name, layer in block_linears(loaded).items():
            assert (layer.down.shape, layer.up.shape) == ((rank, layer.in_features), (layer.out_features, rank))
            assert torch.equal(layer.down.float(), returned.get_submodule(name).down)  # nothing was lost by saving
        header = json.loads((made[-1] / "config.json").read_text())["quantization_config"]
        assert (header["low_rank"], header["codes"], header["provenance"]["low_rank"]) == (rank, "planes", rank)
    outputs = [blocks(folder) for folder in made]
    for name in outputs[0]:
        assert outputs[2][name] > outputs[1][name] + 1 > outputs[0][name] + 1.5


def test_later_layers_see_the_corrected_prefix(settings, lively_dir, tmp_path):
    """At full rank the first block is the teacher's, but for bfloat16, and so is what the second block reads."""
    quantize(lively_dir, tmp_path / "twin", settings(low_rank=32), CPU, ignore)
    assert blocks(tmp_path / "twin")["transformer_blocks.0"] > 40
    assert blocks(tmp_path / "twin")["single_transformer_blocks.0"] > 40


def test_corrections_without_calibration_lessen_the_weights_errors(settings, lively_dir, tmp_path):
    worst = []
    for rank in (0, 4):
        output = tmp_path / f"rank-{rank}"
        quantize(lively_dir, output, settings(init="least-squares", prompts=(), low_rank=rank), CPU, ignore)
        table = pq.read_table(output / TABLE).to_pylist()
        worst.append([row["weight_snr_db"] for row in table if row["level"] == "layer"])
    assert all(better > plain + 0.5 for plain, better in zip(*worst, strict=True))


def test_blocks_in_training_take_their_corrections_along(settings, lively_dir, tmp_path):
    rounded, trained = tmp_path / "rounded", tmp_path / "trained"
    how = {"init": "least-squares", "low_rank": 4}
    quantize(lively_dir, rounded, settings(**how), CPU, ignore)
    quantize(lively_dir, trained, settings(reconstruction_steps=60, **how), CPU, ignore)
    before, after = blocks(rounded), blocks(trained)
    assert all(after[name] > before[name] + 0.2 for name in before)
    first, second = (load_ternary(folder, dtype=torch.float32, device="cpu") for folder in (rounded, trained))
    for name, layer in block_linears(first).items():
        assert not torch.equal(layer.up, second.get_submodule(name).up)


@pytest.mark.parametrize("rank", [-1, 33])
def test_a_rank_that_a_layer_cannot_have_is_refused_before_any_work(settings, lively_dir, tmp_path, rank):
    with pytest.raises(UserError, match=rf"low rank {rank}: take 1 to 32"):
        quantize(lively_dir, tmp_path / "twin", settings(low_rank=rank), CPU, ignore)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("init", ["least-squares", "absmean"])
def test_rounding_needs_no_calibration_and_equals_conversion(settings, init, lively_dir, tmp_path):
    quantize(lively_dir, tmp_path / "twin", settings(init=init, prompts=()), CPU, ignore)
    made = load_ternary(tmp_path / "twin", dtype=torch.float32, device="cpu")
    expected = load_transformer("bf16", pipeline_dir=lively_dir, ternary_dir=None, device="cpu", dtype=torch.float32)
    quantize_transformer(expected, init.replace("-", "_"))
    for name, layer in block_linears(expected).items():
        assert torch.equal(made.get_submodule(name).packed, layer.packed)
        assert torch.equal(made.get_submodule(name).scale, layer.scale)
    assert set(blocks(tmp_path / "twin").values()) == {None}


def test_a_killed_run_goes_on_to_the_same_codes(settings, lively_dir, tmp_path, monkeypatch):
    training = settings(reconstruction_steps=3)
    quantize(lively_dir, tmp_path / "whole", training, CPU, ignore)

    def die(name, _rows):
        raise KeyboardInterrupt(name)

    with pytest.raises(KeyboardInterrupt, match=r"^transformer_blocks.0"):
        quantize(lively_dir, tmp_path / "resumed", training, CPU, die)
    begun, inner = [], block_walk._quantize_block
    monkeypatch.setattr(block_walk, "_quantize_block", lambda name, *rest: begun.append(name) or inner(name, *rest))
    quantize(lively_dir, tmp_path / "resumed", training, CPU, ignore)
    assert begun == ["single_transformer_blocks.0"]
    whole, resumed = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "resumed" / WEIGHTS)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_training_brings_each_block_nearer_to_the_teachers(settings, lively_dir, tmp_path, capsys):
    rounded, trained = tmp_path / "rounded", tmp_path / "trained"
    quantize(lively_dir, rounded, settings(init="least-squares"), CPU, ignore)
    quantize(lively_dir, trained, settings(init="least-squares", reconstruction_steps=60), CPU, ignore)
    before, after = blocks(rounded), blocks(trained)
    assert all(after[name] > before[name] + 0.2 for name in before)
    log = capsys.readouterr().out
    assert "step 1/60 loss" in log
    assert "of the codes flipped" in log
    for row in pq.read_table(trained / TABLE).to_pylist():
        how = (row["error_before"], row["error_after"], row["codes_flipped"])
        assert how == (None,) * 3 if row["level"] == "layer" else how[1] < how[0] and 0 <= how[2] < 0.5
    assert all(row["error_before"] is None for row in pq.read_table(rounded / TABLE).to_pylist())


def test_a_model_without_guidance_is_quantized_and_trained(settings, broken_dir, tmp_path):
    config = broken_dir / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    file = broken_dir / "transformer" / WEIGHTS
    save_file({k: t for k, t in load_file(file).items() if "guidance_embedder" not in k}, file, {"format": "pt"})
    training = EndToEndSettings(
        steps=2, int8_steps=1, batch=2, sampler_steps=4, guidance=0.0, interval=1, slots=2, held_out=1, features=1
    )
    trained = settings(end_to_end=training, distill_prompts=settings().prompts)
    quantize(broken_dir, tmp_path / "twin", trained, CPU, ignore)
    transformer = load_ternary(tmp_path / "twin", dtype=torch.float32, device="cpu")
    [embedding] = TextEncoder(broken_dir, CPU, torch.float32, 16).encode(["a photo of a ring"])
    image = ImageGenerator(transformer, broken_dir, CPU, torch.float32).draw([embedding], [1], settings().sampling)
    assert image.shape == (1, 32, 32, 3)
