"""What is compared beside the velocity: both streams behind the chosen blocks, and of the forward pass alone."""

import torch

from bitflux_core.distill_features import BlockOutputs


def test_a_block_gives_image_and_text(transformer):
    config, behind = transformer.config, []
    block = transformer.transformer_blocks[0]
    block.register_forward_hook(lambda _module, _arguments, output: behind.append(output))
    features = BlockOutputs(transformer, ["transformer_blocks.0"])
    inputs = {
        "hidden_states": torch.randn(2, 4, config.in_channels),
        "timestep": torch.ones(2),
        "guidance": torch.ones(2),
        "encoder_hidden_states": torch.randn(2, 3, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
        "txt_ids": torch.zeros(3, 3),
        "img_ids": torch.zeros(4, 3),
    }
    transformer(**inputs)
    assert features.outputs == []
    with features.kept():
        transformer(**inputs)
    assert sorted(output.shape[1] for output in features.outputs) == [3, 4]
    assert all(any(torch.equal(mine, theirs) for mine in features.outputs) for theirs in behind[-1])
    features.drop()
    assert features.outputs == []
