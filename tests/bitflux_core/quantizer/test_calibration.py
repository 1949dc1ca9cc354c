"""Calibration states: points on the teacher's own way, each with its noise level, its prompt and the guidance."""

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline

from bitflux_core.distill import drawn_timesteps, load_scheduler, sampler_sigmas
from bitflux_core.errors import UserError
from bitflux_core.quantizer.quantize import calibrate, encode
from bitflux_core.quantizer.work import WorkFolder

CPU = torch.device("cpu")


@torch.no_grad()
def test_states_are_the_points_of_an_euler_walk_each_with_its_own_level(
    source, teacher, settings, lively_dir, tmp_path
):
    made_by = settings(states_a_prompt=4)  # every point of the walk
    sampling = made_by.sampling
    states = calibrate(source, lively_dir, made_by, WorkFolder(tmp_path / "work", {})).states
    sigmas = sampler_sigmas(load_scheduler(lively_dir), sampling.steps, 4, CPU)
    conditions = encode(lively_dir, made_by.prompts, sampling, CPU)
    for prompt in range(len(made_by.prompts)):
        places = (states.prompt_S == prompt).nonzero()[:, 0]
        places = places[states.sigma_S[places].argsort(descending=True)]
        torch.testing.assert_close(states.sigma_S[places], sigmas[:-1])
        points = states.latents_SLC[places]
        assert points[0].std() == pytest.approx(1, abs=0.2)
        for step in range(sampling.steps - 1):
            velocity = teacher(
                hidden_states=points[step][None],
                timestep=sigmas[step][None],
                guidance=torch.tensor([sampling.guidance]),
                encoder_hidden_states=conditions.prompt_embeds_PTD[prompt][None],
                pooled_projections=conditions.pooled_PD[prompt][None],
                txt_ids=torch.zeros(conditions.prompt_embeds_PTD.shape[1], 3),
                img_ids=conditions.image_ids_L3,
                return_dict=False,
            )[0][0]
            expected = points[step] + (sigmas[step + 1] - sigmas[step]) * velocity
            torch.testing.assert_close(points[step + 1], expected, rtol=1e-4, atol=1e-4)


def test_a_killed_calibration_goes_on_to_the_same_states(source, settings, lively_dir, tmp_path, monkeypatch):
    made_by = settings(states_a_prompt=2)
    whole = calibrate(source, lively_dir, made_by, WorkFolder(tmp_path / "whole", {})).states
    work, save, leave, left = WorkFolder(tmp_path / "work", {}), WorkFolder.save_walk, source.leave, []

    def killed(self, walk):
        save(self, walk)
        if walk.steps == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save_walk", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, lively_dir, made_by, work)
    monkeypatch.setattr(source, "leave", lambda *args, **inputs: left.append(args) or leave(*args, **inputs))
    states = calibrate(source, lively_dir, made_by, work).states
    assert all(torch.equal(tensor, getattr(whole, name)) for name, tensor in vars(states).items())
    batches = -(-len(made_by.prompts) // made_by.batch)
    assert len(left) == batches * (made_by.sampling.steps - 2)  # no step twice
    assert sorted(path.name for path in work.directory.iterdir()) == ["recipe.json", "states.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_are_those_of_the_pipeline(lively_dir, dtype):
    """Bits too: in bfloat16 a time is a coarse thing."""
    pipeline = FluxPipeline.from_pretrained(lively_dir, dtype=dtype)
    seen = []

    def asked(_transformer, _arguments, inputs):
        seen.append(inputs["timestep"])

    pipeline.transformer.register_forward_pre_hook(asked, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": 32, "height": 32, "max_sequence_length": 16}
    pipeline("a red circle", num_inference_steps=7, output_type="latent", **size)
    sigmas = sampler_sigmas(load_scheduler(lively_dir), 7, 4, CPU)
    assert torch.equal(torch.cat(seen), drawn_timesteps(sigmas[:-1], dtype))


@pytest.mark.parametrize("option", ["stochastic_sampling", "invert_sigmas"])
def test_a_scheduler_that_walks_otherwise_is_refused(lively_dir, tmp_path, option):
    shutil.copytree(lively_dir / "scheduler", tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: True}))
    with pytest.raises(UserError, match=f"scheduler asks for {option}"):
        load_scheduler(tmp_path)


@torch.no_grad()
def test_blocks_see_the_states_own_level_prompt_and_guidance(source, teacher, settings, lively_dir, tmp_path):
    made_by = settings()
    made = calibrate(source, lively_dir, made_by, WorkFolder(tmp_path / "work", {}))
    conditions, states = encode(lively_dir, made_by.prompts, made_by.sampling, CPU), made.states
    streams = made.calibration.streams(source, states)
    guidance_S = torch.full_like(states.sigma_S, 1000 * made_by.sampling.guidance)
    temb_SD = teacher.time_text_embed(1000 * states.sigma_S, guidance_S, conditions.pooled_PD[states.prompt_S])
    torch.testing.assert_close(torch.cat([stream.temb_BD for stream in streams]), temb_SD)
    hidden_SLD = teacher.x_embedder(states.latents_SLC)
    torch.testing.assert_close(torch.cat([stream.hidden_BLD for stream in streams]), hidden_SLD)
    encoder_STD = teacher.context_embedder(conditions.prompt_embeds_PTD[states.prompt_S])
    torch.testing.assert_close(torch.cat([stream.encoder_BTD for stream in streams]), encoder_STD)
    assert len({len(states.prompt_S[states.prompt_S == prompt]) for prompt in range(4)}) == 1
    assert len(states.sigma_S.unique()) > 1
