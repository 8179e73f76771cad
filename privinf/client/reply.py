"""A reply: what was asked for, what has come of it, and how it goes on in a fresh session where a connection broke."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from privinf.client.lines import Lines
from privinf.client.sampling import Sampler
from privinf.client.scores import PromptScores, Scores, score
from privinf.client.session import ClientSession, Timing, in_chunks
from privinf.client.text import Prompt, Streamer, Token
from privinf.client.tokenizer import Tokenizer
from privinf.client.wanted import Wanted
from privinf.lowering.steps import padded
from privinf.session.messages import Terms
from privinf.session.report import model_of, traffic_of
from privinf.transport.meter import PHASES, Cell
from privinf.trust import TEXTS
from protocols.errors import ConfigError, HandshakeError, ProtocolDesync, TransportError

PAUSE_S = 0.1
"""Before the first attempt after a break; then longer."""


class Reply:
    """A reply as it comes, whatever sessions it takes: `generate` in the first, and again in each that goes on with it."""

    def __init__(self, prompt_tokens: int, tokenizer: Tokenizer | None, wanted: Wanted) -> None:
        self.prompt_tokens, self.wanted = prompt_tokens, wanted
        self.streamer, self.sampler = Streamer(tokenizer, wanted.sampling.stop), Sampler(wanted.sampling)
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []  # of its passes, where they were asked for
        self.scores = Scores()  # likewise
        self.finish_reason = "length"
        self.whole = False  # all tokens are here
        self.shown = (0, 0)  # prompt tokens and new tokens as the last session's server saw them, padding included
        self.timing = Timing()
        self.sessions: list[ClientSession] = []  # in which it was made; all but the last broke

    def __repr__(self) -> str:
        return f"Reply({len(self.tokens)} tokens, hidden)"

    def _take(self, session: ClientSession) -> None:
        """Its passes go over this session now; HandshakeError if that has another model than the one before."""
        if self.sessions and session.lowered.id != self.sessions[-1].lowered.id:
            what = "the server has another model now, so that the reply cannot go on"
            raise HandshakeError(what, party="client", peer=session.peers.named)
        self.sessions.append(session)
        self.timing.setup_s += session.setup_s
        self.timing.unshown_s = 0.0

    def generate(self, session: ClientSession, ids: Sequence[int], *, prepared: bool = False, after: int = 0) -> Iterator[Token]:
        """New tokens: a pass over these ids, which go on from what the session has cached, then one for each token but the last.

        With `prepared` a query that was prepared is used if one fits; then the session is over after this query. What pads the prompt
        stands in front of it, but after its first `after` ids; what pads the reply are passes after its last token, and a caller
        who turns away before the iterator has ended leaves them out. A reply that has begun goes on after the prompt, padded as it was, and
        its tokens, with what is left of its sampler's random numbers.
        """
        self.begin(session)
        ids, terms, room = self.placed(session, ids, after, session.runtime.offset)
        first = len(self.tokens)
        if prepared and not self.scored:
            self.timing.offline_s += session.spend(terms)
        for left in reversed(range(min(self.wanted.max_new_tokens - first, terms.tokens))):
            out = self._next(session, terms) if len(self.tokens) > first else self._prefill(session, ids, terms)
            yield self.choose(session, out, left)
            if self.finish_reason == "stop":
                break
        for _ in range(self.padding(session, room)):
            self._next(session, terms)  # like any other to the server; what it reveals is dropped
            self.timing.padding_s += self.timing.tokens_s.pop()

    def begin(self, session: ClientSession) -> None:
        """It is made in this session from now on; HandshakeError where that does not give what it takes."""
        if self.wanted.revealed:
            session.want_logits()
        self.sampler.begin(session.lowered)
        self._take(session)

    def placed(self, session: ClientSession, ids: Sequence[int], after: int, cached: int) -> tuple[list[int], Terms, int]:
        """The ids of its first pass behind `cached` positions, padded, what is asked for, and the room for new tokens.

        A reply that has begun has its tokens among the ids.
        """
        terms = session.terms(len(ids), self.wanted.max_new_tokens, self.wanted.revealed, cached)
        room = session.lowered.info.n_positions - cached - terms.seq + 1
        filled, first = session.filled(ids, terms.seq, after), len(self.tokens)
        if first:
            filled += self.tokens
            terms = in_chunks(session.options, len(filled), terms.tokens - first, self.wanted.revealed)
        return filled, terms, room

    def padding(self, session: ClientSession, room: int) -> int:
        """Passes that pad it, once its last token is here."""
        return padded(len(self.tokens), session.options.pad_reply, room) - len(self.tokens)

    def choose(self, session: ClientSession, out: Tensor, left: int, *, revealed: bool | None = None) -> Token:
        """The token of an output, after which at most `left` follow; `revealed`: that it is logits, which others of a batch asked for."""
        stop = {*self.wanted.sampling.stop_ids, *(() if self.wanted.ignore_eos else session.lowered.info.eos)}
        if self.wanted.logits:
            self.logits.append(out)
        token = self.sampler.choose(out) if self.wanted.revealed or revealed else int(out)
        if not 0 <= token < session.lowered.info.vocab:
            raise ProtocolDesync("the output is no token of the vocabulary", party="client", peer=session.peers.named)
        self.tokens.append(token)
        text = None if token in stop else self.streamer.add(token)
        if token in stop or self.streamer.stopped or self.sampler.ended:
            self.finish_reason, left = "stop", 0
        self.whole = left == 0
        found = None if self.wanted.logprobs is None else score(out, token, self.wanted.logprobs)
        self.scores.new += [] if found is None else [found]
        return Token(token, self.streamer.rest() if text is None else text if left else text + (self.streamer.rest() or ""), found)

    @property
    def scored(self) -> bool:
        """Whether its first pass has an output of every position; of one that goes on in another session the prompt has its scores."""
        return self.wanted.score_prompt and not self.tokens

    def score(self, ids: Sequence[int], rows: Iterable[Tensor]) -> Tensor:
        """Scores the prompt, of which these are the ids with what pads it in front, from logits of its positions; the last of them."""
        found = PromptScores(ids, self.wanted.logprobs or 0)
        for last in rows:
            found.add(last)
        first, *others = found.scores[len(ids) - self.prompt_tokens :]
        self.scores.prompt = [first._replace(logprob=None, top=()), *others]
        return last[-1:]

    def _prefill(self, session: ClientSession, ids: Sequence[int], terms: Terms) -> Tensor:
        self.shown = terms.seq, 0
        scored = self.scored
        out = self.score(ids, session.scored(ids, terms, self.timing)) if scored else session.prefill(ids, terms, self.timing)
        self.shown = terms.seq, 1
        return out

    def _next(self, session: ClientSession, terms: Terms) -> Tensor:
        more = self.shown[1] + 1 < terms.tokens  # what pads the reply included: it depends on no token
        out = session.next(self.tokens[-1], self.wanted.revealed, self.timing, more=more)
        self.shown = self.shown[0], self.shown[1] + 1
        return out

    def result(self) -> dict[str, Any]:
        """What `run` and `generate` print with --json, the contract's fields."""
        timing, last = self.timing, self.sessions[-1]
        plan = last.lowered.plan.values()
        return {
            "text": self.streamer.finish(),
            "prompt_tokens": self.prompt_tokens,
            "padded": {"prompt_tokens": self.shown[0], "tokens": self.shown[1], "seconds": timing.padding_s},
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "timing": {
                "setup_s": timing.setup_s,
                "offline_s": timing.offline_s,
                "first_token_s": timing.tokens_s[0] if timing.tokens_s else 0.0,
                "per_token_s": list(timing.tokens_s),
            },
            "traffic": traffic(*self.sessions),
            "retries": len(self.sessions) - 1,
            "prepared": last.prepared is not None,
            "trust": last.trust,
            "trust_model": TEXTS[last.trust],
            "ring_bits": max(entry.bits for entry in plan),
            "fractional_bits": max(entry.frac for entry in plan),
            "model": model_of(last.lowered),
            **({"logits": [x.reshape(-1).tolist() for x in self.logits]} if self.logits else {}),
            **self.scores.plain(),
        }


