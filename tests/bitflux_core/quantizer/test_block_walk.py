"""The walk through the blocks: each is quantized, trained and measured behind the ternary blocks before it."""

import math

import pytest
import torch

from bitflux_core.layers import block_linears
from bitflux_core.quantizer import block_walk
from bitflux_core.quantizer.block_walk import STAGES, WalkSettings, assemble, quantize_blocks
from bitflux_core.quantizer.blocks import recorded_inputs
from bitflux_core.quantizer.compensation import Compensator, InputMoments
from bitflux_core.quantizer.quantize import calibrate, collect
from bitflux_core.quantizer.reconstruction import ReconstructionSettings
from bitflux_core.quantizer.work import WorkFolder
from kernels.packing import unpack_planes

FIRST, SECOND = "transformer_blocks.0", "single_transformer_blocks.0"


@pytest.fixture
def walk(source, lively_dir, settings, tmp_path):
    """Quantizes the blocks in this way; the calibration, and the folder of the blocks."""

    def run(how, folder="work"):
        work = WorkFolder(tmp_path / folder, {})
        calibration = calibrate(source, lively_dir, settings(), work)
        quantize_blocks(source, calibration, how, work)
        return calibration, work

    return run


def batches(source, made):
    return list(made.calibration.inputs(source, made.states))


def test_blocks_are_rounded_by_the_same_arithmetic_whatever_was_trained_before(walk, monkeypatch):
    seen, quantize_block = set(), block_walk._quantize_block

    def watched(*arguments):
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()))
        return quantize_block(*arguments)

    monkeypatch.setattr(block_walk, "_quantize_block", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as training leaves it
    try:
        walk(WalkSettings("least-squares"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {("highest", False)}


@torch.no_grad()
def test_codes_answer_to_what_the_ternary_blocks_before_them_give(walk, source, teacher):
    made, work = walk(WalkSettings("compensated"))
    student = collect(source, work)
    for group in (group for stage in STAGES["single_transformer_blocks"] for group in stage):
        first = f"{SECOND}.{group[0]}"
        width = teacher.get_submodule(first).in_features
        behind, unaware = (InputMoments(width, torch.device("cpu")) for _ in range(2))
        with recorded_inputs(teacher, (first,)) as theirs, recorded_inputs(student, (first,)) as mine:
            for inputs in batches(source, made):
                teacher(**inputs)
                student(**inputs)
                behind.add(mine[first], theirs[first])
                unaware.add(theirs[first], theirs[first])
        compensators = Compensator(behind), Compensator(unaware)
        for layer in (f"{SECOND}.{name}" for name in group):
            codes_NK = unpack_planes(student.get_submodule(layer).packed, width)
            weight_NK = teacher.get_parameter(f"{layer}.weight")
            expected, other = (compensator.quantize(weight_NK)[0].codes_NK for compensator in compensators)
            assert (codes_NK == expected).float().mean() > 0.99, layer
            if group[0] != "norm.linear":  # it reads the embeddings, which pass the blocks unchanged
                assert (codes_NK == other).float().mean() < 0.95, layer


@torch.no_grad()
def test_ratios_are_those_of_the_whole_ternary_transformer(walk, source, teacher):
    made, work = walk(WalkSettings("least-squares"))
    student = collect(source, work)
    for name in (FIRST, SECOND):
        outputs = []
        for model in (teacher, student):
            kept: list[torch.Tensor] = []
            handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, out, kept=kept: kept.extend(out))
            for inputs in batches(source, made):
                model(**inputs)
            handle.remove()
            outputs.append(torch.cat([tensor.flatten() for tensor in kept]))
        theirs, mine = outputs
        expected = 10 * math.log10(theirs.square().sum() / (theirs - mine).square().sum())
        [row] = [row for row in work.load(name)[1] if row.level == "block"]
        assert row.output_snr_db == pytest.approx(expected, abs=1e-2)


@torch.no_grad()
def test_a_block_trains_on_what_the_ternary_blocks_before_it_give(walk, source, monkeypatch):
    seen = {}

    def look(name, _teacher, _student, weights, teacher_streams, student_streams, _settings):
        seen[name] = list(teacher_streams), list(student_streams)
        return weights, None

    monkeypatch.setattr(block_walk, "reconstruct", look)
    made, work = walk(WalkSettings("least-squares", ReconstructionSettings(1)))
    teacher = source.block(FIRST)
    student = assemble(teacher, work.load(FIRST)[0])
    streams = made.calibration.streams(source, made.states)
    for stream, theirs, mine in zip(streams, *seen[FIRST], strict=True):
        torch.testing.assert_close(theirs.hidden_BLD, stream.hidden_BLD)
        torch.testing.assert_close(mine.hidden_BLD, stream.hidden_BLD)
    for stream, theirs, mine in zip(streams, *seen[SECOND], strict=True):
        for part in ("hidden_BLD", "encoder_BTD"):
            torch.testing.assert_close(getattr(theirs, part), getattr(stream.through(teacher), part))
            torch.testing.assert_close(getattr(mine, part), getattr(stream.through(student), part))
            assert not torch.allclose(getattr(theirs, part), getattr(mine, part), rtol=1e-2, atol=1e-2)


def test_trained_biases_and_norms_are_kept(walk, source, teacher):
    _, work = walk(WalkSettings("least-squares", ReconstructionSettings(20, other_lr=1e-3)))
    made = collect(source, work)
    for name, layer in block_linears(made).items():
        assert not torch.equal(layer.bias, teacher.get_parameter(f"{name}.bias")), name
    norms = [name for name, _ in made.named_parameters() if "attn.norm" in name]
    assert len(norms) == 6
    for name in norms:
        assert not torch.equal(made.get_parameter(name), teacher.get_parameter(name)), name
