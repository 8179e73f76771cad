"""Waits that end early: because the caller leaves, or because there is no room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from protocols.errors import Code, PrivinfError, RefusedError

T = TypeVar("T")


class CallerGone(Exception):
    """The caller has closed its connection: there is nobody to answer."""


class Full(RefusedError):
    """No room now; `retry_after` is in seconds."""

    code = Code.FULL

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, remedy=f"try again in {retry_after} s", retry_after=retry_after)


class Stopping(PrivinfError):
    """This gateway is being stopped."""

    code = Code.GATEWAY_STOPPING

    def __init__(self) -> None:
        super().__init__("this gateway is being stopped")


async def unless(work: Awaitable[T], other: Awaitable[object], why: Exception) -> T:
    """The result of the work; as soon as the other is done first, `why` is raised and the work is cancelled."""
    task, ending = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise why
    finally:
        for each in (task, ending):
            each.cancel()
        await asyncio.gather(task, ending, return_exceptions=True)


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """The result, or CallerGone as soon as the caller has left, and then the work is cancelled."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return await unless(work, left(), CallerGone())
