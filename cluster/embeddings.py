"""Encoded prompts: each distinct one is encoded once, and kept in Ray's object store while shards still need it."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

from cluster.actor_slot import ActorSlot
from cluster.plan import Shard


class Embeddings:
    """References to prompt embeddings. The driver passes them on and never opens one."""

    def __init__(self, encoder: ActorSlot, shards: Iterable[Shard]) -> None:
        self._encoder = encoder
        self._uses = Counter(prompt for shard in shards for prompt in _prompts(shard))
        # Where each prompt's reference stands: the call that encodes it, and its place in that call's results.
        self._encoded: dict[str, tuple[asyncio.Task[list[Any]], int]] = {}

    async def get(self, prompts: list[str]) -> list[Any]:
        """References for `prompts`, encoding in one call those that were not asked for before.

        Raises what the encoder raises (ActorLost, UserError, ...): call `forget` then, before asking again.
        """
        missing = [prompt for prompt in prompts if prompt not in self._encoded]
        if missing:
            task = asyncio.create_task(self._encode(missing))
            self._encoded.update((prompt, (task, place)) for place, prompt in enumerate(missing))
        return [(await task)[place] for task, place in [self._encoded[prompt] for prompt in prompts]]

    def forget(self, prompts: Iterable[str]) -> None:
        """Drops references that may have failed or been lost with their node."""
        for prompt in prompts:
            self._encoded.pop(prompt, None)

    def release(self, shard: Shard) -> None:
        """Notes that a shard is done; prompts that no other shard needs leave the object store."""
        for prompt in _prompts(shard):
            self._uses[prompt] -= 1
            if not self._uses[prompt]:
                self._encoded.pop(prompt, None)

    async def _encode(self, prompts: list[str]) -> list[Any]:
        _, references = await self._encoder.call(
            lambda actor: actor.encode.options(num_returns=len(prompts) + 1).remote(prompts)
        )
        return references


def _prompts(shard: Shard) -> set[str]:
    return {sample.prompt for sample in shard.samples}
