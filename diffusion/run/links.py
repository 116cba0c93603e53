"""TCP links between the processes of one training, so that each notices immediately when another is gone.

JAX's client aborts its process, with a stack dump, as soon as its connection to process 0 breaks, and learns of the end
of any other process only through heartbeats. So its traffic is relayed through a link, which hides all of this from it:

    JAX's client ── link of process k ══ link of process 0 ── JAX's coordination service
       127.0.0.1                    the given address                   127.0.0.1

Each process k > 0 has one link, a TCP connection to process 0, which the kernel closes however a process ends. A link
carries frames: a length in 4 bytes, followed by that many bytes from JAX. A frame of length 0 is a sign of life
(heartbeat); three lengths that no frame can have are notices. Process 0 ends when any other process is gone, and all
others end when process 0 is. JAX is started only after all processes have connected, because its client would abort as
well if one never came.
"""

import atexit
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

_HELLO = struct.Struct(">8sII")  # "trimask1", the number of processes, and which of them this is
_LENGTH = struct.Struct(">I")
_MAX_FRAME = 1 << 16
_NOTICES = _READY, _LEAVING, _FAILED = ((1 << 32) - 1, (1 << 32) - 2, (1 << 32) - 3)
"""Lengths that are notices: all processes have connected; the sender leaves; the sender failed."""
_BEAT_S = 5.0
SILENCE_S = 60.0
"""Longest time without a sign of life, as on a lost or suspended host, in seconds."""
_GRACE_S = 10.0
"""Time for a process to meet the error by itself that another one has announced, in seconds."""
_RETRY_S = 0.1
_HELLO_S = 10.0


class Links:
    """All links of this process; `lost` is called with a reason if another process is gone, and must end this one."""

    def __init__(self, count: int, number: int, lost: Callable[[str], object]):
        self.count, self.number = count, number
        self._lost = lost
        self._links: dict[int, _Link] = {}
        self._ready, self._left = threading.Event(), threading.Event()
        atexit.register(self._leave)  # runs before JAX's own exit handler, which was registered earlier
        _start(self._beat)

    def serve(self, server: socket.socket, service: tuple[str, int], patience_s: float) -> None:
        """On process 0: waits until every other process has connected; JAX's service must be started right afterwards.

        `service` is the address of JAX's coordination service. Raises TimeoutError if a process does not connect within
        `patience_s` seconds.
        """
        _start(self._accept, server, service)
        end = time.monotonic() + patience_s
        while missing := [str(n) for n in range(1, self.count) if n not in self._links]:
            if time.monotonic() > end:
                raise TimeoutError(f"process {', '.join(missing)} did not connect within {patience_s:g} s")
            time.sleep(_RETRY_S)
        self._send_all(_READY)

    def dial(self, address: tuple[str, int], patience_s: float) -> tuple[str, int]:
        """On the other processes: connects to process 0, waits for all, and returns the local address for JAX's client.

        Raises OSError if process 0 cannot be reached, or TimeoutError if others are missing, after `patience_s`
        seconds.
        """
        link = _Link(_retried(lambda: self._greeted(address), patience_s), 0)
        self._links[0] = link
        _start(self._follow, link)
        if not self._ready.wait(patience_s):
            raise TimeoutError(f"it is still waiting for other processes after {patience_s:g} s")
        server = socket.create_server(("127.0.0.1", 0))
        _start(self._wait_for_client, server, link)
        host, port = server.getsockname()
        return host, port

    def fail(self) -> None:
        """Tells the other processes that this one ends with an error, which they may run into themselves."""
        self._send_all(_FAILED)

    def _greeted(self, address: tuple[str, int]) -> socket.socket:
        """Opens a connection to process 0 and waits until it accepts this process."""
        connection = socket.create_connection(address, timeout=_HELLO_S)
        try:
            connection.sendall(_HELLO.pack(b"trimask1", self.count, self.number))
            if connection.recv(_LENGTH.size, socket.MSG_WAITALL) != _LENGTH.pack(0):
                raise ConnectionError("it does not accept this process as part of its training")
        except OSError:
            connection.close()
            raise
        return connection

    def _accept(self, server: socket.socket, service: tuple[str, int]) -> None:
        """Accepts connections forever, each in a thread of its own."""
        while True:
            connection, _ = server.accept()
            _start(self._welcome, connection, service)

    def _welcome(self, connection: socket.socket, service: tuple[str, int]) -> None:
        """Checks the greeting of a connecting process, then follows its link; strangers and duplicates are refused."""
        try:
            connection.settimeout(_HELLO_S)
            hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
            number = _HELLO.unpack(hello)[2] if len(hello) == _HELLO.size else 0
            link = _Link(connection, number)
            is_known = hello == _HELLO.pack(b"trimask1", self.count, number) and 0 < number < self.count
            if not is_known or self._links.setdefault(number, link) is not link:
                raise ConnectionError("an unknown process, or one that is already connected")
        except OSError:
            connection.close()
            return
        with suppress(OSError):  # `_follow` notices
            link.send(0)
        self._follow(link, service)

    def _wait_for_client(self, server: socket.socket, link: "_Link") -> None:
        """Relays the bytes of JAX's client once it has connected."""
        with server:
            link.local, _ = server.accept()
        _pump(link.local, link)

    def _follow(self, link: "_Link", service: tuple[str, int] | None = None) -> None:
        """Relays frames to JAX until the other process is gone; JAX's side stays open, so that JAX does not notice."""
        is_leaving = False
        try:
            for frame in link.frames():
                if frame == _READY:
                    self._ready.set()
                elif frame == _LEAVING:
                    is_leaving = True
                elif frame == _FAILED:
                    time.sleep(_GRACE_S)
                    raise ConnectionError(f"process {link.peer} failed")
                elif isinstance(frame, bytes):
                    if link.local is None and service is not None:
                        link.local = _retried(lambda: socket.create_connection(service), SILENCE_S)
                        _start(_pump, link.local, link)
                    assert link.local is not None  # JAX's client speaks first
                    with suppress(OSError):  # JAX may have closed its side
                        link.local.sendall(frame)
        except OSError as error:
            if not (is_leaving and self._left.wait(_GRACE_S)):
                self._lost(str(error))

    def _beat(self) -> None:
        """Sends a sign of life over all links every few seconds."""
        while True:
            time.sleep(_BEAT_S)
            self._send_all(0)

    def _leave(self) -> None:
        """Announces, at exit, that this process ends normally."""
        self._left.set()
        self._send_all(_LEAVING)

    def _send_all(self, notice: int) -> None:
        """Sends a notice, or a sign of life, over all links."""
        for link in list(self._links.values()):
            with suppress(OSError):  # `_follow` notices
                link.send(notice)


