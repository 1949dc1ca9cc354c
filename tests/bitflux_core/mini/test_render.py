"""Rendered scenes show what their prompts say."""

import torch

from bitflux_core.mini.render import NO_SHAPE, PromptTable, coverage, render, sample_scenes
from bitflux_core.mini.world import ANY, HELD_OUT, RELATIONS, benchmark_prompts, training_prompts

SPECS = benchmark_prompts()[::6]


def scenes_of(specs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = PromptTable.build(specs, "cpu")
    return sample_scenes(table, torch.arange(len(specs)), generator), generator


def test_scene_has_the_prompts_objects_and_named_colors():
    scenes, _ = scenes_of(SPECS)
    for spec, shapes, colors in zip(SPECS, scenes.shapes_BO.tolist(), scenes.colors_BO.tolist(), strict=True):
        assert tuple(shape for shape in shapes if shape != NO_SHAPE) == spec.shapes
        assert all(named in (ANY, color) for named, color in zip(spec.colors, colors, strict=False))


def test_free_colors_are_never_held_out_pairs():
    specs = [spec for spec in training_prompts()[0] if spec.tag in ("two_object", "counting")][:600]
    scenes, _ = scenes_of(specs)
    shown = set(zip(scenes.shapes_BO.flatten().tolist(), scenes.colors_BO.flatten().tolist(), strict=True))
    assert len(shown) > 40
    assert not shown & HELD_OUT


def test_objects_keep_apart_and_relations_hold():
    specs = [spec for spec in SPECS if spec.tag == "position"]
    scenes, _ = scenes_of(specs)
    dx = scenes.x_BO[:, 1] - scenes.x_BO[:, 0]
    dy = scenes.y_BO[:, 1] - scenes.y_BO[:, 0]
    for spec, right, down in zip(specs, dx.tolist(), dy.tolist(), strict=True):
        along = dict(zip(RELATIONS, (-right, right, -down, down), strict=True))[RELATIONS[spec.relation]]
        assert along > 0.7 * (right**2 + down**2) ** 0.5
    alpha = coverage(scenes_of(SPECS)[0])
    overlap = alpha.sum(dim=1).clamp(min=1) - 1
    assert (overlap.amax(dim=(1, 2)) < 0.05).float().mean() > 0.97


def test_image_is_the_palette_inside_the_mask_and_plain_outside():
    scenes, generator = scenes_of(SPECS, seed=1)
    image, masks = render(scenes, generator)
    assert image.shape == (len(SPECS), 3, 128, 128)
    assert image.min() >= 0
    assert image.max() <= 1
    background = image[0][:, ~masks[0].any(dim=0)]
    assert background.std(dim=1).max() < 0.06
    assert (masks.flatten(2).sum(-1)[scenes.shapes_BO != NO_SHAPE] > 100).all()
    assert not masks[scenes.shapes_BO == NO_SHAPE].any()


def test_a_seed_draws_the_same_scene_again():
    first, second, other = (render(*scenes_of(SPECS[:8], seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
