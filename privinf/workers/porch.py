"""The porch: takes connections in and finds out which worker each is for, without a word to the peer.

Only where sessions have several connections it looks at the first words, which it leaves for the worker to read. Who says nothing
waits here in a room of bounded size and time, as at a worker's own door, and then there.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Callable

from privinf.transport.crowd import Crowd
from privinf.transport.hint import HELLO, read_hint
from privinf.transport.tls import HANDSHAKE_S

ROOM = 1024
"""Those who have said too little."""
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BATCH = 64
_AGAIN_S = 0.02
"""After which first words that came in part are looked at again."""


class Porch:
    """`give` hands a connection on, with its hint, or closes it. `looks`: whether there are hints."""

    def __init__(self, listener: socket.socket, give: Callable[[socket.socket, str], None], *, looks: bool) -> None:
        self._listener, self._give, self.looks = listener, give, looks
        self._silent: Crowd[socket.socket] = Crowd(ROOM, HANDSHAKE_S)
        self._partly: dict[socket.socket, float] = {}  # when to look again
        self._selector = selectors.DefaultSelector()
        self._open = False

    def open(self, wanted: bool) -> None:
        """Takes connections in, or leaves them in the kernel's queue."""
        if wanted != self._open:
            self._open = wanted
            if wanted:
                self._selector.register(self._listener, selectors.EVENT_READ)
            else:
                self._selector.unregister(self._listener)

    def shut(self) -> None:
        """Nobody listens any more: whoever dials is told so at once."""
        self.open(False)
        self._listener.close()

    def watch(self, other: socket.socket) -> None:
        """Ends a `step` when something is heard there."""
        self._selector.register(other, selectors.EVENT_READ, other)

    def forget(self, other: socket.socket) -> None:
        """It is closed next."""
        self._selector.unregister(other)

    def step(self, wait_s: float) -> list[socket.socket]:
        """One round; those watched of which there is something to hear."""
        if self._partly:
            wait_s = min(wait_s, _AGAIN_S)
        heard = []
        for key, _ in self._selector.select(wait_s):
            if key.data is not None:
                heard.append(key.data)
            elif key.fileobj is self._listener:
                self._let_in()
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._silent:
                self._look(key.fileobj)
        for guest in [guest for guest, at in self._partly.items() if at <= time.monotonic()]:
            del self._partly[guest]
            self._look(guest)
        for guest in self._silent.overdue():
            self._let_go(guest)
            self._give(guest, "")  # whose door tells it why it is not served
        return heard

    def _let_in(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if error.errno in NO_ROOM:  # others hold all files
                    time.sleep(_AGAIN_S)
                return
            sock.setblocking(False)
            if not self.looks:
                self._give(sock, "")
                continue
            self._selector.register(sock, selectors.EVENT_READ)
            displaced = self._silent.add(sock, address[0])
            if displaced is not None:
                self._let_go(displaced)
                displaced.close()

    def _look(self, guest: socket.socket) -> None:
        try:
            data = guest.recv(HELLO, socket.MSG_PEEK)
        except BlockingIOError:
            data = b"\x16"
        except OSError:
            data = b""
        hint = read_hint(data) if data else ""
        if hint is None:  # the rest is on its way; what is there would wake us at once
            if guest not in self._partly and guest.fileno() in self._selector.get_map():
                self._selector.unregister(guest)
            self._partly[guest] = time.monotonic() + _AGAIN_S
            return
        self._let_go(guest)
        self._silent.discard(guest)
        if data:
            self._give(guest, hint)
        else:
            guest.close()

    def _let_go(self, guest: socket.socket) -> None:
        self._partly.pop(guest, None)
        if guest.fileno() in self._selector.get_map():
            self._selector.unregister(guest)

    def close(self) -> None:
        """All who wait go home, and nobody listens any more."""
        for guest in self._silent:
            self._let_go(guest)
            guest.close()
        self._selector.close()
        self._listener.close()
