"""The archive that brings a change of code to a cluster: whole but for the layers that the nodes have."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
import tarfile
from pathlib import Path
from typing import Any

import pytest
from kubectl import REPOSITORY

delta = runpy.run_path(str(REPOSITORY / "tests" / "e2e" / "image_delta.py"))


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def written(tmp_path: Path) -> dict[str, bytes]:
    """The files of an archive with new code over the layers `deps` and `code`."""
    config = {"architecture": "amd64", "rootfs": {"diff_ids": [sha256(b"deps"), sha256(b"code")]}}
    out = tmp_path / "out.tar"
    delta["write"](out, "localhost/x:1", config, b"new code", {sha256(b"deps"): 4, sha256(b"code"): 4})
    with tarfile.open(out) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]


def test_the_sizes_of_a_whole_archives_layers(tmp_path: Path) -> None:
    config = {"rootfs": {"diff_ids": ["sha256:1", "sha256:2"]}}
    listed = [{"Config": "c.json", "Layers": ["1.tar", "2.tar"]}]
    files = {"1.tar": b"abc", "2.tar": b"", "c.json": json.dumps(config).encode()}
    archive = pack(tmp_path / "whole.tar", {**files, "manifest.json": json.dumps(listed).encode()})
    assert delta["layer_sizes"](archive) == {"sha256:1": 3, "sha256:2": 0}


def test_only_the_code_is_in_the_archive(written: dict[str, bytes]) -> None:
    blobs = {name: data for name, data in written.items() if name.startswith("blobs/")}
    assert len(blobs) == 3
    assert b"new code" in blobs.values()
    for name, data in blobs.items():
        assert name == f"blobs/sha256/{hashlib.sha256(data).hexdigest()}"


def test_the_manifest_names_all_layers(written: dict[str, bytes]) -> None:
    def blob(descriptor: dict[str, Any]) -> Any:
        data = written["blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")]
        assert len(data) == descriptor["size"]
        return json.loads(data)

    (listed,) = json.loads(written["index.json"])["manifests"]
    assert listed["annotations"]["io.containerd.image.name"] == "localhost/x:1"
    manifest = blob(listed)
    expected = [sha256(b"deps"), sha256(b"new code")]
    assert [layer["digest"] for layer in manifest["layers"]] == expected
    assert [layer["size"] for layer in manifest["layers"]] == [4, 8]
    assert blob(manifest["config"])["rootfs"]["diff_ids"] == expected
