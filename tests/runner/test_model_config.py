"""Where a model's config.json comes from."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from runner.model_config import NoModelConfigError, is_asked_of_hub, read_model_config

CONFIG = {"model_type": "qwen2"}


class Hub(BaseHTTPRequestHandler):
    """Has team/model at main; sends team/moved on to it, and team/away to another host."""

    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        elsewhere = {"moved": "", "away": f"http://localhost:{self.server.server_address[1]}"}
        name = self.path.removeprefix("/team/").removesuffix("/resolve/main/config.json")
        if name in elsewhere:
            self.send_response(302)
            self.send_header("Location", f"{elsewhere[name]}/team/model/resolve/main/config.json")
            self.end_headers()
        elif self.path == "/team/model/resolve/main/config.json":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(CONFIG).encode())
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(socket_enabled: None) -> Iterator[str]:
    """Its address."""
    Hub.seen = []
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def cached(home: Path, revision: str, commit: str) -> None:
    folder = home / "hub" / "models--team--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text(json.dumps(CONFIG))


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_model_config(str(tmp_path), None, {}, {}) == CONFIG
    assert read_model_config("/shared/inputs/x/m", None, {"/shared/inputs/x/m": tmp_path}, {}) == CONFIG
    with pytest.raises(NoModelConfigError, match=r"/shared/models/m/config\.json cannot be read here: No such file"):
        read_model_config("/shared/models/m", None, {}, {})


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_folder_with_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(NoModelConfigError, match="is not a JSON object"):
        read_model_config(str(tmp_path), None, {}, {})


@pytest.mark.parametrize("revision", [None, "v1", "0123abc"])
def test_the_cache_is_looked_into_first(revision: str | None, tmp_path: Path, hub: str) -> None:
    cached(tmp_path, revision if revision == "v1" else "main", "0123abc")
    assert read_model_config("team/model", revision, {}, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}) == CONFIG
    assert read_model_config("team/model", revision, {}, {"HF_HUB_CACHE": f"{tmp_path}/hub"}) == CONFIG
    assert Hub.seen == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_nobody_is_asked(variable: str, tmp_path: Path, hub: str) -> None:
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, variable: "1"}
    with pytest.raises(NoModelConfigError, match=f"not in the hub's cache on this machine, and {variable} is set"):
        read_model_config("team/model", None, {}, environ)
    assert Hub.seen == []


def test_the_hub_is_asked_once_with_the_token(tmp_path: Path, hub: str) -> None:
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"{hub}/"}
    assert read_model_config("team/model", None, {}, environ) == CONFIG
    (tmp_path / "token").write_text("of-file\n")
    assert read_model_config("team/model", "main", {}, environ) == CONFIG
    assert read_model_config("team/model", None, {}, environ | {"HF_TOKEN": "given"}) == CONFIG
    path = "/team/model/resolve/main/config.json"
    assert Hub.seen == [(path, None), (path, "Bearer of-file"), (path, "Bearer given")]


def test_the_token_goes_no_further_than_the_hub(tmp_path: Path, hub: str) -> None:
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_TOKEN": "given"}
    assert read_model_config("team/moved", None, {}, environ) == CONFIG
    assert read_model_config("team/away", None, {}, environ) == CONFIG
    assert [token for _, token in Hub.seen] == ["Bearer given", "Bearer given", "Bearer given", None]


def test_what_the_hub_does_not_have(tmp_path: Path, hub: str) -> None:
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}
    with pytest.raises(NoModelConfigError, match=r"has no config\.json of team/other for us: HTTP 404"):
        read_model_config("team/other", None, {}, environ)
    with pytest.raises(NoModelConfigError, match="HTTP 404"):
        read_model_config("team/model", "a/b?c", {}, environ)
    assert Hub.seen[-1][0] == "/team/model/resolve/a%2Fb%3Fc/config.json"


def test_what_has_to_come_over_the_network(tmp_path: Path) -> None:
    environ = {"HF_HOME": str(tmp_path)}
    assert is_asked_of_hub("team/model", None, {}, environ)
    assert not is_asked_of_hub("team/model", None, {}, environ | {"HF_HUB_OFFLINE": "1"})
    assert not is_asked_of_hub(str(tmp_path), None, {}, environ)
    cached(tmp_path, "main", "0123abc")
    assert not is_asked_of_hub("team/model", None, {}, environ)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://host with spaces"])
def test_a_hub_that_does_not_answer(endpoint: str, tmp_path: Path, socket_enabled: None) -> None:
    with pytest.raises(NoModelConfigError, match="does not answer"):
        read_model_config("team/model", None, {}, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint})


def test_what_is_no_name(tmp_path: Path) -> None:
    for endpoint, model, reason in (("file:///etc", "team/model", "no address"), ("", "../../x", "neither a folder")):
        with pytest.raises(NoModelConfigError, match=reason):
            read_model_config(model, None, {}, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint})