class Output(Reply):
    """The output of one private pass: of a lowered module, or rounded logits of a language model."""

    def __init__(self) -> None:
        super().__init__(0, None, Wanted())

    def run(self, session: ClientSession, inputs: Sequence[Tensor]) -> Tensor:
        """See `Client.run`."""
        self._take(session)
        if not session.lowered.info.is_language_model or len(inputs) != 1 or inputs[0].dim() not in (1, 2) or inputs[0].is_floating_point():
            return session.compute(inputs, self.timing)
        session.want_logits()
        prompt = Prompt.read(session.lowered, None, inputs[0].reshape(-1).tolist())
        self.prompt_tokens = len(prompt.ids)
        terms = session.terms(len(prompt.ids), 1, True)
        ids = session.filled(prompt.ids, terms.seq, 0)
        self.timing.offline_s += session.spend(terms)
        return self._prefill(session, ids, terms).float()


def traffic(*sessions: ClientSession) -> dict[str, Any]:
    """The contract's `traffic`, of all these sessions."""
    peer, dealer = {phase: Cell() for phase in PHASES}, Cell()
    for connection in (connection for session in sessions for connection in session.lines.dialled):
        for phase in PHASES:
            (dealer if connection.peer_role == "dealer" else peer[phase]).add(connection.meter.total(phase))
    return traffic_of(peer, dealer)


