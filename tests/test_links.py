"""Links between processes, all within one process here: what they relay, and what they notice."""

import socket
import threading
import time
from contextlib import suppress

import pytest

from trimask.diffusion.run import links as our_links
from trimask.diffusion.run.links import Links


class Ends:
    """Links of the processes 0 and 1, a service behind the first, and the reason with which each noticed a loss."""

    def __init__(self):
        self.reasons: dict[int, str] = {}
        self.service = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._echo, daemon=True).start()
        server = socket.create_server(("127.0.0.1", 0))
        self.address = server.getsockname()
        self.links = [Links(2, n, lambda reason, n=n: self.reasons.setdefault(n, reason)) for n in range(2)]
        serve = self.links[0].serve
        threading.Thread(target=serve, args=(server, self.service.getsockname(), 5.0), daemon=True).start()

    def _echo(self):
        with suppress(OSError):
            client, _ = self.service.accept()
            while content := client.recv(1 << 16):
                client.sendall(content)

    def client(self) -> socket.socket:
        """Socket of the client of JAX in process 1."""
        return socket.create_connection(self.links[1].dial(self.address, 5.0), timeout=5)

    def reason(self, number: int) -> str:
        end = time.monotonic() + 5
        while number not in self.reasons and time.monotonic() < end:
            time.sleep(0.01)
        return self.reasons[number]

    def cut(self, number: int) -> None:
        """Closes the connection, as the kernel does when the process ends."""
        (link,) = self.links[number]._links.values()
        link._connection.shutdown(socket.SHUT_RDWR)


def test_a_link_carries_all_bytes_in_order_and_outlives_silence_of_jax(monkeypatch):
    monkeypatch.setattr(our_links, "SILENCE_S", 0.4)
    monkeypatch.setattr(our_links, "_BEAT_S", 0.05)
    ends = Ends()
    with ends.client() as client, client.makefile("rb") as file:
        sent = bytes(range(256)) * 4000
        threading.Thread(target=client.sendall, args=(sent,)).start()
        assert file.read(len(sent)) == sent
        time.sleep(1)
        client.sendall(b"more")
        assert file.read(4) == b"more" and ends.reasons == {}


def test_a_process_that_ends_is_missed_and_jax_does_not_notice():
    ends = Ends()
    with ends.client() as client:
        client.sendall(b"here")
        assert client.recv(4) == b"here"
        ends.cut(0)
        assert ends.reason(1) == "the connection to process 0 ended"
        assert ends.reason(0) == "the connection to process 1 ended"
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_process_that_gives_no_sign_of_life_is_missed(monkeypatch):
    monkeypatch.setattr(our_links, "SILENCE_S", 0.3)
    ends = Ends()
    with ends.client():
        assert ends.reason(1) == "process 0 gave no sign of life for 0.3 s"


def test_a_process_that_fails_leaves_the_others_time_to_fail_by_themselves(monkeypatch):
    monkeypatch.setattr(our_links, "_GRACE_S", 0.5)
    ends = Ends()
    with ends.client():
        ends.links[1].fail()
        ends.cut(1)
        time.sleep(0.2)
        assert 0 not in ends.reasons
        assert ends.reason(0) == "process 1 failed"


@pytest.mark.parametrize("leaving", [(0, 1), (1,)])
def test_who_leaves_is_missed_only_by_who_stays(monkeypatch, leaving):
    monkeypatch.setattr(our_links, "_GRACE_S", 0.2)
    ends = Ends()
    with ends.client():
        for number in leaving:
            ends.links[number]._leave()
        time.sleep(0.1)
        ends.cut(1)
        time.sleep(0.5)
    assert (0 in ends.reasons) == (leaving == (1,))


def test_strangers_are_turned_away_and_not_missed():
    ends = Ends()
    with ends.client() as client:
        for hello in (b"GET / HTTP/1.1\r\n\r\n", our_links._HELLO.pack(b"trimask1", 2, 1), b""):
            with socket.create_connection(ends.address, timeout=5) as stranger:
                stranger.sendall(hello)
                with suppress(OSError):  # turned away already
                    stranger.shutdown(socket.SHUT_WR)
                    assert stranger.recv(1) == b""
        client.sendall(b"here")
        assert client.recv(4) == b"here" and ends.reasons == {}
    with pytest.raises(ConnectionError, match="does not accept this process"):
        Links(3, 2, print).dial(ends.address, 0.0)


def test_a_process_that_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"process 1, 2 did not connect within 0 s"):
        Links(3, 0, print).serve(socket.create_server(("127.0.0.1", 0)), ("127.0.0.1", 1), 0.0)
