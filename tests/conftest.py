"""Every test starts from the same environment, whoever's machine it runs on."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, root, hub or colour setting of the person who runs the tests leaks in."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OSLO_ROOT", str(home / "oslo"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("OSLO_DEFAULTS", "NO_COLOR", "FORCE_COLOR", "CUDA_VISIBLE_DEVICES", "KUBECONFIG", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
