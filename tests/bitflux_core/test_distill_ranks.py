"""Training on two ranks with shared weights: what one rank alone learns from the same images, and resumed by one."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from bitflux_core.convert import quantize_transformer
from bitflux_core.distill import Conditions
from bitflux_core.distill_checkpoint import latest_checkpoint
from bitflux_core.distill_recipe import EndToEndSettings
from bitflux_core.distill_training import EndToEnd

CPU = torch.device("cpu")
SIDE, TEXT, PROMPTS = 2, 4, 24


def training(folder, mesh=None, **changes) -> EndToEnd:
    """The same on every rank."""
    torch.manual_seed(1)
    teacher = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in teacher.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    start = copy.deepcopy(teacher)
    quantize_transformer(start)
    config = teacher.config
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    conditions = Conditions(
        torch.randn(PROMPTS, TEXT, config.joint_attention_dim),
        torch.randn(PROMPTS, config.pooled_projection_dim),
        torch.stack([torch.zeros(SIDE**2), rows.flatten(), columns.flatten()], dim=-1).float(),
    )
    values = {
        "steps": 40,
        "int8_steps": 10,
        "batch": 4,
        "sampler_steps": 4,
        "guidance": 2.0,
        "slots": 8,
        "interval": 20,
    }
    settings = EndToEndSettings(**values | {"latent_lr": 2e-2, "other_lr": 1e-3, "features": 1} | changes)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0)
    prompts = (range(PROMPTS - 8), range(PROMPTS - 8, PROMPTS))
    return EndToEnd(teacher, start, scheduler, conditions, *prompts, settings, CPU, folder, mesh)


def rank_of_two(rank: int, port: int, folder, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    run = training(folder, init_device_mesh("cpu", (2,)))
    latents = sum(p.to_local().numel() for p in run.latents.values())
    assert latents < 0.6 * sum(p.numel() for p in run.latents.values())
    while run.step < steps:
        run.train_step()
    if steps == 1:
        run.save()
    else:
        run.step = 0
        run = training(folder, init_device_mesh("cpu", (2,)))
        run.run()
    dist.destroy_process_group()


def rank_that_is_stopped(rank: int, port: int, folder, stops: tuple[int, ...]) -> None:
    """Trains to each of `stops`, every time from the checkpoint that the time before left."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    begun = 0
    for stop in stops:
        run = training(folder, mesh)
        assert run.step == begun
        while run.step < stop:
            run.train_step()
        run.save()
        begun = stop
    dist.destroy_process_group()


def on_two_ranks(folder, steps: object, work=rank_of_two) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(work, (port, folder, steps), nprocs=2)


@pytest.mark.slow
def test_a_step_of_two_ranks_is_that_of_one(tmp_path):
    on_two_ranks(tmp_path / "two", steps=1)
    two = training(tmp_path / "two")  # one rank goes on where two stopped
    one = training(tmp_path / "one")
    before = {name: p.detach().clone() for name, p in one.latents.items()}
    one.train_step()
    assert two.step == one.step == 1
    for name, parameter in one.others.items():
        torch.testing.assert_close(two.others[name], parameter, rtol=1e-4, atol=1e-5)
    for name, latent in one.latents.items():
        # Other random bits round them, by one place of bfloat16 at most.
        torch.testing.assert_close(two.latents[name], latent, rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(two.factored.rows[name], one.factored.rows[name], rtol=2e-2, atol=1e-12)
        torch.testing.assert_close(two.factored.columns[name], one.factored.columns[name], rtol=2e-2, atol=1e-12)
        moved = [(run.latents[name].detach().float() - before[name].float()) for run in (one, two)]
        assert torch.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0) > 0.3
    for name, tensor in one.rollouts.tensors().items():
        torch.testing.assert_close(two.rollouts.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_learn_as_one_does(tmp_path):
    one = training(tmp_path / "one")
    alone = one.run()
    on_two_ranks(tmp_path / "two", steps=2)
    shared = training(tmp_path / "two").records
    assert [record.step for record in shared] == [record.step for record in alone] == [0, 20, 30, 30, 40]
    for mine, theirs in zip(shared, alone, strict=True):
        assert mine.loss == (None if theirs.loss is None else pytest.approx(theirs.loss, rel=0.05))
        assert mine.held_out == pytest.approx(theirs.held_out, rel=0.15)
        assert mine.codes_flipped == pytest.approx(theirs.codes_flipped, rel=0.1, abs=1e-4)
    assert shared[-1].loss < 0.9 * shared[1].loss
    assert shared[-1].held_out < shared[0].held_out


@pytest.mark.slow
def test_two_ranks_go_on_from_their_checkpoint_to_the_same_bits(tmp_path):
    on_two_ranks(tmp_path / "whole", (5,), rank_that_is_stopped)
    on_two_ranks(tmp_path / "stopped", (2, 5), rank_that_is_stopped)
    whole, stopped = (latest_checkpoint(tmp_path / name).folder for name in ("whole", "stopped"))
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(files) == 3  # two blocks and the rest
    for name in files:
        mine, theirs = load_file(stopped / name), load_file(whole / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
