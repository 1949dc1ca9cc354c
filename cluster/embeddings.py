"""Encoded prompts: each distinct one is encoded once, and kept in Ray's object store while shards still need it."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from cluster.plan import Shard


class Embeddings:
    """References to prompt embeddings. The driver passes them on and never opens one."""

    def __init__(self, encode: Callable[[list[str]], Awaitable[list[Any]]], shards: Iterable[Shard]) -> None:
        """`encode` gives a reference for each of its prompts."""
        self._encode = encode
        self._uses = Counter(prompt for shard in shards for prompt in _prompts(shard))
        self._encoded: dict[str, asyncio.Future[Any]] = {}

    async def get(self, prompts: list[str]) -> list[Any]:
        """References for `prompts`, encoding in one call those that were not asked for before.

        Raises what `encode` raises (ActorLost, UserError, ...): call `forget` then, before asking again.
        """
        missing = {p: asyncio.get_running_loop().create_future() for p in prompts if p not in self._encoded}
        self._encoded.update(missing)
        wanted = [self._encoded[prompt] for prompt in prompts]
        if missing:
            await _fill(missing, self._encode(list(missing)))
        return [await reference for reference in wanted]

    def forget(self, prompts: Iterable[str]) -> None:
        """Drops references that may have failed or been lost with their node."""
        for prompt in prompts:
            self._encoded.pop(prompt, None)

    def release(self, shard: Shard) -> None:
        """Notes that a shard is done; prompts that no other shard needs leave the object store."""
        for prompt in _prompts(shard):
            self._uses[prompt] -= 1
            if not self._uses[prompt]:
                del self._uses[prompt]
                self._encoded.pop(prompt, None)


async def _fill(futures: dict[str, "asyncio.Future[Any]"], encoding: Awaitable[list[Any]]) -> None:
    """Each prompt has a future of its own, so that its reference can go when no shard needs it any more."""
    try:
        for future, reference in zip(futures.values(), await encoding, strict=True):
            future.set_result(reference)
    except Exception as error:
        for future in futures.values():
            future.set_exception(error)
            future.exception()  # nobody else may ask for it
        raise


def _prompts(shard: Shard) -> set[str]:
    return {sample.prompt for sample in shard.samples}
