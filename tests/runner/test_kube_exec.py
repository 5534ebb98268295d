"""The exec channel against a server of this machine that speaks as an API server does (v4.channel.k8s.io)."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from kubernetes import client

from runner.channel import LostError
from runner.errors import ClusterError
from runner.kube.errors import ForbiddenError, MissingError, UnreachableError
from runner.kube.exec import Channel, open_exec

pytestmark = pytest.mark.enable_socket
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
SUCCESS = json.dumps({"status": "Success"}).encode()
EXIT_3 = json.dumps(
    {
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": "3"}]},
    }
).encode()
NOT_RUN = json.dumps({"status": "Failure", "reason": "InternalError", "message": "container not found"}).encode()


class Server:
    """One connection after the handshake."""

    def __init__(self, connection: socket.socket, request: bytes) -> None:
        self._connection, self.request = connection, request

    def frame(self, channel: int, data: bytes) -> None:
        self.frames((channel, data))

    def frames(self, *frames: tuple[int, bytes]) -> None:
        """In one piece."""
        lengths = [struct.pack("!BBQ", 0x82, 127, len(data) + 1) for _, data in frames]
        parts = [length + bytes([channel]) + data for length, (channel, data) in zip(lengths, frames, strict=True)]
        self._connection.sendall(b"".join(parts))

    def goodbye(self) -> None:
        self._connection.sendall(b"\x88\x00")

    def receive(self, count: int) -> bytes:
        """So many bytes of stdin."""
        stdin = b""
        while len(stdin) < count:
            payload = self._frame()
            assert payload[0] == 0
            stdin += payload[1:]
        return stdin

    def _frame(self) -> bytes:
        _, length = self._exactly(2)
        length &= 0x7F
        if length >= 126:
            (length,) = struct.unpack("!H" if length == 126 else "!Q", self._exactly(2 if length == 126 else 8))
        mask = self._exactly(4)
        masked = self._exactly(length)
        return bytes(byte ^ mask[i % 4] for i, byte in enumerate(masked))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._connection.recv(count - len(data))
            assert part, "the client has left"
            data += part
        return data


@contextmanager
def serving(answer: Callable[[socket.socket, bytes], None], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server that answers one connection: it is given the socket and the request's head."""
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            connection, _ = listener.accept()
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
            with closing(connection):
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += connection.recv(1)
                answer(connection, head)
        except BaseException as error:
            failures.append(error)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http{'s' * (tls is not None)}://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)
    assert failures == []


@contextmanager
def running(
    script: Callable[[Server], None], command: list[str] | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Channel]:
    """A channel to a server that goes through `script`."""

    def answer(connection: socket.socket, head: bytes) -> None:
        key = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        accept = base64.b64encode(hashlib.sha1(key.partition(b": ")[2] + GUID).digest())
        connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        script(Server(connection, head))

    with serving(answer, tls) as address:
        channel = connect(address, command or ["cat"])
        try:
            yield channel
        finally:
            channel.close()


def connect(address: str, command: list[str]) -> Channel:
    settings = client.Configuration()
    settings.host = address
    settings.verify_ssl = False
    settings.api_key = {"authorization": "token-of-the-user"}
    settings.api_key_prefix = {"authorization": "Bearer"}
    return open_exec(client.ApiClient(settings), "team", "oslo-helper-1", command)


def rest(channel: Channel) -> bytes:
    parts = []
    while part := channel.receive():
        parts.append(part)
    return b"".join(parts)


EVERY_BYTE = bytes(range(256)) * 4


def test_bytes_both_ways() -> None:
    def script(server: Server) -> None:
        assert b"authorization: Bearer token-of-the-user" in server.request
        assert b"command=cat&command=a+b%26c&stdin=true&stdout=true&stderr=true" in server.request
        server.frame(1, b"")
        server.frame(1, server.receive(len(EVERY_BYTE)))
        server.frame(2, "wörds".encode())
        server.frame(3, SUCCESS)
        server.frame(1, b"after the status")
        server.goodbye()

    with running(script, ["cat", "a b&c"]) as channel:
        assert channel.receive(0.05) is None
        assert channel.exit_code is None
        channel.send(EVERY_BYTE)
        assert rest(channel) == EVERY_BYTE + b"after the status"
        assert (channel.exit_code, channel.stderr) == (0, "wörds")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_what_tls_has_decrypted_already(tmp_path: Path) -> None:
    """Two frames in one record: nothing more comes on the socket after the first was read."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost".split()
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    def script(server: Server) -> None:
        server.frames((1, b"first"), (1, b"second"))
        server.receive(1)

    with running(script, tls=tls) as channel:
        assert channel.receive(10) == b"first"
        assert channel.receive(1) == b"second"
        channel.send(b"x")


@pytest.mark.parametrize("politely", [True, False])
def test_its_exit_code(politely: bool) -> None:
    def script(server: Server) -> None:
        server.frame(3, EXIT_3)
        if politely:
            server.goodbye()

    with running(script) as channel:
        assert rest(channel) == b""
        assert channel.exit_code == 3


def test_a_command_that_could_not_run() -> None:
    def script(server: Server) -> None:
        server.frame(3, NOT_RUN)
        server.goodbye()

    with running(script) as channel, pytest.raises(ClusterError, match=r"`cat` in pod oslo-helper-1.*not found"):
        rest(channel)


@pytest.mark.parametrize("politely", [True, False])
def test_a_lost_connection(politely: bool) -> None:
    def script(server: Server) -> None:
        server.frame(1, b"half")
        if politely:
            server.goodbye()

    with running(script) as channel:
        assert channel.receive() == b"half"
        with pytest.raises(LostError, match=r"pod oslo-helper-1 in namespace team .* was lost"):
            rest(channel)


def refusing(status: int, message: str) -> Callable[[socket.socket, bytes], None]:
    body = json.dumps({"kind": "Status", "message": message, "code": status}).encode()
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return lambda connection, request: connection.sendall(head + body)


def test_a_missing_right() -> None:
    says = 'pods "oslo-helper-1" is forbidden: User "eve" cannot create resource "pods/exec" in API group ""'
    with serving(refusing(403, says)) as address, pytest.raises(ForbiddenError) as caught:
        connect(address, ["cat"])
    assert "create pods/exec in pod oslo-helper-1 in namespace team" in caught.value.message
    assert "Role oslo-helper" in caught.value.hint


def test_a_pod_that_is_gone() -> None:
    with (
        serving(refusing(404, 'pods "oslo-helper-1" not found')) as address,
        pytest.raises(MissingError, match='"oslo-helper-1" not found'),
    ):
        connect(address, ["cat"])


def test_no_answer() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(UnreachableError, match="no answer from the cluster"):
        connect(address, ["cat"])


def test_a_proxy_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.kube.exec._CONNECT_SECONDS", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=r"no answer from the cluster.*timed out"):
            connect(address, ["cat"])
