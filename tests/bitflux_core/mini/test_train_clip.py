"""What the mini CLIP is shown side by side."""

import torch

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.train_clip import Siblings


def test_siblings_are_other_prompts_of_the_tag_about_the_same_shapes():
    specs, _ = training_prompts()
    specs = specs[::7]
    siblings = Siblings(specs, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(specs), (2000,), generator=generator)
    found = siblings.of(index, generator)
    alone = 0
    for one, other in zip(index.tolist(), found.tolist(), strict=True):
        assert specs[one].tag == specs[other].tag
        assert set(specs[one].shapes) == set(specs[other].shapes)
        alone += one == other
    assert alone < 100  # those that have no sibling
    again = siblings.of(index, generator)
    assert (again != found).float().mean() > 0.5