class _Link:
    """One end of a connection to another process."""

    def __init__(self, connection: socket.socket, peer: int):
        connection.settimeout(SILENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self.local: socket.socket | None = None  # to JAX's client or service
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, length: int, content: bytes = b"") -> None:
        """Sends a frame, a notice, or (with length 0) a sign of life."""
        with self._lock:
            self._connection.sendall(_LENGTH.pack(length) + content)

    def frames(self) -> Iterator[bytes | int]:
        """Yields contents of frames, and notices. Raises OSError when the other process is gone or silent."""
        gone = ConnectionError(f"the connection to process {self.peer} ended")
        try:
            with self._connection.makefile("rb") as file:
                while True:
                    head = file.read(_LENGTH.size)
                    (length,) = _LENGTH.unpack(head) if len(head) == _LENGTH.size else (None,)
                    if length in _NOTICES:
                        yield length
                    elif length is None or length > _MAX_FRAME:
                        raise gone
                    elif length:
                        yield file.read(length)
        except TimeoutError:
            raise TimeoutError(f"process {self.peer} gave no sign of life for {SILENCE_S:g} s") from None
        except OSError:
            raise gone from None


def _pump(local: socket.socket, link: _Link) -> None:
    """Relays what JAX's side sends, until it closes; if the other process is gone, `_follow` notices."""
    local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        while content := local.recv(_MAX_FRAME):
            link.send(len(content), content)


def _retried(connect: Callable[[], socket.socket], patience_s: float) -> socket.socket:
    """Tries to connect again and again, and raises the last OSError after `patience_s` seconds."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return connect()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(_RETRY_S)


def _start(target: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()
