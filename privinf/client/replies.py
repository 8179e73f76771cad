"""Replies to a list of prompts, made together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from privinf.client.batch import Batch, Member
from privinf.client.listed import Placed
from privinf.client.reply import Reply, traffic
from privinf.client.session import ClientSession
from privinf.client.text import Prompt
from privinf.client.wanted import Wanted
from privinf.session.report import model_of
from privinf.transport.failure import Failure
from protocols.errors import ConfigError

CANCELLED = "cancelled"


@dataclass(eq=False, repr=False)
class _Asked:
    """One prompt of the list, and how far its reply is."""

    text: str | None
    ids: Sequence[int] | None
    reply: Reply | None = None
    member: Member | None = None
    cancelled: bool = False
    error: ConfigError | None = None


class Replies(Iterator[Placed]):
    """New tokens of all replies as they come: `for index, token in client.generate([...])`; also a context manager.

    A prompt that cannot be answered, an empty one say, is left out; the others go on, and after their last token the error of the first
    such prompt is raised. `cancel` ends one reply, from any thread. `results` are the contract's fields of each, once it has ended.
    """

    def __init__(
        self,
        session: AbstractContextManager[ClientSession],
        prompts: Sequence[str] | None,
        ids: Sequence[Sequence[int]] | None,
        wanted: Wanted,
        keep: Callable[[dict[str, Any]], None] = lambda result: None,
    ) -> None:
        if (prompts is None) == (ids is None):
            raise ConfigError("give either prompts or their ids")
        self._asked = [_Asked(text, None) for text in prompts or ()] + [_Asked(None, each) for each in ids or ()]
        if not self._asked:
            raise ConfigError("there is no prompt in the list", remedy="give one at least")
        self._session, self._wanted, self._keep = session, wanted, keep
        self._tokens = self._all()

    def __len__(self) -> int:
        return len(self._asked)

    def __next__(self) -> Placed:
        return next(self._tokens)

    def cancel(self, index: int) -> None:
        """This reply ends before the next pass, with what it has; ConfigError where the list has none of this number."""
        if not 0 <= index < len(self):
            raise ConfigError(f"there is no prompt {index} in a list of {len(self)}", remedy="prompts are counted from 0")
        self._asked[index].cancelled = True

    def close(self) -> None:
        """Ends all of them, and the session: what is not whole is cancelled."""
        self._tokens.close()
        for each in self._asked:
            if each.reply is not None and not each.reply.whole:
                each.reply.finish_reason = CANCELLED

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def replies(self) -> list[Reply | None]:
        """Each as far as it is; None for one that has not begun."""
        return [each.reply for each in self._asked]

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of each prompt what `Client.result` is of one alone, or `error`. Times and traffic are those of the passes it shared."""
        return [self._result(each) for each in self._asked]

    @staticmethod
    def _result(asked: _Asked) -> dict[str, Any]:
        if asked.error is not None:
            return {"error": Failure.of(asked.error).plain()}
        if asked.reply is None or not asked.reply.sessions:
            return {"tokens": [], "text": None, "finish_reason": CANCELLED}
        return asked.reply.result()

    def _all(self) -> Generator[Placed, None, None]:
        with self._session as session:
            if len(self) > 1 and (node := session.lone) is not None:
                raise ConfigError("this model takes one sequence at a time", layer=node.name, remedy="give one prompt")
            yield from self._answered(session, Batch(session))
            about = {"traffic": traffic(session), "trust": session.trust, "model": model_of(session.lowered)}
        self._keep({"replies": self.results, **about})
        for each in self._asked:
            if each.error is not None:
                raise each.error

    def _answered(self, session: ClientSession, batch: Batch) -> Iterator[Placed]:
        waiting = deque(self._begun(session))
        running: dict[Member, int] = {}
        while waiting or running:
            for member, index in list(running.items()):
                if self._asked[index].cancelled:
                    self._leave(batch, running, member)
            while waiting and not batch.full:
                self._enter(batch, running, waiting.popleft())
            for member, token, ended, error in batch.step():
                if error is not None:
                    self._asked[running[member]].error = error
                if token is not None:
                    yield Placed(running[member], token)
                if ended:
                    batch.drop(member)
                    del running[member]

    def _begun(self, session: ClientSession) -> Iterator[int]:
        """The prompts that can be answered."""
        for index, each in enumerate(self._asked):
            try:
                start = Prompt.read(session.lowered, each.text, each.ids)
            except ConfigError as error:
                remedy = error.remedy
                each.error = ConfigError(f"prompt {index} of the list: {error.message}", remedy=remedy, code=error.code)
                continue
            each.ids = start.ids
            each.reply = Reply(len(start.ids), start.tokenizer, self._wanted)
            yield index

    def _enter(self, batch: Batch, running: dict[Member, int], index: int) -> None:
        asked = self._asked[index]
        assert asked.reply is not None and asked.ids is not None
        if asked.cancelled:
            asked.reply.finish_reason = CANCELLED
            return
        member = asked.member = batch.join()
        running[member] = index
        batch.ask(member, asked.reply, asked.ids)

    def _leave(self, batch: Batch, running: dict[Member, int], member: Member) -> None:
        asked = self._asked[running.pop(member)]
        batch.drop(member)
        if asked.reply is not None:
            asked.reply.finish_reason = CANCELLED
