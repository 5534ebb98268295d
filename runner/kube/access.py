"""How to reach a cluster, as kubectl would. Imports no client: every command asks whether there is a cluster at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TOKEN_DIR: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""A pod's own credentials."""


@dataclass(frozen=True)
class Access:
    """None: as kubectl has it."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None

    @property
    def files(self) -> str:
        """The kubeconfig, or several joined by the path separator; they need not exist."""
        return self.kubeconfig or os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())

    @property
    def has_file(self) -> bool:
        return any(part and Path(part).expanduser().exists() for part in self.files.split(os.pathsep))

    @property
    def is_configured(self) -> bool:
        """Whether somebody has told this machine of a cluster, or it is one's pod. Asks nobody."""
        return bool(self.kubeconfig or self.context or self.namespace) or self.has_file or in_cluster()


def in_cluster() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (TOKEN_DIR / "token").exists()
