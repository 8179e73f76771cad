"""Replies for many callers: a queue, a thread for each reply, and conversations that are kept, so that a next turn sends what is new."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.reply import Attempts
from privinf.client.sampling import GREEDY, Sampling
from privinf.client.text import Prompt, Token
from privinf.client.tokenizer import load_tokenizer
from privinf.gateway.chat import Chat
from privinf.gateway.held import Held
from privinf.gateway.limits import Limits
from privinf.gateway.waits import Full, Stopping
from privinf.session.memory import give_back
from privinf.transport.meter import PHASES, Cell
from protocols.errors import ConfigError, HandshakeError, PrivinfError, RefusedError, TransportError

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


@dataclass(eq=False, repr=False)
class Answer:
    """A reply as it comes; the counts are complete when it has ended."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, those that no pass had to take in again
    tokens: int = 0
    finish_reason: str = "length"
    held: Held | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ends it, from any thread; the peers see the session end."""
        self.cancelled.set()
        if self.held is not None:
            self.held.conversation.close()


class Engine:
    """`start` it, then `stream` replies from an event loop, then `close` it. Raises PrivinfError, and Full where there is no room."""

    def __init__(self, client: Client, limits: Limits, template: str | None = None) -> None:
        self.client, self.limits, self._template = client, limits, template
        self._guard = threading.Lock()
        self._kept: list[Held] = []  # idle, the one that was used last at the end
        self._live: set[Held] = set()
        self._totals = {(peer, phase): Cell() for peer in ("server", "dealer") for phase in PHASES}
        self._spent = 0
        self._pool = ThreadPoolExecutor(limits.active, thread_name_prefix="privinf-reply")
        self._slots = asyncio.Semaphore(limits.active)
        self._mean_s = 1.0  # of recent replies
        self.waiting = self.active = 0
        self.counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "tokens", "replies", "cancelled", "failed", "prepared"), 0)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._closing = False
        self._ending = contextlib.ExitStack()
        self._queues: set[asyncio.Queue[Token | BaseException | None]] = set()  # of replies that are being made

    # ---- life

    def start(self) -> None:
        """Connects, and reads the public bundle; the session is kept for the first query."""
        held = self._open()
        self.lowered = held.conversation.lowered
        if not self.lowered.info.is_language_model:
            held.conversation.end()
            raise ConfigError("the server's model is no language model", remedy="serve a converted checkpoint")
        self.tokenizer = load_tokenizer(self.lowered.tokenizer)
        self.chat = Chat(self.lowered, self.tokenizer, self._template, most=self.limits.active + self.limits.waiting)
        self._ending.callback(self.chat.close)
        self.logits = held.conversation.session.gives_logits
        with self._guard:
            self._kept.append(held)

    async def evict(self) -> None:
        """Ends kept conversations that nobody has used for long; runs until it is cancelled."""
        while True:
            await asyncio.sleep(EVICT_S)
            with self._guard:
                old = [held for held in self._kept if time.monotonic() - held.conversation.used > self.limits.keep_s]
                self._kept = [held for held in self._kept if held not in old]
            for held in old:
                await asyncio.to_thread(self._retire, held)

    def halt(self) -> None:
        """Ends every reply, and tells whoever waits for one why; in the event loop's thread."""
        self._closing = True
        for queue in self._queues:
            queue.put_nowait(Stopping())
        for _ in range(self.waiting):
            self._slots.release()

    def close(self) -> None:
        """Ends every reply and every conversation."""
        with self._guard:
            self._closing = True
            idle, self._kept = self._kept, []
        for held in idle:
            self._retire(held)
        self.client.close()
        self._ending.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ---- replies

    def read(self, query: Query) -> tuple[list[int], str | None]:
        """The prompt's ids, and its text if it is one; ConfigError for what the model cannot take."""
        text = query.prompt if isinstance(query.prompt, str) else None
        if text is not None and not query.special_tokens and self.tokenizer is not None:
            return list(Prompt.read(self.lowered, None, self._encode(text) or []).ids), text
        prompt = Prompt.read(self.lowered, text, None if text is not None else list(query.prompt))  # type: ignore[arg-type]
        return list(prompt.ids), text

    def _encode(self, text: str) -> list[int] | None:
        """Ids of a text that goes on from another; None unless they stand for exactly this text."""
        if self.tokenizer is None:
            return None
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            return ids if self.tokenizer.decode(ids, skip_special_tokens=False) == text else None
        except ConfigError:  # the text is then no text
            return None

    async def stream(self, query: Query, answer: Answer) -> AsyncIterator[Token]:
        """New tokens as they come. Closing the iterator, or cancelling who waits in it, ends the reply and the session behind it."""
        if self.active + self.waiting >= self.limits.active + self.limits.waiting:
            raise self._full()
        self.waiting += 1  # before anything is awaited, so that no crowd slips through
        try:
            ids, text = await asyncio.to_thread(self.read, query)
            answer.prompt_tokens = len(ids)
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        if self._closing:
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
        retry_after = max(1, round(math.ceil((rest + 1) / limits.active) * self._mean_s))
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
                self._retire(answer.held)
        finally:
            with self._guard:
                self._mean_s += 0.2 * (time.monotonic() - began - self._mean_s)
                self.counts[end] += 1
                for name in ("prompt_tokens", "cached_tokens", "tokens"):
                    self.counts[name] += getattr(answer, name)
            emit(None)

    def _answer(self, query: Query, ids: list[int], text: str | None, answer: Answer, emit: Callable[[Any], None]) -> None:
        attempts, found = Attempts(self.limits.retry, self.client.options.timeout, answer.cancelled), self._follow(ids, text)

        def attempt(connect_s: float | None) -> Iterator[Token]:
            nonlocal found
            kept, found = found, None
            if kept is not None:
                answer.held, (answer.cached_tokens, fresh, keep) = kept
                try:
                    yield from self._pass(attempts, query, answer, fresh, keep)
                    return
                except (TransportError, RefusedError) as error:
                    if answer.tokens or answer.cancelled.is_set() or error.retry_after is not None:
                        raise
                # a kept session may have died meanwhile, with the server say, or reached its limits
                self._retire(answer.held)
                attempts.reply, answer.cached_tokens = None, 0
            elif answer.held is not None:
                self._retire(answer.held)
            answer.held = self._begin(answer, connect_s)
            yield from self._pass(attempts, query, answer, ids, True)

        for token in attempts.carry_on(attempt):
            answer.tokens += 1
            emit(token)
        held, reply = answer.held, attempts.reply
        assert held is not None and reply is not None
        answer.finish_reason = reply.finish_reason
        held.ended = reply.finish_reason == "stop" and not reply.streamer.stopped
        held.text = None if text is None or reply.streamer.text is None else text + reply.streamer.text
        with self._guard:
            self.counts["prepared"] += reply.sessions[-1].prepared is not None
            self.seconds["offline"] += reply.timing.offline_s
            self.seconds["online"] += sum(reply.timing.tokens_s)
        self._keep(held)

    def _pass(self, attempts: Attempts, query: Query, answer: Answer, fresh: list[int], keep: bool) -> Iterator[Token]:
        """New tokens of a reply, in the conversation that it has now."""
        assert answer.held is not None
        attempts.check()
        conversation = answer.held.conversation
        try:
            yield from conversation.generate(
                fresh,
                max_new_tokens=min(query.max_new_tokens, self.limits.new_tokens),
                ignore_eos=query.ignore_eos,
                sampling=query.sampling,
                keep_last=keep,
                prepared=self.limits.prepared,
                begun=attempts.reply,
            )
        except (TransportError, RefusedError):
            whole = conversation.reply is not None and conversation.reply.whole  # then what broke only padded it
            if not whole or answer.cancelled.is_set():
                raise
        finally:
            attempts.reply = conversation.reply

    # ---- conversations

    def _begin(self, answer: Answer, connect_s: float | None = None) -> Held:
        """A new conversation for a reply; to reach the server it has `connect_s` seconds, by default as the client's options say.

        What is wrong here, a certificate that has expired say, is no fault of the caller's.
        """
        try:
            return self._open(answer, connect_s)
        except ConfigError as error:
            log.error("no session can be opened: %s", error)
            raise TransportError("no session can be opened, by a fault at this end", remedy="look at the gateway's output") from error

    def _open(self, answer: Answer | None = None, connect_s: float | None = None) -> Held:
        """A new conversation; where the server is full, room is made by what we keep ourselves."""
        while True:
            if self._closing:
                raise Stopping
            held = Held(Conversation(self.client))
            if answer is not None:
                answer.held = held  # from now on it can be cancelled
            try:
                held.conversation.open(connect_s)
                break
            except HandshakeError as error:
                again = error.again(max(1, round(self._mean_s)))
                if again is None:
                    raise
                with self._guard:
                    oldest = self._kept.pop(0) if self._kept else None
                if oldest is None:
                    raise Full(error.message, again) from error
                self._retire(oldest)
        with self._guard:
            self.seconds["setup"] += held.conversation.session.setup_s
            self._live.add(held)
        return held

    def _follow(self, ids: list[int], text: str | None) -> tuple[Held, tuple[int, list[int], bool]] | None:
        """The kept conversation from which a prompt goes on furthest, which is then no longer kept."""
        with self._guard:
            matches = [(held, found) for held in self._kept if held.conversation.usable and (found := held.follow(ids, text, self._encode))]
            best = max(matches, key=lambda match: match[1][0], default=None)
            if best is not None:
                self._kept.remove(best[0])
        return best

    def _keep(self, held: Held) -> None:
        if not held.conversation.usable or held.conversation.room <= 1 or not self.limits.kept:
            self._retire(held)
            return
        with self._guard:
            self._kept.append(held)
            surplus = self._kept[: len(self._kept) - self.limits.kept]
            del self._kept[: len(surplus)]
        for old in surplus:
            self._retire(old)

    def _retire(self, held: Held) -> None:
        """Ends a conversation, and keeps its counters; may be called again."""
        with contextlib.suppress(PrivinfError):
            held.conversation.end()
        with self._guard:
            if held in self._live:
                self._live.discard(held)
                for place, cell in held.cells().items():
                    self._totals[place].add(cell)
                self._spent += held.spent
        give_back()

    # ---- counters

    @property
    def kept(self) -> int:
        """Conversations that are kept."""
        return len(self._kept)

    def cells(self) -> Mapping[tuple[str, str], Cell]:
        """What moved so far, by peer and phase."""
        result = {place: Cell() for place in self._totals}
        with self._guard:
            parts = [self._totals, *(held.cells() for held in self._live)]
        for part in parts:
            for place, cell in part.items():
                result[place].add(cell)
        return result

    def spent(self) -> int:
        """Correlations that were used, each once."""
        with self._guard:
            return self._spent + sum(held.spent for held in self._live)
