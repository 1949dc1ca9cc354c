"""A contradicted scene differs from the right one in what the prompt says, and in nothing else."""

import random
from collections import Counter

from bitflux_core.mini import compositions, world
from bitflux_core.mini.contradictions import contradicted
from bitflux_core.mini.world import NEXT_TO, OPPOSITE

SPECS = world.benchmark_prompts() + compositions.benchmark_prompts()


def test_every_prompt_can_be_contradicted_and_keeps_its_words():
    rng = random.Random(0)
    for spec in SPECS:
        wrong = contradicted(spec, rng)
        assert wrong.text == spec.text
        assert wrong != spec
        changed = [name for name in vars(spec) if getattr(spec, name) != getattr(wrong, name)]
        assert len(changed) == 1 or changed == ["shapes", "colors"], spec


def test_the_change_is_what_the_prompt_names():
    rng = random.Random(0)
    for spec in SPECS:
        wrong = contradicted(spec, rng)
        if spec.tag in ("color_attr", "color"):
            assert wrong.colors == spec.colors[::-1]
        if spec.tag in ("shape", "texture"):
            assert (wrong.forms, wrong.textures) == (spec.forms[::-1], spec.textures[::-1])
        if spec.tag in ("position", "spatial") and spec.relation < NEXT_TO:
            assert wrong.relation == OPPOSITE[spec.relation]
        if spec.tag == "3d_spatial":
            assert wrong.shapes == spec.shapes[::-1]
        if spec.tag in ("counting", "numeracy"):
            before, after = Counter(spec.shapes), Counter(wrong.shapes)
            assert sum((before - after).values()) + sum((after - before).values()) == 1
        if spec.tag in ("single_object", "two_object"):
            assert set(wrong.shapes) - set(spec.shapes)
