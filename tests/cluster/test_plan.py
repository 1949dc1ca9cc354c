"""The plan is the same for both variants, names its run, and needs no models to be made."""

from collections import Counter
from dataclasses import replace

import pytest
from cluster_fakes import FINGERPRINTS, PROFILE, SAMPLING, small_plan, small_workload

from bitflux_core.errors import UserError
from cluster.plan import build_plan
from cluster.profile import Profile
from cluster.workload import PromptRecord, Protocol, Workload


def test_both_variants_have_the_same_pairs_in_the_same_batches():
    plan = small_plan()
    parts = {
        variant: [shard.batches for shard in plan.shards if shard.key.variant == variant] for variant in plan.variants
    }
    assert parts["bf16"] == parts["ternary"]
    assert [[len(batch) for batch in shard] for shard in parts["bf16"]] == [[4, 4], [4, 4], [4]]
    pairs = [sample.pair_id for shard in parts["bf16"] for batch in shard for sample in batch]
    assert len(set(pairs)) == 20
    ids = [sample_id for shard in plan.shards for sample_id in plan.sample_ids(shard)]
    assert len(set(ids)) == plan.n_samples == 40


def test_the_limit_counts_prompts_of_each_tag():
    plan = build_plan(PROFILE, [small_workload()], ("bf16",), limit=2, images_per_prompt=3)
    drawn = Counter(sample.tag for shard in plan.shards for sample in shard.samples)
    assert drawn == {"colors": 6, "counting": 6}
    assert [prompt.index for prompt in plan.workloads["toy"].prompts.values()] == [0, 1, 5, 6]


def test_a_dry_run_plans_all_but_names_no_run():
    plan = build_plan(PROFILE, [small_workload()], ("bf16", "ternary"))
    assert (plan.digest, plan.run_id, plan.describe()["images"]) == (None, None, 40)


def changed_plans():
    base = small_plan()
    yield replace(base, dtype="bfloat16")
    yield replace(base, sampling=replace(SAMPLING, steps=2))
    yield replace(base, batch_size=8)
    yield replace(base, variants=("bf16",))
    yield replace(base, fingerprints={**FINGERPRINTS, "detector": "other"})
    yield build_plan(PROFILE, [small_workload(prompts_a_tag=4)], base.variants, fingerprints=FINGERPRINTS)
    yield build_plan(PROFILE, [small_workload()], base.variants, images_per_prompt=1, fingerprints=FINGERPRINTS)
    workload = small_workload()
    records = (replace(workload.prompts[0], metadata={"tag": "colors", "count": 9}), *workload.prompts[1:])
    yield build_plan(PROFILE, [replace(workload, prompts=records)], base.variants, fingerprints=FINGERPRINTS)


def test_the_digest_covers_what_results_depend_on_and_nothing_else():
    base = small_plan()
    digests = [plan.digest for plan in changed_plans()]
    assert len({base.digest, *digests}) == len(digests) + 1
    assert small_plan(variants=("ternary", "bf16")).digest == base.digest
    assert small_plan(PROFILE.model_copy(update={"name": "other"})).digest == base.digest
    assert base.run_id == base.digest[:16]


def test_shards_are_sized_by_what_they_should_take():
    def sizes(**changes):
        profile = Profile.model_validate(PROFILE.model_dump() | changes)
        plan = build_plan(profile, [small_workload()], ("bf16",), fingerprints=FINGERPRINTS)
        return [len(shard.samples) for shard in plan.shards], plan.digest

    as_declared, digest = sizes()
    assert as_declared == [8, 8, 4]
    step_s = PROFILE.cost.megapixel_step
    assert sizes(shard_seconds=4.0)[0] == [4] * 5
    assert sizes(cost={"megapixel_step": 2 * step_s})[0] == [4] * 5
    assert sizes(cost={"megapixel_step": step_s, "evaluators": {"toy-evaluator": 1.0}})[0] == [4] * 5
    assert sizes(cost={"megapixel_step": step_s, "evaluators": {"another": 1.0}}) == (as_declared, digest)
    assert sizes(cost={"megapixel_step": step_s / 1e6})[0] == [20]  # all in one
    assert sizes(shard_seconds=1e-6)[0] == [4] * 5  # a batch is never cut
    assert len({digest, sizes(shard_seconds=4.0)[1], sizes(shard_seconds=12.0)[1]}) == 3


