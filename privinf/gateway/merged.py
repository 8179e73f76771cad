"""The pieces of several replies as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from privinf.gateway.writer import Said

Piece = tuple[int, Said | None]
"""Which reply, and a piece of it; None at its end."""


async def together(replies: Sequence[AsyncIterator[Said]]) -> AsyncIterator[Piece]:
    """All of them side by side; the first error is raised, and then, as when this is closed, every reply is ended."""
    if len(replies) == 1:  # as it comes, without tasks between
        try:
            async for text in replies[0]:
                yield 0, text
            yield 0, None
        finally:
            await replies[0].aclose()  # type: ignore[attr-defined]
        return
    queue = asyncio.Queue[Piece | BaseException]()

    async def follow(index: int, pieces: AsyncIterator[Said]) -> None:
        try:
            async for text in pieces:
                queue.put_nowait((index, text))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait(error)
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    tasks = [asyncio.create_task(follow(index, pieces)) for index, pieces in enumerate(replies)]
    left = len(tasks)
    try:
        while left:
            piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= piece[1] is None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
