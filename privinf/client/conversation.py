"""A session that is kept between queries, so that the next one sends only what is new.

One session is one sequence: both parties hold the masked keys and values of the positions so far, and a further query is one pass over
the new positions. A prompt that begins with the whole sequence goes on from there; any other needs a conversation of its own: that is
the only way to empty the cache. Tokens that pad a prompt stay in the sequence, unseen; passes that pad a reply end the conversation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Self

from privinf.client.client import Client
from privinf.client.lines import Lines
from privinf.client.reply import Reply
from privinf.client.sampling import GREEDY, Sampling
from privinf.client.session import ClientSession
from privinf.client.text import Prompt, Token
from privinf.client.wanted import Wanted
from privinf.lowering.lowered import Lowered
from privinf.session.options import MAX_NEW_TOKENS
from protocols.errors import Code, ConfigError, TransportError


class Conversation:
    """`Conversation(client)`; then `open`, any number of `generate`, one at a time, and `close`. Also a context manager.

    After an error in a pass, or when the caller turns away from a reply before its end, the conversation is over.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._made: list[Lines] = []
        self._session: ClientSession | None = None
        self._guard = threading.Lock()
        self._over = False
        self._cached: list[int] = []  # ids that passes have taken in, without what padded the prompts
        self._last: int | None = None  # the last new token, which no pass has taken in yet
        self.reply: Reply | None = None
        """The last one, once it has begun."""
        self.used = time.monotonic()
        """When it was opened or last used, by time.monotonic()."""

    def __repr__(self) -> str:
        return f"Conversation({len(self._cached)} positions, hidden)"

    def open(self, connect_s: float | None = None) -> Self:
        """Connects, within so many seconds (default: as the options say), unless it is open already; PrivinfError, also once it is over."""
        if self._session is None and not self._over:
            self._session = self._opened(connect_s)
        if self._over:
            self.close()
            raise TransportError("this conversation was closed", party="client")
        return self

    def _opened(self, connect_s: float | None) -> ClientSession:
        return self._client.open(self._made, connect_s)

    @property
    def session(self) -> ClientSession:
        """The session that it is, once it is open."""
        if self._session is None:
            raise TransportError("this conversation is not open", party="client")
        return self._session

    @property
    def lowered(self) -> Lowered:
        """The public bundle."""
        return self.session.lowered

    @property
    def usable(self) -> bool:
        """Whether it can be used further."""
        return self._session is not None and not self._over

    @property
    def ids(self) -> list[int]:
        """The sequence so far, the last new token included."""
        return [*self._cached, *([] if self._last is None else [self._last])]

    @property
    def room(self) -> int:
        """How many positions the model's context has left."""
        return self.lowered.info.n_positions - self.cached

    @property
    def cached(self) -> int:
        """How many positions passes have taken in."""
        return self.session.runtime.offset

    @property
    def setup_s(self) -> float:
        """The seconds that its session took to open."""
        return self.session.setup_s

    @property
    def own(self) -> ClientSession | None:
        """The session, where nobody else uses it."""
        return self.session

    @property
    def lost(self) -> bool:
        """Whether it is over because a session ended in which others are too, whoever's fault that was."""
        return False

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_eos: bool = False,
        logits: bool = False,
        sampling: Sampling = GREEDY,
        keep_last: bool = True,
        prepared: bool = False,
        begun: Reply | None = None,
        logprobs: int | None = None,
        score_prompt: bool = False,
    ) -> Iterator[Token]:
        """New tokens after the sequence so far and these ids, as `Client.generate`; only what is new goes through a pass.

        The last token of the reply before this one is part of the sequence unless `keep_last` is false: an end token, say, which
        the next prompt does not hold. With `prepared` a conversation's first query uses one that was prepared, if one fits; then the
        conversation is over after it, for what was prepared ends there. With `begun` the reply goes on that broke in another session; then
        these ids are all that came before the reply.
        """
        wanted, self.reply = Wanted(max_new_tokens, ignore_eos, logits, sampling, logprobs, score_prompt), begun
        if not self.usable:
            raise TransportError("this conversation is over", party="client", remedy="begin another one")
        if score_prompt and self.ids:
            raise ConfigError("what a conversation has already is not scored", remedy="begin another one")
        last = [] if self._last is None or not keep_last else [self._last]
        fresh, session = [*last, *ids], self.session
        prompt = Prompt.read(session.lowered, None, fresh)
        if len(fresh) > self.room:
            what = f"the conversation has {self.cached + len(fresh)} tokens, and the model's context "
            raise ConfigError(f"{what}{session.lowered.info.n_positions}", remedy="begin another one", code=Code.TOO_LONG)
        try:
            reply = self.reply = begun or Reply(len(fresh), prompt.tokenizer, wanted)
            yield from self._made_of(reply, prompt.ids, prepared=prepared and not self.cached, after=len(last))
            *before, self._last = reply.tokens
            self._cached += [*fresh, *before]
            self.used = time.monotonic()
            # passes that padded the reply are in the cache, and in no sequence of ours; and of a prepared query nothing is left
            if reply.timing.padding_s or session.prepared is not None:
                self.end()
        except BaseException as error:  # also GeneratorExit: the caller has turned away
            self.close(error)
            raise

    def _made_of(self, reply: Reply, ids: Sequence[int], *, prepared: bool, after: int) -> Iterator[Token]:
        """The tokens of a reply after these ids; see `Reply.generate`."""
        return reply.generate(self.session, ids, prepared=prepared, after=after)

    def end(self) -> None:
        """Tells the peers that no query follows, and closes."""
        try:
            if self.usable:
                self.session.end()
        finally:
            self.close()

    def close(self, error: BaseException | None = None) -> None:
        """Closes at once, from any thread, also while another one waits in it; may be called again."""
        with self._guard:
            self._over = True
            made = list(self._made)
        for lines in made:
            self._client.drop(lines, error)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()
        else:
            self.close()
