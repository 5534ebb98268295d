"""Requests against a server of this machine that answers as API servers, proxies and broken networks do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest
from kubernetes import client

from runner.errors import ClusterError
from runner.kube.access import Access
from runner.kube.api import JOBS, Cluster
from runner.kube.errors import UnavailableError, UnreachableError, WebhookError


@contextmanager
def answering(body: bytes, promised: int | None = None) -> Iterator[Cluster]:
    """promised: the length that the head of the answer tells."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) if promised is None else promised))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
        with client.ApiClient(settings) as api_client:
            yield Cluster(api_client, "oslo", print)
        server.shutdown()


@pytest.mark.enable_socket
def test_an_answer_that_breaks_off_is_a_lost_connection() -> None:
    with answering(b'{"items": [', promised=1000) as cluster:
        with pytest.raises(UnreachableError, match="list pytorchjobs in namespace oslo"):
            cluster.find(JOBS)
        with pytest.raises(UnreachableError, match="get pods/log in namespace oslo"):
            cluster.log("x-master-0")


@pytest.mark.enable_socket
def test_a_login_page_is_no_api_server() -> None:
    with answering(b"<html>Please log in</html>") as cluster, pytest.raises(ClusterError, match="Please log in"):
        cluster.get(JOBS, "x")


@pytest.mark.enable_socket
def test_only_ends_of_lines_end_the_lines_of_a_log() -> None:
    with answering("T 1 a\u2028b\x0cc\rd\nT 2\n".encode()) as cluster:
        assert cluster.log("x-master-0") == ["T 1 a\u2028b\x0cc\rd", "T 2"]


@pytest.mark.parametrize("text", ["a: [b\n", "- a\n", "text"])
def test_a_kubeconfig_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config"
    file.write_text(text)
    with pytest.raises(ClusterError, match="the kubeconfig cannot be") as caught:
        Cluster.connect(Access(kubeconfig=str(file)), print)
    assert str(file) in caught.value.hint


def test_a_name_stays_one_part_of_the_path() -> None:
    with client.ApiClient(client.Configuration(host="http://127.0.0.1:1")) as api_client:
        path = Cluster(api_client, "oslo", print)._path(JOBS, "a/b?c-0123abcd")
    assert path.endswith("/namespaces/oslo/pytorchjobs/a%2Fb%3Fc-0123abcd")


@contextmanager
def api_server(tmp_path: Path, *answers: int | str | None) -> Iterator[tuple[Cluster, list[str]]]:
    """By way of a kubeconfig. answers: codes; texts that a 500 says; None: silence. Yields what it was sent."""
    heard: list[str] = []
    left, done = iter(answers), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            heard.append(f"{self.command} {self.headers['Authorization']}")
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            status = next(left, 200)
            if status is None:
                done.wait(5)
                self.close_connection = True
                return
            body = json.dumps({"message": status} if isinstance(status, str) else {}).encode()
            self.send_response(500 if isinstance(status, str) else status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    (tmp_path / "token").write_text("first\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kubeconfig = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "u", "user": {"tokenFile": "token"}}],
        }
        (tmp_path / "config").write_text(json.dumps(kubeconfig))
        cluster = Cluster.connect(Access(kubeconfig=str(tmp_path / "config")), print)
        with cluster.api_client:
            yield cluster, heard
        done.set()
        server.shutdown()


@pytest.mark.enable_socket
def test_a_token_that_is_renewed_meanwhile_is_read_again(tmp_path: Path) -> None:
    """Such tokens last an hour, and `logs -f` for days."""
    with api_server(tmp_path) as (cluster, heard):
        cluster.get(JOBS, "x")
        (tmp_path / "token").write_text("second\n")
        cluster.get(JOBS, "x")
        (tmp_path / "token").unlink()
        cluster.get(JOBS, "x")
    assert heard == ["GET Bearer first", "GET Bearer second", "GET Bearer second"]


@pytest.mark.filterwarnings("ignore:HTTPResponse.getheaders")  # by the client library
@pytest.mark.enable_socket
def test_what_a_busy_server_has_turned_away_is_asked_again_and_no_more(tmp_path: Path) -> None:
    with api_server(tmp_path, 429, 200, 429, 200, 503) as (cluster, heard):
        cluster.create(JOBS, {})
        cluster.patch(JOBS, "x", {})
        with pytest.raises(UnavailableError):
            cluster.create(JOBS, {})  # it may have been read
    assert len(heard) == 5


@pytest.mark.enable_socket
def test_a_silent_server_is_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.kube.api.GET_SECONDS", 0.2)
    with api_server(tmp_path, None, None, None, None) as (cluster, heard):
        with pytest.raises(UnreachableError):
            cluster.get(JOBS, "x")
        assert len(heard) == 2


LOST_WEBHOOK = 'Internal error occurred: failed calling webhook "validator.x": dial tcp 10.96.1.2:443: no route to host'


@pytest.mark.filterwarnings("ignore:HTTPResponse.getheaders")
@pytest.mark.enable_socket
def test_a_webhook_that_is_being_replaced_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runner.patience._PAUSE_SECONDS", 0.001)
    with api_server(tmp_path, LOST_WEBHOOK, LOST_WEBHOOK, 200) as (cluster, heard):
        assert cluster.create(JOBS, {}) == {}
        assert len(heard) == 3
    said = capsys.readouterr().out
    assert said.count("a webhook of the cluster does not answer") == 1
    assert said.endswith("no route to host; trying again\n")


@pytest.mark.filterwarnings("ignore:HTTPResponse.getheaders")
@pytest.mark.enable_socket
def test_a_webhook_that_stays_away_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.kube.api.WEBHOOK_SECONDS", 0)
    with api_server(tmp_path, LOST_WEBHOOK) as (cluster, heard):
        with pytest.raises(WebhookError, match="no route to host"):
            cluster.create(JOBS, {})
        assert len(heard) == 1
