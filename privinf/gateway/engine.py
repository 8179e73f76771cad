"""Replies for many callers: a queue, a thread for each reply, and conversations that are kept, so that a next turn sends what is new."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from privinf.client.client import Client
from privinf.client.reply import Attempts
from privinf.client.sampling import GREEDY, Sampling
from privinf.client.scores import Score
from privinf.client.session import padded_terms
from privinf.client.shared import Seat
from privinf.client.text import Token
from privinf.gateway.conversations import Conversations
from privinf.gateway.held import Held
from privinf.gateway.limits import Limits
from privinf.gateway.model import Model
from privinf.gateway.replies import ReplyCounts
from privinf.gateway.waits import Full, Stopping
from protocols.errors import ConfigError, PrivinfError, RefusedError, TransportError

log = logging.getLogger("privinf.gateway")
EVICT_S = 1.0


@dataclass(frozen=True, repr=False)
class Query:
    """A prompt, as text or as ids, and how it is to be answered."""

    prompt: str | list[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    ignore_eos: bool = False
    special_tokens: bool = True  # whether the tokenizer adds its own; a chat template writes them itself
    logprobs: int | None = None  # log-probabilities of new tokens, with so many alternatives
    score_prompt: bool = False  # and of the prompt's: it is then taken in anew, whatever is kept


@dataclass(eq=False, repr=False)
class Answer:
    """A reply as it comes; the counts are complete when it has ended."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, those that no pass had to take in again
    tokens: int = 0
    finish_reason: str = "length"
    prompt: tuple[int, ...] = ()
    prompt_scores: tuple[Score, ...] = ()  # where they were asked for, from the first token on
    held: Held | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def hold(self, held: Held) -> None:
        """It is made in this conversation, and from now on it can be cancelled."""
        self.held = held

    def cancel(self) -> None:
        """Ends it, from any thread; the peers see the session end."""
        self.cancelled.set()
        if self.held is not None:
            self.held.conversation.close()


