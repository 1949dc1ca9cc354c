"""The memory plan: FLUX.1-dev's figures, a block's activations as really saved, and a refusal that names both sides."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from bitflux_core.benchmark.models import FLUX_DEV
from bitflux_core.checkpoint import empty_transformer
from bitflux_core.distill import LatentTernaryLinear, make_student
from bitflux_core.distill_memory import SAVED_WIDTHS, MemoryPlan, check_memory, memory_plan
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears

TOKENS = 4096 + 512


@pytest.fixture(scope="module")
def flux_dev():
    return empty_transformer(FLUX_DEV.transformer)


def plan_of(empty, **changes) -> MemoryPlan:
    values = {"batch": 1, "tokens": TOKENS, "features": 4, "dtype": torch.bfloat16}
    return memory_plan(empty, **values | changes)


def test_flux_dev_fits_one_gpu_of_80_gb(flux_dev):
    plan = plan_of(flux_dev)
    assert plan.teacher == pytest.approx(23.80e9, rel=1e-3)
    assert plan.latents == pytest.approx(23.67e9, rel=1e-3)
    assert plan.others == pytest.approx(1.11e9, rel=0.02)
    assert plan.moments < 0.05e9
    assert plan.block_inputs == pytest.approx((57 + 8) * 28.3e6, rel=1e-3)
    assert 50e9 < plan.total < 60e9


def test_corrections_are_trained_in_float32(flux_dev):
    sizes = [layer.in_features + layer.out_features for layer in block_linears(flux_dev).values()]
    plain, corrected = plan_of(flux_dev), plan_of(flux_dev, low_rank=16)
    assert corrected.others - plain.others == 16 * sum(sizes) * 16  # itself, its gradient and two moments
    assert corrected.step - plain.step == corrected.others - plain.others


def test_adamw_takes_sixteen_bytes_a_latent(flux_dev):
    factored, adam = plan_of(flux_dev), plan_of(flux_dev, by_adam=True)
    assert adam.latents == 8 * factored.latents
    assert adam.moments == 0
    assert adam.building - factored.building == factored.latents
    assert adam.step - factored.step == 7 * factored.latents - factored.moments


def test_blocks_that_are_not_computed_again_are_kept(flux_dev):
    again, kept = plan_of(flux_dev), plan_of(flux_dev, recomputed=False)
    assert kept.step - again.step == 56 * SAVED_WIDTHS * TOKENS * 3072 * 2


def test_several_gpus_share_teacher_and_latents(flux_dev):
    one, four = plan_of(flux_dev), plan_of(flux_dev, gpus=4)
    assert four.teacher == one.teacher // 4
    assert four.latents == one.latents // 4
    assert four.others == one.others
    assert four.total == four.building < 0.6 * one.total  # each rank makes the student whole, then keeps its part
    assert four.building > one.teacher // 4 + one.latents
    assert four.step < 0.5 * one.step
    assert one.total == one.step


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_a_block_saves_what_the_plan_says(kind):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    student, image, text = make_student(transformer, latent_dtype=torch.bfloat16), 960, 64
    block = getattr(student, kind)[0]
    own = {parameter.data_ptr() for parameter in block.parameters()}
    weights = sum(m.latent.numel() for m in block.modules() if isinstance(m, LatentTernaryLinear)) * 2
    for layer in block.modules():
        if isinstance(layer, LatentTernaryLinear):
            layer.int8_activations = True
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    width, tokens = student.inner_dim, image + text
    hidden, encoder = (torch.randn(1, count, width, dtype=torch.bfloat16).requires_grad_() for count in (image, text))
    rotary = student.pos_embed(torch.zeros(tokens, 3))
    with (
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        block(hidden, encoder, torch.randn(1, width), rotary)
    widths = (sum(saved.values()) - weights) / (tokens * width * 2)
    assert SAVED_WIDTHS - 4 < widths <= SAVED_WIDTHS


def test_too_little_memory_is_said_with_both_figures(flux_dev, monkeypatch):
    plan = plan_of(flux_dev)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (24_000_000_000, 25_000_000_000))
    with pytest.raises(UserError, match=rf"about {plan.total / 1e9:.1f} GB on each GPU, 24\.0 GB are free"):
        check_memory(plan, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (79_000_000_000, 80_000_000_000))
    check_memory(plan, torch.device("cuda"))
    check_memory(plan, torch.device("cpu"))
