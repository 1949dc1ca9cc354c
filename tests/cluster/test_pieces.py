"""Cutting a shard never moves a sample to another slot, and loses or doubles none."""

import asyncio

from cluster.pieces import Piece, PieceQueue, padded_batches

BATCH = 4


def whole(shard) -> Piece:
    return Piece(shard, tuple(range(len(shard.samples))))


def test_a_short_batch_is_padded_to_the_fixed_size(plan):
    short = plan.shards[-1]
    lonely = Piece(short, (2,))
    prompts, (batch,) = padded_batches(lonely, BATCH)
    sample = short.samples[2]
    assert prompts == [sample.prompt]
    assert batch.noise_seeds == (sample.noise_seed,) * BATCH
    assert batch.kept == (2,)


def test_a_sample_keeps_its_slot_however_its_shard_is_cut(plan):
    shard = plan.shards[0]
    _, (first, second) = padded_batches(whole(shard), BATCH)
    assert first.kept == second.kept == (0, 1, 2, 3)
    piece = Piece(shard, (1, 6, 7))
    prompts, batches = padded_batches(piece, BATCH)
    seeds = [(slot, batch.noise_seeds[slot]) for batch in batches for slot in batch.kept]
    assert seeds == [(1, first.noise_seeds[1]), (2, second.noise_seeds[2]), (3, second.noise_seeds[3])]
    assert [prompts[batch.prompts[slot]] for batch in batches for slot in batch.kept] == [
        sample.prompt for sample in piece.samples
    ]


def test_halves_part_between_batches_first(plan):
    left, right = Piece(plan.shards[0], tuple(range(1, 8))).halves(BATCH)
    assert (left.positions, right.positions) == ((1, 2, 3), (4, 5, 6, 7))
    left, right = right.halves(BATCH)
    assert (left.positions, right.positions) == ((4, 5), (6, 7))


def test_only_whole_shards_and_single_samples_get_all_attempts(plan):
    piece = whole(plan.shards[0]).failed()
    assert not piece.exhausted(3)
    half, _ = piece.failed().failed().halves(BATCH)
    assert (half.tries, half.attempts, half.failed().exhausted(3)) == (0, 3, True)
    alone = Piece(plan.shards[0], (5,), attempts=6).failed()
    assert (alone.attempts, alone.exhausted(3)) == (7, False)


def test_a_replica_gets_its_own_variant_first_and_then_the_fullest(plan):
    async def take_all():
        queue = PieceQueue(plan.shards[:5])  # bf16, ternary, bf16, ternary, bf16
        taken = [(await queue.take("ternary")).shard.key for _ in range(5)]
        queue.close()
        return taken, await queue.take("ternary")

    taken, after = asyncio.run(take_all())
    assert [(key.variant, key.number) for key in taken] == [
        ("ternary", 0),
        ("ternary", 1),
        ("bf16", 0),
        ("bf16", 1),
        ("bf16", 2),
    ]
    assert after is None


def test_the_last_pieces_are_left_for_others(plan):
    async def take_and_wait():
        queue = PieceQueue(plan.shards[:2])
        first = await queue.take("bf16", leave=1)
        waiting = asyncio.create_task(queue.take("bf16", leave=1))
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.put(first)
        return first, await waiting

    first, second = asyncio.run(take_and_wait())
    assert first == second


def test_the_longest_shards_go_first_and_what_failed_last(plan):
    async def take_all():
        short, *others = (shard for shard in plan.shards[::-1] if shard.key.variant == "bf16")  # 4, 8 and 8 images
        queue = PieceQueue([short, *others])
        queue.put(failed := whole(others[0]).failed())
        return [await queue.take("bf16") for _ in range(4)], short, failed

    taken, short, failed = asyncio.run(take_all())
    assert [piece.shard.expected_s for piece in taken[:3]] == [8.0, 8.0, 4.0]
    assert (taken[2].shard, taken[3]) == (short, failed)


def test_an_impatient_taker_gets_nothing_in_time(plan):
    async def take():
        queue = PieceQueue(plan.shards[:1])
        await queue.take("bf16")
        return await queue.take("bf16", patience_s=0.01), queue.closed

    assert asyncio.run(take()) == (None, False)


def test_a_new_replica_goes_where_most_waits_for_each(plan):
    queue = PieceQueue([*plan.shards, *plan.shards[:2]])  # four of each
    assert queue.neediest({"bf16": 1}) == "ternary"
    assert queue.neediest({"bf16": 1, "ternary": 2}) == "bf16"
