"""A command in a running pod, over a websocket: binary both ways.

The client library's own WSClient waits on the bare socket although TLS may have decrypted more already (it then
hangs on the last bytes), and collects what it received in quadratic time; so its websocket is used directly.
Frames carry the number of a stream in their first byte (v4.channel.k8s.io, which every API server speaks).
"""

from __future__ import annotations

import json
import re
import select
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlencode

import certifi
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.stream.ws_client import websocket_proxycare
from websocket import ABNF, WebSocket, WebSocketBadStatusException, WebSocketException

from runner.channel import LostError
from runner.errors import ClusterError
from runner.kube.errors import explain

_STDIN: Final = b"\x00"
_STDOUT, _STDERR, _ERROR = 1, 2, 3
_FRAME_BYTES: Final = 1 << 18
"""Of one frame to stdin; API servers refuse frames above 32 MiB and hold each in memory as a whole."""
_STDERR_BYTES: Final = 1 << 16
_CONNECT_SECONDS: Final = 10.0
_STALL_SECONDS: Final = 60.0
"""A connection that takes or continues nothing for so long is lost."""
_PING_SECONDS: Final = 15.0
"""Proxies close what is silent for a minute or so."""


class Channel:
    """A running command (see runner.channel.Stream). Not for several threads."""

    def __init__(self, websocket: WebSocket, what: str) -> None:
        """what: the command and its place, for messages."""
        self._websocket, self._what = websocket, what
        self._stderr = bytearray()
        self._status: dict[str, Any] | None = None
        self._closed = False
        self._why = ""
        if websocket.sock is None:
            raise self._lost("")
        self._socket = websocket.sock
        websocket.settimeout(_STALL_SECONDS)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def send(self, data: bytes) -> None:
        """Write to its stdin. Raises LostError; then what it has answered may still be received."""
        view = memoryview(data)
        for begin in range(0, len(view), _FRAME_BYTES):
            frame = b"".join((_STDIN, view[begin : begin + _FRAME_BYTES]))
            try:
                self._websocket.send(frame, ABNF.OPCODE_BINARY)
            except (WebSocketException, OSError) as error:
                raise self._lost(error) from error

    def receive(self, timeout: float | None = None) -> bytes | None:
        """Some bytes of its stdout; b"" at the end; None when nothing came within `timeout` seconds.

        Raises LostError, and ClusterError when the cluster could not run the command.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._closed:
            if not self._is_readable(end):
                return None
            if data := self._receive_frame():
                return data
        self._raise_unless_run()
        return b""

    @property
    def stderr(self) -> str:
        return self._stderr.decode(errors="replace")

    @property
    def exit_code(self) -> int | None:
        """None until `receive` has answered b""."""
        return None if self._status is None else _exit_code(self._status)

    def close(self) -> None:
        """Leave the command: its stdin ends, but it is not killed."""
        self._closed = True
        with suppress(WebSocketException, OSError):
            self._websocket.send_close()
        self._socket.close()

    def _receive_frame(self) -> bytes:
        """The next frame, b"" unless it is of stdout."""
        try:
            kind, frame = self._websocket.recv_data_frame(True)
        except (WebSocketException, OSError) as error:
            self._why = str(error)  # harmless when the command has ended: some servers skip the goodbye
            self.close()
            return b""
        if kind == ABNF.OPCODE_CLOSE:
            self.close()
        elif kind in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and frame.data:
            return self._sort(bytes(frame.data))
        return b""

    def _sort(self, data: bytes) -> bytes:
        number, content = data[0], data[1:]
        if number == _STDOUT:
            return content
        if number == _STDERR:
            self._stderr += content
            del self._stderr[:-_STDERR_BYTES]
        elif number == _ERROR and content:
            self._status = json.loads(content)
        return b""

    def _is_readable(self, end: float | None) -> bool:
        """Wait for a frame's beginning until `end` of the monotonic clock, and show proxies that somebody waits."""
        while True:
            left = _PING_SECONDS if end is None else max(0.0, end - time.monotonic())
            if self._has_bytes(min(left, _PING_SECONDS)):
                return True
            if left < _PING_SECONDS:
                return False
            self._ping()

    def _has_bytes(self, seconds: float) -> bool:
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        return bool(self._poll.poll(seconds * 1000))

    def _ping(self) -> None:
        try:
            self._websocket.ping()
        except (WebSocketException, OSError) as error:
            raise self._lost(error) from error

    def _raise_unless_run(self) -> None:
        """Raises unless the command ran to its end."""
        if self._status is None:
            raise self._lost(self._why)
        if _exit_code(self._status) is None:
            raise ClusterError(f"{self._what} could not be run: {self._status.get('message')}")

    def _lost(self, why: object) -> LostError:
        message = f"the connection to {self._what} was lost: {why or 'it was closed'}"
        return LostError(message, "is the pod still there? The network may also have failed: try again")


