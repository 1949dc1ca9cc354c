"""The end-to-end phase of a quantization: better than its start, resumed to the same codes, refused before work."""

import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflux_core.checkpoint import load_ternary
from bitflux_core.distill_memory import ADAM_BYTES, BF16, SAVED_WIDTHS
from bitflux_core.distill_recipe import EndToEndSettings
from bitflux_core.distill_training import EndToEnd
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.quantizer import end_to_end
from bitflux_core.quantizer import quantize as quantize_module
from bitflux_core.quantizer.end_to_end import SCHEMA, split_prompts
from bitflux_core.quantizer.quantize import LOG, quantize

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
PROMPTS = tuple(f"a photo of a {colour} {shape}" for colour in COLOURS for shape in ("circle", "star"))
TRAINING = EndToEndSettings(
    steps=6, int8_steps=2, batch=4, sampler_steps=4, guidance=2.0, interval=2, slots=4, held_out=2, features=1
)


def ignore(_name, _rows):
    pass


@pytest.fixture
def trained(settings):
    """Makes settings of a quantization with TRAINING, or with changes to it."""

    def make(low_rank=0, **changes):
        return settings(end_to_end=replace(TRAINING, **changes), distill_prompts=PROMPTS, low_rank=low_rank)

    return make


def test_the_checkpoint_holds_the_trained_codes_and_the_log(trained, settings, lively_dir, tmp_path):
    quantize(lively_dir, tmp_path / "start", settings(), CPU, ignore)
    made = quantize(lively_dir, tmp_path / "twin", trained(latent_lr=2e-2), CPU, ignore)
    loaded = load_ternary(tmp_path / "twin", dtype=torch.float32, device="cpu")
    start = load_file(tmp_path / "start" / WEIGHTS)
    assert loaded.state_dict().keys() == made.state_dict().keys()
    assert any(not torch.equal(start[name], tensor) for name, tensor in load_file(tmp_path / "twin" / WEIGHTS).items())
    log = pq.read_table(tmp_path / "twin" / LOG)
    assert log.schema.equals(SCHEMA)
    seen = [(row["step"], row["phase"]) for row in log.to_pylist()]
    assert seen == [(0, "native"), (2, "native"), (4, "native"), (4, "int8"), (6, "int8")]
    assert not (tmp_path / "twin.partial").exists()


@pytest.mark.slow
def test_corrections_train_along_and_are_saved(trained, settings, lively_dir, tmp_path):
    quantize(lively_dir, tmp_path / "start", settings(low_rank=4), CPU, ignore)
    made = quantize(lively_dir, tmp_path / "twin", trained(low_rank=4, other_lr=1e-2), CPU, ignore)
    start, loaded = (load_ternary(tmp_path / name, dtype=torch.float32, device="cpu") for name in ("start", "twin"))
    for name, layer in block_linears(loaded).items():
        for part in ("down", "up"):
            thin = getattr(layer, part)
            assert torch.equal(thin, made.get_submodule(name).get_buffer(part).bfloat16().float())
            assert not torch.equal(thin, start.get_submodule(name).get_buffer(part))


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_codes(trained, lively_dir, tmp_path, monkeypatch):
    quantize(lively_dir, tmp_path / "whole", trained(), CPU, ignore)
    step = EndToEnd.train_step

    def die(self):
        if self.step == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(EndToEnd, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(lively_dir, tmp_path / "resumed", trained(), CPU, ignore)
    made: list[int] = []
    monkeypatch.setattr(EndToEnd, "train_step", lambda self: made.append(self.step) or step(self))
    quantize(lively_dir, tmp_path / "resumed", trained(), CPU, ignore)
    assert made == [2, 3, 4, 5]
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "resumed" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("damaged", ["conditions.safetensors", "start"])
def test_what_is_damaged_of_a_training_is_named_and_made_again(trained, lively_dir, tmp_path, monkeypatch, damaged):
    def die(_self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EndToEnd, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore)
    path = tmp_path / "twin.partial" / "end-to-end" / damaged
    save_file({"other": torch.zeros(1)}, path / WEIGHTS if path.is_dir() else path)
    with pytest.raises(UserError, match=f"end-to-end/{damaged} .*remove it, the next run makes it again"):
        quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore)


def test_too_few_prompts_are_refused_before_any_work(settings, lively_dir, tmp_path):
    with pytest.raises(UserError, match="2 prompts, of which 2 are held out"):
        quantize(lively_dir, tmp_path / "twin", settings(end_to_end=TRAINING, distill_prompts=PROMPTS[:2]), CPU, ignore)
    assert not (tmp_path / "twin.partial").exists()


def test_too_little_memory_is_refused_before_any_work(trained, lively_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1_300_000_000, 80_000_000_000))
    with pytest.raises(UserError, match=r"end to end takes about 1\.5 GB on each GPU, 1\.3 GB are free"):
        quantize(lively_dir, tmp_path / "twin", trained(), torch.device("cuda"), ignore)
    assert not (tmp_path / "twin.partial").exists()


