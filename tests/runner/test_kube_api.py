"""Requests against a server of this machine that answers as API servers, proxies and broken networks do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from kubernetes import client

from runner.errors import ClusterError
from runner.kube.access import Access
from runner.kube.api import JOBS, Cluster
from runner.kube.errors import UnreachableError


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
            yield Cluster(api_client, "oslo")
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
        Cluster.connect(Access(kubeconfig=str(file)))
    assert str(file) in caught.value.hint


def test_a_name_stays_one_part_of_the_path() -> None:
    with client.ApiClient(client.Configuration(host="http://127.0.0.1:1")) as api_client:
        path = Cluster(api_client, "oslo")._path(JOBS, "a/b?c-0123abcd")
    assert path.endswith("/namespaces/oslo/pytorchjobs/a%2Fb%3Fc-0123abcd")
