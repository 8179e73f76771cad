"""Sockets from one process to another: the one that listens hands each connection, untouched, to the one that is to serve it."""

from __future__ import annotations

import array
import errno
import os
import socket

_SIZE = array.array("i").itemsize


def channel() -> tuple[socket.socket, socket.socket]:
    """The end of who hands over, which never waits, and the end of who takes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def hand(end: socket.socket, sock: socket.socket) -> bool:
    """Hands a connection over, and lets go of it; False, and it stays ours, where the other end takes none at present."""
    try:
        socket.send_fds(end, [b"x"], [sock.fileno()])
    except OSError:
        return False
    sock.close()
    return True


class Handed:
    """What a `Listener` listens on in a process that is handed its connections; `name` is the address that peers know.

    `keep` holds the other end open here too, so that a process that hands nothing over any more, being gone, wakes nobody for nothing.
    """

    def __init__(self, end: socket.socket, name: str, keep: socket.socket | None = None) -> None:
        self._end, self.name, self._keep = end, name, keep

    def fileno(self) -> int:
        """To wait on."""
        return self._end.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        """As a listening socket that does not block."""
        data, rest, _, _ = self._end.recvmsg(1, socket.CMSG_SPACE(_SIZE))
        found = array.array("i")
        for level, kind, content in rest:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(content[: len(content) - len(content) % _SIZE])
        if not found:  # the kernel had no descriptor left for it, or nobody is there to hand anything over
            raise BlockingIOError if not data else OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        sock = socket.socket(fileno=found[0])
        try:
            return sock, sock.getpeername()
        except OSError as error:  # it has gone meanwhile
            sock.close()
            raise OSError(errno.ECONNABORTED, "the peer has gone") from error

    def close(self) -> None:
        """May be called again."""
        self._end.close()
        if self._keep is not None:
            self._keep.close()