class Engine:
    """`start` it, then `stream` replies from an event loop, then `close` it. Raises PrivinfError, and Full where there is no room."""

    def __init__(self, client: Client, limits: Limits, template: str | None = None) -> None:
        self.client, self.limits, self._template = client, limits, template
        self.conversations, self.replies = Conversations(client, limits), ReplyCounts()
        self._pool = ThreadPoolExecutor(limits.active, thread_name_prefix="privinf-reply")
        self._slots = asyncio.Semaphore(limits.active)
        self.waiting = self.active = 0
        self._queues: set[asyncio.Queue[Token | BaseException | None]] = set()  # of replies that are being made

    # ---- life

    def start(self) -> None:
        """Connects, and reads the public bundle; the session is kept for the first query."""
        held = self._open(lambda held: None, alone=True)
        try:
            self.model = Model.of(held.conversation, self._template, self.limits.active + self.limits.waiting)
        except ConfigError:
            held.conversation.end()
            raise
        self.conversations.begin_with(held)

    async def evict(self) -> None:
        """Ends kept conversations that nobody has used for long; runs until it is cancelled."""
        while True:
            await asyncio.sleep(EVICT_S)
            for held in self.conversations.expired():
                await asyncio.to_thread(self.conversations.retire, held)

    def halt(self) -> None:
        """Ends every reply, and tells whoever waits for one why; in the event loop's thread."""
        self.conversations.closing = True
        for queue in self._queues:
            queue.put_nowait(Stopping())
        for _ in range(self.waiting):
            self._slots.release()

    def close(self) -> None:
        """Ends every reply and every conversation."""
        self.conversations.close()
        self.client.close()
        if (model := getattr(self, "model", None)) is not None:  # it may never have started
            model.chat.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ---- replies

    async def stream(self, query: Query, answer: Answer) -> AsyncIterator[Token]:
        """New tokens as they come. Closing the iterator, or cancelling who waits in it, ends the reply and the session behind it."""
        if self.active + self.waiting >= self.limits.active + self.limits.waiting:
            raise self._full()
        self.waiting += 1  # before anything is awaited, so that no crowd slips through
        try:
            ids, text = await asyncio.to_thread(self.model.read, query.prompt, special_tokens=query.special_tokens)
            answer.prompt_tokens, answer.prompt = len(ids), tuple(ids)
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        if self.conversations.closing:
            raise Stopping
        self.active += 1
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Token | BaseException | None]()

        def emit(item: Token | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and everything with it
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def left(_: Any) -> None:
            self.active -= 1
            self._slots.release()

        loop.run_in_executor(self._pool, self._work, query, ids, text, answer, emit).add_done_callback(left)
        done = False
        self._queues.add(queue)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
            done = True
        finally:
            self._queues.discard(queue)
            if not done:  # nothing is awaited here, for the waiter may be cancelled again and again
                answer.cancelled.set()
                threading.Thread(target=answer.cancel, name="privinf-cancel", daemon=True).start()

    def _full(self) -> Full:
        """Whoever is inside and could be, where there is room, counts as a reply that is made: its prompt may still be being read."""
        inside, limits = self.active + self.waiting, self.limits
        made, rest = min(inside, limits.active), max(0, inside - limits.active)
        waits = f"{rest} {'caller waits' if rest == 1 else 'callers wait'}" if limits.waiting else "nobody may wait"
        retry_after = max(1, round(math.ceil((rest + 1) / limits.active) * self.replies.mean_s))
        return Full(
            f"{made} {'reply is' if made == 1 else 'replies are'} being made and {waits}, and there is room for no more", retry_after
        )

    def _work(self, query: Query, ids: list[int], text: str | None, answer: Answer, emit: Callable[[Any], None]) -> None:
        """In a thread: the whole reply."""
        began, end = time.monotonic(), "failed"
        try:
            self._answer(query, ids, text, answer, emit)
            end = "replies"
        except Exception as error:
            end = "cancelled" if answer.cancelled.is_set() else "failed"  # before the caller hears of it, who then leaves
            emit(error)
            if not isinstance(error, PrivinfError):
                log.exception("internal error in a reply: %s", type(error).__name__)
            if answer.held is not None:
                self.conversations.retire(answer.held)
        finally:
            self.replies.ended(end, time.monotonic() - began, answer)
            emit(None)

    def _answer(self, query: Query, ids: list[int], text: str | None, answer: Answer, emit: Callable[[Any], None]) -> None:
        attempts = Attempts(self.limits.retry, self.client.options.timeout, answer.cancelled)
        found = self.conversations.follow(ids, text, self.model.encode, begun=not query.score_prompt)

        def attempt(connect_s: float | None) -> Iterator[Token]:
            nonlocal found
            kept, found = found, None
            if kept is not None:
                answer.held, (answer.cached_tokens, fresh, keep) = kept
            else:
                if answer.held is not None:
                    self.conversations.retire(answer.held)
                answer.held, fresh, keep = self._begin(answer, connect_s, alone=self._alone(query, ids)), ids, True
            try:
                yield from self._pass(attempts, query, answer, fresh, keep)
                return
            except Exception as error:
                if not self._goes_on(answer, error, kept=kept is not None):
                    raise
            lost = answer.held.conversation.lost
            self.conversations.retire(answer.held)
            if not answer.tokens:
                attempts.reply, answer.cached_tokens = None, 0
            answer.held = self._begin(answer, connect_s, alone=lost or self._alone(query, ids))
            yield from self._pass(attempts, query, answer, ids, True)

        for token in attempts.carry_on(attempt):
            if query.score_prompt and answer.held is not None and (made := answer.held.conversation.reply) is not None:
                answer.prompt_scores = tuple(made.scores.prompt)
            if query.max_new_tokens:  # else the prompt is all that was asked of
                answer.tokens += 1
                emit(token)
        held, reply = answer.held, attempts.reply
        assert held is not None and reply is not None
        answer.finish_reason = reply.finish_reason
        held.ended = reply.finish_reason == "stop" and not reply.streamer.stopped
        held.text = None if text is None or reply.streamer.text is None else text + reply.streamer.text
        self.replies.whole(reply, shared=isinstance(held.conversation, Seat))
        self.conversations.keep(held)

    def _alone(self, query: Query, ids: list[int]) -> bool:
        """Whether a new conversation has a session of its own: nobody else is here, or a query was prepared that will do for it.

        A batch of one costs more than a session of one, and prepared queries are used in such alone.
        """
        if self.active + self.waiting <= 1:
            return True
        revealed = query.logprobs is not None or query.sampling.takes_logits
        lengths = self.model.lowered.info.n_positions, len(ids), self._most(query), revealed
        return not query.score_prompt and self.conversations.prepared(padded_terms(self.client.options, *lengths))

    def _goes_on(self, answer: Answer, error: Exception, *, kept: bool) -> bool:
        """Whether a reply goes on elsewhere by itself after this error, once.

        Its session was one that others shared, and their faults are not its own; it was `kept`, and has died meanwhile, with the server
        say, or reached its limits. A refusal for now would be the same elsewhere.
        """
        if answer.cancelled.is_set() or isinstance(error, ConfigError) or getattr(error, "retry_after", None) is not None:
            return False
        if answer.held is not None and answer.held.conversation.lost:
            log.warning("a session that callers shared has ended, and a reply goes on in one of its own: %s", error)
            return True
        return kept and not answer.tokens and isinstance(error, TransportError | RefusedError)

    def _most(self, query: Query) -> int:
        """New tokens, at most; where the prompt alone is asked of, one is made that nobody gets."""
        return max(1, min(query.max_new_tokens, self.limits.new_tokens))

    def _pass(self, attempts: Attempts, query: Query, answer: Answer, fresh: list[int], keep: bool) -> Iterator[Token]:
        """New tokens of a reply, in the conversation that it has now."""
        assert answer.held is not None
        attempts.check()
        conversation = answer.held.conversation
        try:
            yield from conversation.generate(
                fresh,
                max_new_tokens=self._most(query),
                ignore_eos=query.ignore_eos,
                sampling=query.sampling,
                keep_last=keep,
                prepared=self.limits.prepared,
                begun=attempts.reply,
                logprobs=query.logprobs,
                score_prompt=query.score_prompt,
            )
        except (TransportError, RefusedError):
            whole = conversation.reply is not None and conversation.reply.whole  # then what broke only padded it
            if not whole or answer.cancelled.is_set():
                raise
        finally:
            attempts.reply = conversation.reply

    def _begin(self, answer: Answer, connect_s: float | None = None, *, alone: bool) -> Held:
        """A new conversation for a reply; to reach the server it has `connect_s` seconds, by default as the client's options say.

        What is wrong here, a certificate that has expired say, is no fault of the caller's.
        """
        try:
            return self._open(answer.hold, connect_s, alone=alone)
        except ConfigError as error:
            log.error("no session can be opened: %s", error)
            raise TransportError("no session can be opened, by a fault at this end", remedy="look at the gateway's output") from error

    def _open(self, begun: Callable[[Held], None], connect_s: float | None = None, *, alone: bool) -> Held:
        held = self.conversations.open(begun, connect_s, max(1, round(self.replies.mean_s)), alone=alone)
        self.replies.opened(held.conversation.setup_s)
        return held
