"""The processor that training takes does what diffusers' does, forward and backward, in both kinds of blocks."""

import copy

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from bitflux_core.distill_attention import TrainedAttention


def outputs_and_gradients(transformer, processor):
    model = copy.deepcopy(transformer).requires_grad_(True)
    model.set_attn_processor(processor)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    inputs = {
        "hidden_states": torch.randn(2, 6, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, 3, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.full((2,), 2.0) if config.guidance_embeds else None,
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)),
        "txt_ids": torch.zeros(3, 3),
    }
    velocity = model(**inputs, return_dict=False)[0]
    (velocity * torch.randn(velocity.shape, generator=generator)).sum().backward()
    return velocity, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_it_does_what_diffusers_own_does(transformer):
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected, expected_gradients = outputs_and_gradients(transformer, FluxAttnProcessor())
    actual, gradients = outputs_and_gradients(transformer, TrainedAttention())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-4)
    assert all(gradients[name].abs().max() > 0 for name in gradients if ".norm_" in name)