def open_exec(api_client: client.ApiClient, namespace: str, pod: str, command: Sequence[str]) -> Channel:
    """Start `command` in the pod's only container, with stdin, stdout and stderr.

    Raises ClusterError (see runner.kube.errors) when the cluster refuses or does not answer.
    """
    settings = api_client.configuration
    where = f"pod {pod} in namespace {namespace} of {settings.host}"
    streams = [(name, "true") for name in ("stdin", "stdout", "stderr")]
    query = urlencode([("command", word) for word in command] + streams)
    url = f"{settings.host}/api/v1/namespaces/{namespace}/pods/{pod}/exec?{query}"
    headers: dict[str, str] = {}
    api_client.update_params_for_auth(headers, [], ["BearerToken"])
    try:
        websocket = _connect(settings, re.sub("^http", "ws", url), headers)
    except WebSocketBadStatusException as error:
        raise _refused(error, where) from error
    except (WebSocketException, OSError) as error:
        raise explain(OSError(str(error)), "create", "pods/exec", where) from error
    return Channel(websocket, f"`{' '.join(command)}` in {where}")


def _connect(settings: client.Configuration, url: str, headers: dict[str, str]) -> WebSocket:
    """As the library's create_websocket, but that waits for ever where a proxy accepts and says nothing."""
    tls: dict[str, Any] = {"cert_reqs": ssl.CERT_NONE}
    if settings.verify_ssl:
        tls = {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": settings.ssl_ca_cert or certifi.where()}
        tls |= {} if settings.assert_hostname is None else {"check_hostname": settings.assert_hostname}
    own = {
        "certfile": settings.cert_file,
        "keyfile": settings.key_file,
        "server_hostname": settings.tls_server_name,
    }
    tls |= {name: value for name, value in own.items() if value}
    options: dict[str, Any] = {
        "header": ["sec-websocket-protocol: v4.channel.k8s.io", *(f"{name}: {said}" for name, said in headers.items())],
        "timeout": _CONNECT_SECONDS,
        "http_proxy_timeout": _CONNECT_SECONDS,
    }
    if settings.proxy or settings.proxy_headers:
        options = websocket_proxycare(options, settings, url, headers)
    websocket = WebSocket(sslopt=tls, skip_utf8_validation=False)
    websocket.connect(url, **options)  # type: ignore[no-untyped-call]
    return websocket


def _refused(error: WebSocketBadStatusException, where: str) -> ClusterError:
    """403 names the verb that the server missed: servers before 1.35 ask for get, later ones for create."""
    body = (error.resp_body or b"").decode(errors="replace")
    answer = ApiException(status=error.status_code, reason=str(error))
    answer.body = body
    missed = re.search(r"cannot (\w+) resource", body)
    return explain(answer, missed[1] if missed else "create", "pods/exec", where)


def _exit_code(status: dict[str, Any]) -> int | None:
    """Of the Status that ends an exec; None when the command did not run."""
    if status.get("status") == "Success":
        return 0
    causes = (status.get("details") or {}).get("causes") or []
    codes = [cause.get("message") for cause in causes if cause.get("reason") == "ExitCode"]
    return int(codes[0]) if codes else None
