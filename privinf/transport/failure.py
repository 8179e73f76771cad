"""A failure as data: the one record, and its one codec, for a peer and for the process that started this one."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from protocols.errors import Code, Heard, PrivinfError, RefusedError, kind_of

_TEXT_CHARS = 500
_NAME_CHARS = 200
_LONGEST_S = 2**31


def one_line(text: str, limit: int = _TEXT_CHARS) -> str:
    """Text of a stranger, fit for a terminal and a log: printable, one line, at most `limit` characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:limit]


class Failure(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What went wrong: `code` is for programs, `text` for people, `retry` in seconds as `PrivinfError.retry_after`.

    `who` says it, `about` is its peer, and `fault` the party for which that peer spoke. Of what a peer sends only `code`, `text`, `about`
    and `retry` are looked at: who says it is in its certificate, and the rest is not its to say.
    """

    code: Code
    text: str
    who: str = ""
    about: str = ""
    retry: Annotated[int, msgspec.Meta(ge=0, le=_LONGEST_S)] | None = None
    remedy: str = ""
    layer: str = ""
    heard: Heard = Heard.HERE
    reason: str = ""
    fault: str = ""

    @classmethod
    def of(cls, error: PrivinfError) -> Failure:
        """All of an error but its cause."""
        again = None if error.retry_after is None else min(error.retry_after, _LONGEST_S)
        where = {"who": error.party, "about": error.peer, "layer": error.layer}
        return cls(
            error.code, error.message, **where, retry=again, remedy=error.remedy, heard=error.heard, reason=error.reason, fault=error.fault
        )

    def error(self) -> PrivinfError:
        """The inverse; the class follows from the code and from who found it."""
        where = {"layer": self.layer, "party": self.who, "peer": self.about}
        error = kind_of(self.code, self.heard)(self.text, **where, remedy=self.remedy, code=self.code, retry_after=self.retry)
        error.heard, error.reason, error.fault = self.heard, self.reason, self.fault
        return error

    def plain(self) -> Any:
        """Values that JSON has."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_plain(cls, values: Any) -> Failure:
        """The inverse."""
        return msgspec.convert(values, cls)

    def for_peer(self) -> bytes:
        """What a peer may know, within bounds that it accepts; far below ERROR_LIMIT."""
        told = Failure(self.code, one_line(self.text), about=one_line(self.about, _NAME_CHARS), retry=self.retry)
        return msgspec.msgpack.encode(told)

    @classmethod
    def from_peer(cls, body: bytes | memoryview) -> Failure:
        """What a peer says, within our bounds; where it says nothing that we can read, just that it gives up."""
        try:
            said = msgspec.msgpack.decode(body, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            said = cls(Code.OTHER, "")
        text = one_line(said.text) or "no reason given"
        return cls(said.code, text, about=one_line(said.about, _NAME_CHARS), retry=said.retry)

    def heard_by(self, who: str, peer: str, layer: str, *, established: bool) -> Failure:
        """What a peer said, as the party that was told has it from there on."""
        heard = Heard.SESSION if established else Heard.OPENING
        gave_up = established and not issubclass(kind_of(self.code, heard), RefusedError)
        text = f"the peer {'gave up' if gave_up else 'refused'}: {self.text}"
        return Failure(self.code, text, who, peer, self.retry, layer=layer, heard=heard, reason=self.text, fault=self.about or peer)
