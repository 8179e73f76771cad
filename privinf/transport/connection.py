"""A TLS connection between two parties: the pump that sends and receives at the same time, and the heartbeat.

The caller's own thread moves the bytes: no other thread is on the way of a message. A small daemon thread sends a heartbeat
when nothing was sent for a while, so that a party that computes for long still shows a sign of life; it takes the lock only when it is
free, since whoever holds it is in the pump and sends heartbeats itself.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque

from privinf.transport.endpoint import Endpoint, Want
from privinf.transport.frames import (
    CONTROL,
    CONTROL_LIMIT,
    DATA,
    HANDSHAKE_MAX_FRAME,
    MAX_FRAME,
    FrameKind,
    FrameReader,
    Header,
    pack_header,
    pieces,
)
from privinf.transport.patience import Patience
from privinf.transport.shaper import Link
from privinf.transport.tls import WRITE_CHUNK, TlsStream, expiry_of, fingerprint, linger, reason_of, role_of, subject_of, tls_failure
from protocols.errors import PrivinfError, TransportError

HEARTBEAT_S = 2.0
BACKLOG = MAX_FRAME
"""What may wait that nobody has asked for yet, bytes, and one frame more: taken in while a send is blocked, so that two senders do not
block each other. The protocols need one message: who sends the next one has received the one that we are sending."""
_UNASKED = 2 * HANDSHAKE_MAX_FRAME
"""What a peer may send until its first message is whole, bytes."""
_CLOSE_S = 1.0
_HEARTBEAT = pack_header(0, FrameKind.HEARTBEAT, 0, 0, 0)


class Connection(Endpoint):
    """One end of a TLS connection whose handshake is done; made by `listener.dial` and by `door.Door`.

    Its attributes are the state of one pump under one lock: parts of it would have to share the lock, and each message would pay for that.
    """

    def __init__(
        self,
        stream: TlsStream,
        *,
        party: str,
        peer_name: str,
        timeout: float,
        silence_s: float | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        link: Link | None = None,
    ) -> None:
        certificate = stream.tls.getpeercert(binary_form=True)
        super().__init__(
            party=party,
            peer_role=role_of(stream.tls.getpeercert()),
            peer_fingerprint=fingerprint(certificate or b""),
            peer_name=peer_name,
            timeout=timeout,
            silence_s=silence_s,
            link=link,
            meter=stream.meter,
        )
        self.peer_subject, self.peer_until = subject_of(stream.tls.getpeercert()), expiry_of(stream.tls.getpeercert())
        self.heartbeat_s = heartbeat_s
        self._stream = stream
        own = weakref.ref(self)  # no cycle: what a connection holds goes when it is dropped, not when the collector comes
        self._reader = FrameReader(lambda header: _admit(own, header))
        self._poll = select.poll()
        self._poll.register(stream.sock, select.POLLIN)
        self._events = select.POLLIN
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread in the pump
        self._mid_send = False  # part of a frame is out: nothing else may be sent before its rest
        self._lost: PrivinfError | None = None  # why nothing can be received any more
        self._closing = self._closed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_beat, args=(weakref.ref(self), self._stop, heartbeat_s / 4), name=f"heartbeat-{peer_name}", daemon=True
        )
        self._greeted = stream.raw_received

    def begin(self) -> Connection:
        """It is to be used now: heartbeats go out, until it is closed."""
        self._thread.start()
        return self

    @property
    def raw_sent(self) -> int:
        """Bytes that the socket took, all in all; the meter's cells add up to it."""
        return self._stream.raw_sent

    @property
    def raw_received(self) -> int:
        """Bytes that the socket gave, all in all; the meter's cells add up to it."""
        return self._stream.raw_received

    def lost(self) -> bool:
        """Whether it has ended, by what has come so far; does not wait. For an end that has lain unused and is to be used again."""
        with self._lock:
            try:
                self._owner = threading.get_ident()
                if self._closing or self._interruption:
                    return True
                self._catch_up()
                ends = any(frame.header.kind in (FrameKind.ERROR, FrameKind.GOODBYE) for frame in self._inbox)
                return ends or self._stream.ended or self._lost is not None
            except (OSError, PrivinfError):
                return True
            finally:
                self._owner = None

    def heard(self) -> bool:
        """Whether the first message has come, or a whole frame of it; does not wait. Raises what a wait for it would raise."""
        try:
            self._stream.pull(HANDSHAKE_MAX_FRAME // 4)
        except OSError as error:
            raise self._broken(error) from None
        while not self._inbox and self._decode():
            pass
        if self._inbox:
            if self._inbox[0].header.kind not in (CONTROL, DATA):
                self._take(Want(CONTROL, None, CONTROL_LIMIT))
            return True
        if self._stream.ended:
            raise self._lost or self._ended()
        if self._stream.raw_received > self._greeted + _UNASKED:
            raise self.failure(TransportError, "the peer sends without end and no message", "look at the peer")
        return False

    def _catch_up(self) -> None:
        """Takes in what has come, up to the backlog, for a second at most: of a peer, say, that sends heartbeats faster than we read."""
        ends = time.monotonic() + _CLOSE_S
        while True:
            while self._decode():
                pass
            if self._backlog >= BACKLOG or time.monotonic() > ends or not self._stream.pull():
                return

    # ---- the pump

    def _transfer(self, frames: list[tuple[bytes, memoryview]], want: Want | None) -> memoryview | None:
        with self._lock:  # by this statement, which a signal's exception cannot leave with the lock held
            try:
                self._owner = threading.get_ident()
                if self._closing or self._interruption:
                    raise self._ended()
                self._want = want
                return self._pump(pieces(frames), want)
            except OSError as error:
                raise self._broken(error) from None
            finally:
                self._want = self._owner = None

    def _pump(self, out: deque[memoryview], want: Want | None) -> memoryview | None:
        stream, start = self._stream, time.monotonic()
        waits = Patience(self, stream, self._reader, self._shaper, start)
        message = None if want is None else self._collect(want)
        if out and self._mid_send:
            raise self.failure(TransportError, "an earlier message was cut off in the middle; nothing more can be sent")
        while True:
            done = want is None or message is not None
            blocked = self._send_some(out, until_blocked=done)
            sending = bool(out) or stream.unsent
            if done and not sending:
                return message
            pause = 0.0 if sending and not blocked else waits.pause()
            held = None if done else self._held_for()
            if held is not None:
                pause = min(pause, held)
            readable = self._wait(pause, reading=self._backlog < BACKLOG, writing=blocked)
            now = time.monotonic()
            if self._interruption:  # before TLS sees the end that we made ourselves, and would send no more
                raise self._ended()
            if readable:
                stream.pull()
                if done:
                    self._read_ahead()
            if not done and want is not None:
                message = self._collect(want)
            if message is None or sending:
                waits.judge(now, readable=readable, sending=sending, held=not done and self._held_for() is not None)
            if not sending and message is None and not self._mid_send and now - stream.last_sent >= self.heartbeat_s:
                out.append(memoryview(_HEARTBEAT))

    def _send_some(self, out: deque[memoryview], *, until_blocked: bool) -> bool:
        """Encrypts and sends a chunk, or if `until_blocked` all that the socket takes; True if the socket would block."""
        stream = self._stream
        while out or stream.unsent:
            if not stream.unsent:
                piece = out.popleft()
                if len(piece) > WRITE_CHUNK:
                    out.appendleft(piece[WRITE_CHUNK:])
                    piece = piece[:WRITE_CHUNK]
                self._mid_send = True
                stream.encrypt(piece)
                self._mid_send = bool(out)
            if not stream.push():
                return True
            if not until_blocked:
                break
        return False

    def _collect(self, want: Want) -> memoryview | None:
        """The wanted message if all of it has come: decrypts no further than that."""
        while True:
            message = self._take(want)
            if message is not None:
                return message
            if not self._decode():
                if self._stream.ended and not self._inbox:
                    self._lost = self._lost or self._ended()
                if self._lost and not self._inbox:
                    raise self._lost
                return None

    def _read_ahead(self) -> None:
        """Takes in what came while a send is blocked, so that the peer's own send gets on; an error report is raised at once."""
        while self._decode():
            pass
        self._raise_reported()
        if self._lost or self._stream.ended:
            raise self._lost or self._ended()

    def _decode(self) -> bool:
        """Decrypts up to the end of the next frame that counts; False if that has not come yet."""
        stream, reader = self._stream, self._reader
        if self._lost or self._backlog >= BACKLOG or not (stream.buffered or stream.ended):
            return False
        try:
            while True:
                count = stream.read_into(reader.target())
                if not count:
                    return False
                frame = reader.advance(count)
                if frame is not None and self._arrived(frame):
                    return True
        except ssl.SSLError as error:
            self._lost = self._tls_error(error)
        except PrivinfError as error:
            # out of step for good: whatever follows cannot be read as frames
            self._lost = error if error.party else self.failure(type(error), error.message, error.remedy)
        if self._inbox:
            return False
        raise self._lost

    def _wait(self, pause: float, *, reading: bool, writing: bool) -> bool:
        """Waits at most `pause` seconds for the socket; True if there is something to read."""
        events = (select.POLLIN if reading else 0) | (select.POLLOUT if writing else 0)
        if events != self._events:
            self._poll.modify(self._stream.sock, events)
            self._events = events
        if pause <= 0:
            ready = self._poll.poll(0)
        else:
            began = time.perf_counter()
            if pause < 0.001:  # poll counts in whole milliseconds; only an emulated link waits for less
                time.sleep(pause)
                ready = self._poll.poll(0)
            else:
                ready = self._poll.poll(int(pause * 1000))
            self.meter.current.seconds += time.perf_counter() - began
        return bool(ready) and bool(ready[0][1] & ~select.POLLOUT)

    # ---- what goes wrong

    def _ended(self) -> PrivinfError:
        if error := self._interrupted():
            return error
        if self._closing:
            return self.failure(TransportError, "this connection was closed at this end")
        where = " in the middle of a message" if self._reader.mid_frame or self._parts else ""
        return self.failure(TransportError, f"the peer closed the connection{where}", "look at the peer's output for the reason")

    def _broken(self, error: OSError) -> PrivinfError:
        """The socket failed, most often since the peer closed it: what it sent before may say why."""
        if not self._closing:
            with contextlib.suppress(OSError, PrivinfError):
                self._catch_up()
            try:
                self._raise_reported()
            except PrivinfError as reported:
                return reported
        if self._closing or isinstance(error, ConnectionError):
            return self._ended()
        return self.failure(TransportError, f"the connection broke: {error.strerror or error}", "check the network between the machines")

    def _tls_error(self, error: ssl.SSLError) -> PrivinfError:
        if not self._established:
            peer = f"{self.peer_role} {self.peer_name}"
            return tls_failure(error, party=self.party, peer=peer, dialled=not self._stream.tls.server_side)
        return self.failure(TransportError, f"the TLS stream is damaged ({reason_of(error)})", "start the session anew")

    # ---- heartbeat, greeting, end

    def _heartbeat(self) -> bool:
        """Called by the heartbeat thread; False when there is nothing left to do."""
        if self._closing:
            return False
        if time.monotonic() - self._stream.last_sent < self.heartbeat_s or not self._lock.acquire(blocking=False):
            return True
        try:
            if self._closing:
                return False
            if not self._mid_send and not self._stream.unsent:
                self._stream.encrypt(_HEARTBEAT)
            self._stream.push()
            return True
        except (OSError, ssl.SSLError):
            return False  # the peer has gone: the next wait says so, with the reason if it left one
        finally:
            self._lock.release()

    def greet(self) -> None:
        """Tells the peer that its certificate was accepted, which in TLS 1.3 it cannot see otherwise."""
        self._transfer([(_HEARTBEAT, memoryview(b""))], None)

    def await_greeting(self) -> None:
        """Waits for `greet`; raises HandshakeError with the peer's reason if it refused us instead."""
        self._transfer([], Want(FrameKind.HEARTBEAT, None, 0))

    def close(self, goodbye: bool = True) -> None:
        if self._closed:
            return
        self._closing = True
        self._stop.set()
        if self._owner == threading.get_ident():
            # a signal handler or a finalizer inside our own pump: all that can be done is to make it fail
            self._shut()
            return
        if not self._lock.acquire(timeout=0.5 if self._owner is None else 0):  # no owner: the heartbeat has it, for microseconds
            self._shut()  # wakes the thread in the pump
            self._lock.acquire()
        try:
            if not self._closed:
                self._closed = True
                self._part(goodbye)
        finally:
            self._lock.release()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S)

    def _part(self, goodbye: bool) -> None:
        stream = self._stream
        with contextlib.suppress(OSError, ssl.SSLError):
            if not self._mid_send and not stream.unsent:
                if goodbye:
                    stream.encrypt(pack_header(0, FrameKind.GOODBYE, 0, 0, 0))
                with contextlib.suppress(ssl.SSLError):
                    stream.tls.unwrap()  # close_notify
                stream.push()
            stream.sock.shutdown(socket.SHUT_WR)
            dropped = linger(stream.sock, _CLOSE_S)
            stream.raw_received += dropped
            self.meter.current.received += dropped
        stream.sock.close()

    def leave(self) -> socket.socket:
        """Ends it but for the socket, on which the peer's kernel may not have all yet: the caller lingers there, and closes it."""
        self._closing = self._closed = True
        self._stop.set()
        return self._stream.sock

    def _shut(self, how: int = socket.SHUT_RDWR) -> None:
        with contextlib.suppress(OSError):
            self._stream.sock.shutdown(how)

    def _wake(self) -> None:
        self._shut(socket.SHUT_RD)

    def __del__(self) -> None:
        stop = getattr(self, "_stop", None)  # absent if __init__ failed
        if stop is not None:
            stop.set()


def _admit(own: weakref.ref[Connection], header: Header) -> None:
    connection = own()
    assert connection is not None  # the reader is its connection's alone
    connection._admit(header)


def _beat(ref: weakref.ref[Connection], stop: threading.Event, period: float) -> None:
    """The heartbeat thread. It holds no reference to the connection between beats, so that one that is dropped can be collected."""
    while not stop.wait(period):
        connection = ref()
        if connection is None or not connection._heartbeat():
            return
        del connection