@pytest.fixture
def plan(trained, lively_dir, tmp_path, monkeypatch):
    """The memory plan of a quantization on GPUs, which ends with it."""

    def made(gpus=1, **changes):
        plans = []

        def stop(plan, _device):
            plans.append(plan)
            raise KeyboardInterrupt

        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (80_000_000_000, 80_000_000_000))
        monkeypatch.setattr(end_to_end, "check_memory", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(lively_dir, tmp_path / "twin", trained(**changes), torch.device("cuda"), ignore, gpus)
        return plans[0]

    return made


def test_corrections_count_in_the_memory_that_training_takes(plan, transformer):
    thin = sum(4 * (layer.in_features + layer.out_features) for layer in block_linears(transformer).values())
    assert plan(low_rank=4).others - plan().others == thin * ADAM_BYTES


def test_blocks_count_as_kept_where_a_graph_launches_the_step(plan, transformer, monkeypatch):
    """One graph on one GPU, for the model is small; a larger one, or one on several GPUs, keeps one block at a time."""
    tokens = 4 + 16  # of the image and the text
    other_block = SAVED_WIDTHS * 4 * tokens * transformer.inner_dim * BF16
    on_one, on_two = plan(), plan(gpus=2, batch=8)
    monkeypatch.setattr(end_to_end, "GRAPH_BELOW", 0)
    assert on_one.block - plan().block == other_block
    assert on_two.block == plan().block


def test_a_batch_that_the_gpus_cannot_share_is_refused(trained, lively_dir, tmp_path):
    with pytest.raises(UserError, match="batches of 4 images on 3 GPUs"):
        quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore, 3, lambda _: pytest.fail("began"))


def test_adamw_on_several_gpus_is_refused_before_any_work(trained, lively_dir, tmp_path):
    with pytest.raises(UserError, match="AdamW trains on one GPU, not on 2: take the factored optimizer"):
        quantize(lively_dir, tmp_path / "twin", trained(optimizer="adam"), CPU, ignore, 2, lambda _: None)
    assert not (tmp_path / "twin.partial").exists()


def test_training_that_diverges_ends_in_one_line_and_begins_again_behind_the_same_blocks(
    trained, lively_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        errors = iter([0.5, float("nan")])
        patch.setattr(EndToEnd, "held_out_error", lambda _self: next(errors))
        with pytest.raises(
            UserError, match=r"at step 2 are not finite: remove .*end-to-end, .* take a lower learning rate"
        ):
            quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore)
    gentler = trained(latent_lr=1e-3)
    partial = tmp_path / "twin.partial"
    with pytest.raises(UserError, match=r"end-to-end holds work .* \(latent_lr: 0.005, not 0.001\): .* remove"):
        quantize(lively_dir, tmp_path / "twin", gentler, CPU, ignore)
    shutil.rmtree(partial / "end-to-end")
    for work in ("calibrate", "quantize_blocks"):
        monkeypatch.setattr(quantize_module, work, lambda *_: pytest.fail("the blocks were there"))
    heard = []
    quantize(lively_dir, tmp_path / "twin", gentler, CPU, lambda name, rows: heard.append((name, len(rows) > 1)))
    assert heard == [("transformer_blocks.0", True), ("single_transformer_blocks.0", True)]
    assert (tmp_path / "twin" / LOG).is_file()


def test_a_teacher_that_gives_no_numbers_is_not_blamed_on_the_rate(trained, lively_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(EndToEnd, "held_out_error", lambda _self: float("nan"))
    with pytest.raises(UserError, match="at step 0 are not finite: copy the full-precision model again"):
        quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore)


def test_training_elsewhere_that_did_not_end_is_said(trained, lively_dir, tmp_path):
    with pytest.raises(UserError, match="has not ended: run the same command again"):
        quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore, 2, lambda _: None)


def test_held_out_prompts_are_not_trained_on_and_repeated_ones_count():
    prompts = split_prompts(("a", "b", "a", "c", "a", "d"), 1, seed=0)
    assert prompts.distinct == ("a", "b", "c", "d")
    assert len(prompts.held_out) == 1
    expected = [place for place in (0, 1, 0, 2, 0, 3) if place not in prompts.held_out]
    assert list(prompts.trained) == expected
    assert split_prompts(prompts.distinct, 2, 1) == split_prompts(prompts.distinct, 2, 1)


class Killed(Exception):
    pass


def die(*_args, **_kwargs):
    raise Killed


def test_images_asked_for_when_training_has_ended_are_of_its_end(trained, lively_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "save_ternary", die)
        with pytest.raises(Killed):
            quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore)
    monkeypatch.setattr(EndToEnd, "train_step", lambda _self: pytest.fail("trained again"))
    quantize(lively_dir, tmp_path / "twin", replace(trained(), distill_images=1), CPU, ignore)
    assert [path.name for path in (tmp_path / "twin" / "images").iterdir()] == ["step-00000006.png"]


@pytest.mark.slow
def test_an_image_lost_between_checkpoint_and_drawing_is_drawn_by_the_next_run(
    trained, lively_dir, tmp_path, monkeypatch
):
    drawn = replace(trained(), distill_images=1)
    quantize(lively_dir, tmp_path / "whole", drawn, CPU, ignore)
    with monkeypatch.context() as patch:
        patch.setattr(EndToEnd, "show", lambda self, look: die() if self.step == 2 else None)
        with pytest.raises(Killed):
            quantize(lively_dir, tmp_path / "twin", drawn, CPU, ignore)
    quantize(lively_dir, tmp_path / "twin", drawn, CPU, ignore)
    whole, resumed = (sorted((tmp_path / name / "images").iterdir()) for name in ("whole", "twin"))
    assert [path.name for path in resumed] == [f"step-0000000{step}.png" for step in (2, 4, 6)]
    assert all(mine.read_bytes() == theirs.read_bytes() for mine, theirs in zip(resumed, whole[1:], strict=True))


def test_ratios_of_before_the_training_say_so(trained, lively_dir, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(quantize_module, "write_plot", lambda _rows, _path, title: titles.append(title))
    quantize(lively_dir, tmp_path / "twin", trained(), CPU, ignore)
    assert titles == ["before the training end to end"]
