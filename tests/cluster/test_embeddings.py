"""Each prompt is encoded once, and its reference is let go with the last shard that needs it."""

import asyncio

import pytest

from cluster.embeddings import Embeddings


class Encoder:
    def __init__(self, failures=0):
        self.failures = failures
        self.encoded = []

    async def __call__(self, prompts):
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no encoder")
        self.encoded += prompts
        return [f"reference {len(self.encoded)} {prompt}" for prompt in prompts]


def test_prompts_are_encoded_once_and_released_one_by_one(plan):
    async def use():
        encoder = Encoder()
        first, other = plan.shards[:2]  # the same prompts, for both variants
        prompts = list(dict.fromkeys(sample.prompt for sample in first.samples))
        embeddings = Embeddings(encoder, [first, other])
        answers = await asyncio.gather(*(embeddings.get(prompts[:n]) for n in (2, 4, 3)))
        assert answers[0] == answers[1][:2]
        assert encoder.encoded == prompts[:4]
        embeddings.release(first)
        assert await embeddings.get(prompts[:4]) == answers[1]
        embeddings.release(other)
        assert not embeddings._encoded

    asyncio.run(use())


def test_a_failure_reaches_all_who_wait_and_is_forgotten_on_request(plan):
    async def use():
        embeddings = Embeddings(Encoder(failures=1), plan.shards)
        failures = await asyncio.gather(*(embeddings.get(["a", "b"]) for _ in range(2)), return_exceptions=True)
        assert [str(failure) for failure in failures] == ["no encoder"] * 2
        with pytest.raises(RuntimeError):
            await embeddings.get(["a"])
        embeddings.forget(["a", "b"])
        assert await embeddings.get(["b"]) == ["reference 1 b"]

    asyncio.run(use())
