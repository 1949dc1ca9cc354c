"""The mini world: GenEval's tags and counts, prompts that fit, and color-shape pairs that training never names."""

from collections import Counter

from bitflux_core.mini.models import TOKENS, build_tokenizer
from bitflux_core.mini.world import (
    COLORS,
    HELD_OUT,
    SHAPES,
    TAG_COUNTS,
    TAGS,
    benchmark_prompts,
    training_prompts,
)


def test_benchmark_has_genevals_tags_in_order_and_no_prompt_twice():
    specs = benchmark_prompts()
    assert Counter(spec.tag for spec in specs) == TAG_COUNTS
    assert list(dict.fromkeys(spec.tag for spec in specs)) == list(TAGS)
    assert len({spec.text for spec in specs}) == len(specs) == 553


def test_training_never_names_a_held_out_pair_and_scoring_asks_for_all():
    assert {shape for shape, _ in HELD_OUT} == set(range(len(SHAPES)))
    assert {color for _, color in HELD_OUT} == set(range(len(COLORS)))
    specs, weights = training_prompts()
    named = {pair for spec in specs for pair in zip(spec.shapes, spec.colors, strict=True)}
    assert not named & HELD_OUT
    assert len(weights) == len(specs)
    assert abs(sum(weights) - 1) < 1e-9
    asked = {(spec.shapes[0], spec.colors[0]) for spec in benchmark_prompts() if spec.tag == "colors"}
    assert asked >= HELD_OUT


def test_every_prompt_is_known_word_by_word_and_fits():
    tokenizer = build_tokenizer(start=True)
    texts = [spec.text for spec in benchmark_prompts() + training_prompts()[0]]
    ids = tokenizer(texts).input_ids
    assert max(len(row) for row in ids) <= TOKENS
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_position_metadata_puts_the_target_first_as_geneval_does():
    spec = next(spec for spec in benchmark_prompts() if spec.tag == "position")
    target, placed = spec.metadata()["include"]
    relation, index = placed["position"]
    assert index == 0
    assert "position" not in target
    assert spec.text.endswith(f"a {placed['class']} {relation} a {target['class']}")


def test_counting_metadata_excludes_one_more():
    for spec in benchmark_prompts():
        if spec.tag == "counting":
            meta = spec.metadata()
            assert meta["exclude"] == [{"class": meta["include"][0]["class"], "count": meta["include"][0]["count"] + 1}]
