"""What a quantization refuses, in one line and before it costs time; and what it leaves of work that is there."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitflux_core.errors import UserError
from bitflux_core.generate import PromptEmbedding, TextEncoder
from bitflux_core.quantizer import block_walk, memory
from bitflux_core.quantizer.quantize import quantize
from bitflux_core.quantizer.work import WorkFolder

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def ignore(_name, _rows):
    pass


def test_work_of_another_recipe_is_refused_and_left(settings, lively_dir, tmp_path):
    def die(_name, _rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(lively_dir, tmp_path / "twin", settings(), CPU, die)
    before = sorted((tmp_path / "twin.partial").iterdir())
    with pytest.raises(UserError, match=r"another recipe \(seed: 0, not 1\)"):
        quantize(lively_dir, tmp_path / "twin", settings(seed=1), CPU, ignore)
    assert sorted((tmp_path / "twin.partial").iterdir()) == before


def test_compensation_without_prompts_is_refused(settings, lively_dir, tmp_path):
    with pytest.raises(UserError, match="need calibration prompts"):
        quantize(lively_dir, tmp_path / "twin", settings(prompts=()), CPU, ignore)


def change_config(folder, **changes):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"_class_name": "UNet2DModel"}, "holds UNet2DModel"),
        ({"quantization_config": {"quant_method": "bitflux"}}, "ternary already"),
    ],
)
def test_a_model_that_is_no_full_precision_flux_is_refused(settings, broken_dir, tmp_path, changes, problem):
    change_config(broken_dir, **changes)
    with pytest.raises(UserError, match=problem):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)


def test_a_missing_weight_is_named(settings, broken_dir, tmp_path):
    file = broken_dir / "transformer" / WEIGHTS
    tensors = load_file(file)
    del tensors["transformer_blocks.0.attn.to_q.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lacks tensor transformer_blocks.0.attn.to_q.weight"):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)


def test_a_missing_shard_is_named_before_any_work(settings, broken_dir, tmp_path):
    folder = broken_dir / "transformer"
    names = load_file(folder / WEIGHTS).keys()
    (folder / WEIGHTS).rename(folder / "first.safetensors")
    places = dict.fromkeys(names, "first.safetensors") | {"x_embedder.bias": "second.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=r"lacks file second.safetensors .*copy"):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)
    assert not (tmp_path / "twin.partial").exists()


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_a_place_in_the_model_itself_is_refused(settings, broken_dir, part):
    with pytest.raises(UserError, match=f"lies in .*{part}, which is read"):
        quantize(broken_dir, broken_dir / part / "twin", settings(), CPU, ignore)
    assert not list(broken_dir.rglob("*.partial"))


@pytest.mark.parametrize("name", ["transformer_blocks.0", "states", "walk"])
def test_work_whose_contents_are_others_is_named(settings, lively_dir, tmp_path, name):
    work = tmp_path / "twin.partial"

    def die(_name, _rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(lively_dir, tmp_path / "twin", settings(), CPU, die)
    if name == "walk":
        (work / "states.safetensors").unlink()
    save_file({"other": torch.zeros(1)}, work / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"{name}.safetensors holds something else .*remove it"):
        quantize(lively_dir, tmp_path / "twin", settings(), CPU, ignore)
    (work / f"{name}.safetensors").unlink()
    quantize(lively_dir, tmp_path / "twin", settings(), CPU, ignore)


def test_a_weight_that_is_not_finite_is_named(settings, broken_dir, tmp_path):
    file = broken_dir / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors["single_transformer_blocks.0.proj_out.weight"][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(
        UserError, match=r"single_transformer_blocks.0.proj_out.weight holds values that are not finite"
    ):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float8_e4m3fn, "type torch.float8_e4m3fn"),
        (torch.int8, "type torch.int8"),
        (torch.float64, "type torch.float64"),
    ],
)
def test_weights_that_are_quantized_already_are_refused(settings, broken_dir, tmp_path, dtype, said):
    file = broken_dir / "transformer" / WEIGHTS
    tensors = load_file(file)
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    with pytest.raises(UserError, match=rf"{name} has {said}.*use a checkpoint in float32, float16, bfloat16"):
        quantize(broken_dir, tmp_path / "twin", settings(init="least-squares", prompts=()), CPU, ignore)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"weight_map": ["a"]}', "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}']
)
def test_a_torn_index_is_refused(settings, broken_dir, tmp_path, text):
    (broken_dir / "transformer" / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json .*: copy the model again"):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)


def test_a_model_that_is_given_an_image_is_refused(settings, broken_dir, tmp_path):
    change_config(broken_dir, in_channels=128, out_channels=64)
    with pytest.raises(UserError, match=r"makes 64 channels of 128.*Fill, Control"):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)


def test_another_scheduler_is_refused_before_any_work(settings, broken_dir, tmp_path):
    file = broken_dir / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "DDIMScheduler"}))
    with pytest.raises(UserError, match=r"scheduler holds DDIMScheduler: .* FlowMatchEulerDiscreteScheduler"):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)
    assert not (tmp_path / "twin.partial").exists()


def test_text_encoders_that_give_no_numbers_are_refused(settings, lively_dir, tmp_path, monkeypatch):
    inner = TextEncoder.encode

    def encode(self, prompts, batch):
        first, *rest = inner(self, prompts, batch)
        return [PromptEmbedding(first.prompt_embeds, first.pooled * torch.inf), *rest]

    monkeypatch.setattr(TextEncoder, "encode", encode)
    with pytest.raises(UserError, match="not finite for 'a photo of a circle'"):
        quantize(lively_dir, tmp_path / "twin", settings(), CPU, ignore)


def test_states_of_other_text_encoders_are_not_taken(settings, broken_dir, tmp_path):
    def die(_name, _rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, die)
    file = broken_dir / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"another recipe \(conditions: \w+, not \w+\)"):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)


def test_what_a_kill_leaves_of_the_recipe_is_no_hindrance(settings, lively_dir, tmp_path):
    (tmp_path / "twin.partial").mkdir()
    (tmp_path / "twin.partial" / "recipe.tmp").write_text("{")
    quantize(lively_dir, tmp_path / "twin", settings(init="least-squares", prompts=()), CPU, ignore)
    assert (tmp_path / "twin" / "config.json").is_file()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"in use and holds no recipe\.json"):
        quantize(lively_dir, tmp_path / "other", settings(init="least-squares", prompts=()), CPU, ignore)


def test_only_what_differs_is_named_of_another_recipe(tmp_path):
    recipe = {"sampling": {"width": 64, "steps": 4}, "seed": 0, "init": "compensated"}
    WorkFolder(tmp_path / "work", recipe)
    with pytest.raises(UserError, match=r"another recipe \(sampling\.steps: 4, not 8; seed: 0, not 1\): give"):
        WorkFolder(tmp_path / "work", {**recipe, "sampling": {"width": 64, "steps": 8}, "seed": 1})


def test_too_little_gpu_memory_is_said_with_the_figure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10_000_000_000, 80_000_000_000))
    with pytest.raises(UserError, match=r"about 34\.5 GB of GPU memory, 10\.0 GB are free"):
        memory.check_memory(34_500_000_000, torch.device("cuda"))
    memory.check_memory(9_000_000_000, torch.device("cuda"))


def test_a_model_without_blocks_is_refused(settings, broken_dir, tmp_path):
    change_config(broken_dir, num_layers=0, num_single_layers=0)
    with pytest.raises(UserError, match=r"config\.json names no blocks .*: copy the model again"):
        quantize(broken_dir, tmp_path / "twin", settings(init="least-squares", prompts=()), CPU, ignore)


@pytest.mark.parametrize(
    "axes", [[4, 12], [4, 4, 4, 4], [16, 56, 56], [4, 5, 7], [4, 4, 4], [-4, 10, 10], 16, ["a"], None]
)
def test_rotations_that_do_not_fit_the_heads_are_refused(settings, broken_dir, tmp_path, axes):
    change_config(broken_dir, axes_dims_rope=axes)
    with pytest.raises(UserError, match=r"axes_dims_rope .* must be 3 even numbers that add up to .* 16: copy"):
        quantize(broken_dir, tmp_path / "twin", settings(), CPU, ignore)
    assert not (tmp_path / "twin.partial").exists()


def killed_at_the_end(monkeypatch, arguments):
    """Runs a quantization that is killed when its checkpoint stands and its work is not yet removed."""

    def die(_self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            quantize(*arguments, CPU, ignore)


def test_a_run_killed_with_its_checkpoint_in_place_has_only_to_clean_up(settings, lively_dir, tmp_path, monkeypatch):
    plain = settings(init="least-squares", prompts=())
    killed_at_the_end(monkeypatch, (lively_dir, tmp_path / "twin", plain))
    before = {path.name: path.read_bytes() for path in (tmp_path / "twin").iterdir()}
    with pytest.raises(UserError, match=r"another recipe \(seed: 0, not 1\)"):
        quantize(lively_dir, tmp_path / "twin", replace(plain, seed=1), CPU, ignore)
    with pytest.raises(UserError, match="is in use"):
        quantize(lively_dir, tmp_path / "twin", replace(plain, codes="planes"), CPU, ignore)
    with monkeypatch.context() as patch:  # killed again, while it cleans up
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda path: unlink(path) or sys.exit(path.name))
        with pytest.raises(SystemExit):
            quantize(lively_dir, tmp_path / "twin", plain, CPU, ignore)
    monkeypatch.setattr(block_walk, "_quantize_block", lambda *_: pytest.fail("made again"))
    quantize(lively_dir, tmp_path / "twin", plain, CPU, ignore)
    assert {path.name: path.read_bytes() for path in (tmp_path / "twin").iterdir()} == before
    assert not (tmp_path / "twin.partial").exists()
    with pytest.raises(UserError, match="is in use"):
        quantize(lively_dir, tmp_path / "twin", plain, CPU, ignore)


@pytest.mark.parametrize("theirs", ["notes", "checkpoint"])
def test_a_folder_that_another_filled_meanwhile_is_left(settings, lively_dir, tmp_path, monkeypatch, theirs):
    plain, output = settings(init="least-squares", prompts=()), tmp_path / "twin"
    killed_at_the_end(monkeypatch, (lively_dir, output, plain))
    shutil.rmtree(output)
    if theirs == "notes":
        output.mkdir()
        (output / "config.json").write_text("{}")
    else:
        quantize(lively_dir, tmp_path / "other", replace(plain, seed=1), CPU, ignore)
        (tmp_path / "other").rename(output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    work = sorted((tmp_path / "twin.partial").iterdir())
    with pytest.raises(UserError, match="is in use"):
        quantize(lively_dir, output, plain, CPU, ignore)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted((tmp_path / "twin.partial").iterdir()) == work
