"""Links between the processes of one training, by which each notices at once that another is gone.

JAX's client aborts its process, with a dump of its stack, as soon as its connection to the first process breaks, and
it learns of the end of any other process by heartbeats alone. So it speaks through a link, and sees none of this:

    JAX's client ── link of process k ══ link of process 0 ── JAX's coordination service
       127.0.0.1                    the given address                   127.0.0.1

Each process k > 0 has one link, a TCP connection to process 0, which the kernel closes however a process ends. A link
carries frames: the length in 4 bytes, then so many of JAX's bytes. A frame of length 0 is a sign of life; three lengths
that no frame has are notices. Process 0 ends when any other process is gone, and all others when it is. JAX is asked
when all have come: of who does not come, too, its client knows no other end than an abort.
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
_MOST = 1 << 16
_NOTICES = _READY, _LEAVING, _FAILED = ((1 << 32) - 1, (1 << 32) - 2, (1 << 32) - 3)
_BEAT_S = 5.0
SILENCE_S = 60.0
"""How long a process may give no sign of life, as on a host that is lost or stopped."""
_GRACE_S = 10.0
"""How long a process may take to meet by itself what another one has said it ends by."""
_RETRY_S = 0.1
_HELLO_S = 10.0


class Links:
    """All links of this process; `lost` is called with a reason, and must end the process."""

    def __init__(self, count: int, number: int, lost: Callable[[str], object]):
        self.count, self.number = count, number
        self._lost = lost
        self._links: dict[int, _Link] = {}
        self._ready, self._left = threading.Event(), threading.Event()
        atexit.register(self._leave)  # before JAX's own good-bye, which was registered earlier
        _start(self._beat)

    def serve(self, server: socket.socket, service: tuple[str, int], patience_s: float) -> None:
        """Waits for the link of every other process, by process 0, which JAX's service has to follow at once.

        Raises TimeoutError if one does not come.
        """
        _start(self._accept, server, service)
        end = time.monotonic() + patience_s
        while missing := [str(n) for n in range(1, self.count) if n not in self._links]:
            if time.monotonic() > end:
                raise TimeoutError(f"process {', '.join(missing)} did not come within {patience_s:g} s")
            time.sleep(_RETRY_S)
        self._send_all(_READY)

    def dial(self, address: tuple[str, int], patience_s: float) -> tuple[str, int]:
        """Connects to process 0, by another process, waits for all, and returns where JAX's client finds its service.

        Raises OSError if process 0 is not there in time.
        """
        link = _Link(_retried(lambda: self._greeted(address), patience_s), 0)
        self._links[0] = link
        _start(self._follow, link)
        if not self._ready.wait(patience_s):
            raise TimeoutError(f"it still waits for others after {patience_s:g} s")
        server = socket.create_server(("127.0.0.1", 0))
        _start(self._wait_for_client, server, link)
        host, port = server.getsockname()
        return host, port

    def fail(self) -> None:
        """Tells the others that this process ends by an error, which they may meet by themselves."""
        self._send_all(_FAILED)

    def _greeted(self, address: tuple[str, int]) -> socket.socket:
        connection = socket.create_connection(address, timeout=_HELLO_S)
        try:
            connection.sendall(_HELLO.pack(b"trimask1", self.count, self.number))
            if connection.recv(_LENGTH.size, socket.MSG_WAITALL) != _LENGTH.pack(0):
                raise ConnectionError("it does not accept this process as one of its training")
        except OSError:
            connection.close()
            raise
        return connection

    def _accept(self, server: socket.socket, service: tuple[str, int]) -> None:
        while True:
            connection, _ = server.accept()
            _start(self._welcome, connection, service)

    def _welcome(self, connection: socket.socket, service: tuple[str, int]) -> None:
        try:
            connection.settimeout(_HELLO_S)
            hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
            number = _HELLO.unpack(hello)[2] if len(hello) == _HELLO.size else 0
            link = _Link(connection, number)
            is_known = hello == _HELLO.pack(b"trimask1", self.count, number) and 0 < number < self.count
            if not is_known or self._links.setdefault(number, link) is not link:
                raise ConnectionError("a stranger, or a process that is there already")
        except OSError:
            connection.close()
            return
        with suppress(OSError):  # `_follow` notices
            link.send(0)
        self._follow(link, service)

    def _wait_for_client(self, server: socket.socket, link: "_Link") -> None:
        with server:
            link.local, _ = server.accept()
        _pump(link.local, link)

    def _follow(self, link: "_Link", service: tuple[str, int] | None = None) -> None:
        """Hands JAX's bytes on until the other process is gone; JAX's side is not closed then, and does not notice."""
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
                    with suppress(OSError):  # it may have said good-bye
                        link.local.sendall(frame)
        except OSError as error:
            if not (is_leaving and self._left.wait(_GRACE_S)):
                self._lost(str(error))

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            self._send_all(0)

    def _leave(self) -> None:
        self._left.set()
        self._send_all(_LEAVING)

    def _send_all(self, notice: int) -> None:
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
        """Sends a frame, a notice, or with length 0 a sign of life."""
        with self._lock:
            self._connection.sendall(_LENGTH.pack(length) + content)

    def frames(self) -> Iterator[bytes | int]:
        """Contents of frames, and notices; raises OSError when the other process is gone or silent."""
        gone = ConnectionError(f"the connection to process {self.peer} ended")
        try:
            with self._connection.makefile("rb") as file:
                while True:
                    head = file.read(_LENGTH.size)
                    (length,) = _LENGTH.unpack(head) if len(head) == _LENGTH.size else (None,)
                    if length in _NOTICES:
                        yield length
                    elif length is None or length > _MOST:
                        raise gone
                    elif length:
                        yield file.read(length)
        except TimeoutError:
            raise TimeoutError(f"process {self.peer} gave no sign of life for {SILENCE_S:g} s") from None
        except OSError:
            raise gone from None


def _pump(local: socket.socket, link: _Link) -> None:
    """Hands on what JAX's side says, until it closes or the other process is gone, which `_follow` notices."""
    local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        while content := local.recv(_MOST):
            link.send(len(content), content)


def _retried(connect: Callable[[], socket.socket], patience_s: float) -> socket.socket:
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
