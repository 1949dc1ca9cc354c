"""The committed detector and CLIP on scenes that are right by construction: at most 2 % may be judged wrong."""

import torch

from bitflux_core.mini.models import WEIGHTS
from bitflux_core.mini.render import PromptTable, render, sample_scenes
from bitflux_core.mini.world import benchmark_prompts
from evaluators.registry import build_evaluator


def judged(specs, shown):
    """Whether each prompt of `specs` is found in a scene rendered for the prompt of `shown` at its place."""
    evaluator = build_evaluator("mini-geneval", {"detector": WEIGHTS / "detector", "clip": WEIGHTS / "clip"})
    generator = torch.Generator().manual_seed(5)
    scenes = sample_scenes(PromptTable.build(shown, "cpu"), torch.arange(len(shown)), generator)
    pixels, _ = render(scenes, generator)
    images = [(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in pixels]
    return [score.correct for score in evaluator.score(images, [spec.metadata() for spec in specs])]


def test_the_evaluator_errs_on_at_most_two_per_cent_of_rendered_truth():
    specs = benchmark_prompts()[::2]
    verdicts = judged(specs, specs)
    assert verdicts.count(False) <= 0.02 * len(specs)


def test_the_evaluator_refuses_scenes_of_other_prompts():
    specs = [spec for spec in benchmark_prompts() if spec.tag == "color_attr"][:40]
    verdicts = judged(specs, specs[1:] + specs[:1])
    assert verdicts.count(True) <= 0.05 * len(specs)