def test_a_shards_images_fit_in_rays_store():
    huge = Profile.model_validate(
        PROFILE.model_dump() | {"sampling": {**vars(SAMPLING), "width": 4096, "height": 4096}}
    )
    plan = build_plan(huge.model_copy(update={"shard_seconds": 1e9}), [small_workload()], ("bf16",))
    assert [len(shard.samples) for shard in plan.shards] == [4] * 5  # 200 MB each


def test_ids_of_the_default_seed_rule_never_change():
    """Frozen: with other ids, results that are there would no longer pair with new ones, and no run would go on."""
    plan = small_plan()
    sample = plan.shards[0].samples[1]
    assert sample.pair_id == "1b6ed375c8c4ccc33f8bfe0ea8df8391"
    assert sample.noise_seed == int(sample.pair_id[:16], 16) >> 1
    assert plan.digest == "2b171e055eb785cca914c9582dd2785f2fcc3c49012895e6b77f7795b9afca44"


def test_the_seed_rule_image_gives_image_n_of_every_prompt_the_same_noise():
    by_pair, by_image = small_workload(), replace(small_workload(), seed_rule="image")
    plan = build_plan(PROFILE, [by_image], ("bf16", "ternary"), fingerprints=FINGERPRINTS)
    samples = [sample for shard in plan.shards for sample in shard.samples]
    assert all(sample.noise_seed == by_image.seed + sample.image_index for sample in samples)
    pairs = {sample.pair_id for sample in samples}
    assert len(pairs) == 20
    others = build_plan(PROFILE, [by_pair], ("bf16", "ternary"), fingerprints=FINGERPRINTS)
    assert not pairs & {sample.pair_id for shard in others.shards for sample in shard.samples}
    assert plan.digest != others.digest
    assert plan.describe()["benchmarks"][0]["seed_rule"] == "image"


def test_a_plan_says_where_it_departs_from_a_benchmarks_protocol():
    def notes(limit=None, images=None, **protocol):
        workload = replace(small_workload(), protocol=Protocol(**protocol))
        return build_plan(PROFILE, [workload], ("bf16",), limit, images).assumptions

    assert notes() == notes(steps=1, width=16, guidance=1.0, seed_rule="pair") == ()
    assert notes(steps=30, width=16) == ("toy is drawn with steps 1, not its protocol's 30",)
    assert notes(seed_rule="image") == ("toy is drawn with seed_rule pair, not its protocol's image",)
    assert notes(images=1) == ("toy is drawn with images_per_prompt 1, not its protocol's 2",)
    assert notes(limit=2) == ("toy is drawn with 4 of its 10 prompts",)
    assert build_plan(PROFILE, [small_workload()], ("bf16",), 1, 1).assumptions == ()  # it declares none


def test_two_workloads_of_one_name_are_refused():
    with pytest.raises(UserError, match="stands there twice"):
        build_plan(PROFILE, [small_workload(), small_workload()], ("bf16",))


def test_a_full_size_plan_is_quick():
    """26,212 samples a variant: GenEval and T2I-CompBench together. Seconds of it would mean a quadratic step."""
    records = tuple(PromptRecord(i, str(i % 8), f"a photo of {i}", {}) for i in range(6553))
    plan = build_plan(
        PROFILE, [Workload("big", "e", records, 4, 1, "0")], ("bf16", "ternary"), None, None, FINGERPRINTS
    )
    assert plan.n_samples == 2 * 26212
    assert plan.digest