class Attempts:
    """One query, the sessions that it takes, and whether it may take another: `retry` of them at most after a break."""

    def __init__(self, retry: int, timeout_s: float, over: threading.Event | None = None) -> None:
        if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
            raise ConfigError("a reply is begun anew a whole number of times", remedy="give a retry of 0 or more")
        self.made: list[Lines] = []
        self.reply: Reply | None = None  # once it has begun
        self.over = over or threading.Event()  # its caller has turned away
        self._left, self._timeout_s, self._pause_s = retry, timeout_s, PAUSE_S
        self._tokens = -1  # at the last break
        self._broke: float | None = None  # when, time.monotonic()

    def carry_on(self, attempt: Callable[[float | None], Iterator[Token]]) -> Generator[Token, None, bool]:
        """The reply's tokens. An attempt makes a session, within so many seconds if another broke, and goes on in it with `reply`.

        What a broken connection raises, a TransportError, is the caller's if no further attempt is left, or none that could come in time.
        Returns whether the last attempt came to its end: false where what broke only padded the reply.
        """
        while True:
            try:
                yield from attempt(None if self._broke is None else max(PAUSE_S, self._broke + self._timeout_s - time.monotonic()))
                return True
            except TransportError:
                if not self._again():
                    raise
                if self.reply is not None and self.reply.whole:
                    return False

    def _again(self) -> bool:
        """A connection broke: whether another one is to be tried, after a pause."""
        now, tokens = time.monotonic(), 0 if self.reply is None else len(self.reply.tokens)
        if tokens > self._tokens:  # the last one got on
            self._tokens, self._broke, self._pause_s = tokens, now, PAUSE_S
        if self._left == 0 or self._broke is None or now > self._broke + self._timeout_s:
            return False
        self._left -= 1
        self._pause_s = min(2 * self._pause_s, 1.0)
        return not self.over.wait(self._pause_s)

    def check(self) -> None:
        """TransportError if the caller has turned away while a session was made."""
        if self.over.is_set():
            raise TransportError("this query was ended by its caller", party="client")
