"""An OCI archive of an image that leaves out the layers which the cluster's nodes have already.

    image_delta.py write IMAGE LAYER.tar STATE OUT.tar   exit code 3: STATE does not know the layers below the last
    image_delta.py record ARCHIVE.tar STATE              after ARCHIVE.tar (docker-archive) was loaded as a whole

The dependencies are one layer of 6 GB: an archive with it takes minutes to write and load, one without it a second.
LAYER.tar takes the place of the image's last layer, its code. STATE: {digest of a layer: its size in bytes}.
containerd accepts such an archive, because it looks for the layers in its store and not in the archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNKNOWN_LAYERS = 3
OCI = "application/vnd.oci.image"


def main(command: str, *arguments: str) -> int:
    if command == "record":
        archive, state = map(Path, arguments)
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(layer_sizes(archive)))
        return 0
    image, layer, state, out = arguments[0], *map(Path, arguments[1:])
    known = json.loads(state.read_text()) if state.exists() else {}
    inspected = subprocess.run(["buildah", "inspect", "--type", "image", image], check=True, capture_output=True)
    config = json.loads(inspected.stdout)["OCIv1"]
    if not set(config["rootfs"]["diff_ids"][:-1]) <= known.keys():
        return UNKNOWN_LAYERS
    write(out, image, config, layer.read_bytes(), known)
    return 0


def layer_sizes(archive: Path) -> dict[str, int]:
    """{digest: size} of the layers of a docker-archive; they are not compressed there."""
    with tarfile.open(archive) as tar:
        sizes = {member.name: member.size for member in tar.getmembers()}
        listed = json.load(_member(tar, "manifest.json"))[0]
        digests = json.load(_member(tar, listed["Config"]))["rootfs"]["diff_ids"]
        return {digest: sizes[name] for digest, name in zip(digests, listed["Layers"], strict=True)}


def write(out: Path, image: str, config: dict[str, Any], layer: bytes, known: Mapping[str, int]) -> None:
    """config: of the image as it was built; its last layer gives way to `layer`."""
    below = config["rootfs"]["diff_ids"][:-1]
    config["rootfs"]["diff_ids"] = [*below, _digest(layer)]
    config_bytes = json.dumps(config).encode()
    layers = [{"digest": digest, "size": known[digest]} for digest in below]
    layers.append({"digest": _digest(layer), "size": len(layer)})
    manifest = json.dumps({
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": _digest(config_bytes), "size": len(config_bytes)},
        "layers": [{"mediaType": f"{OCI}.layer.v1.tar", **one} for one in layers],
    }).encode()  # fmt: skip
    names = {"io.containerd.image.name": image, "org.opencontainers.image.ref.name": image.rpartition(":")[2]}
    index = {
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": f"{OCI}.manifest.v1+json", "digest": _digest(manifest), "size": len(manifest),
            "annotations": names,
        }],
    }  # fmt: skip
    with tarfile.open(out, "w") as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _add(tar, "index.json", json.dumps(index).encode())
        for blob in (layer, config_bytes, manifest):
            _add(tar, f"blobs/sha256/{_digest(blob).removeprefix('sha256:')}", blob)


def _member(tar: tarfile.TarFile, name: str) -> io.BufferedIOBase:
    found = tar.extractfile(name)
    assert found is not None
    return found


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
