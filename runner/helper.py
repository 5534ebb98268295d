"""A helper pod on a claim: made on entering, deleted on leaving. Files go through it; nobody enters a training pod."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Final

from runner.errors import ClusterError
from runner.helper_pod import HELPER_LABEL, helper_pod
from runner.kube.api import PODS, Cluster
from runner.kube.errors import ForbiddenError, MissingError, RefusedError
from runner.kube.exec import Channel, open_exec
from runner.pod_facts import wait_of
from runner.spec import SHARED_VOLUME

START_SECONDS: Final = 600.0
"""A node that pulls the image of several gigabytes needs minutes."""
DEADLINE_SECONDS: Final = 3600
"""The pod ends by itself after this, whatever becomes of who made it."""
_POLL_SECONDS: Final = 0.25
_SAY_AFTER_SECONDS: Final = 3.0
_OVER: Final = ("Failed", "Succeeded")


class Helper:
    """The pod, and commands run in it."""

    def __init__(
        self,
        cluster: Cluster,
        pod_spec: Mapping[str, Any],
        say: Callable[[str], None],
        start_seconds: float = START_SECONDS,
    ) -> None:
        """pod_spec: of the training pods, whose image, claim and place the helper shares.

        start_seconds: how long it may take to start.
        """
        self._cluster, self._say, self._start_seconds = cluster, say, start_seconds
        self._shared = _shared_with(pod_spec)
        self.name = _new_name()
        self._before: Any = None
        self._refused = False

    def open(self, command: list[str]) -> Channel:
        """Run a command in the pod; in another one when it has ended, by its deadline or an eviction."""
        try:
            return self._exec(command)
        except ClusterError:
            if not self._has_ended():
                raise
        self._say(f"... the helper pod {self.name} has ended: starting another")
        self._leave_pod()
        self.name = _new_name()
        self._create()
        self._wait()
        return self._exec(command)

    def _exec(self, command: list[str]) -> Channel:
        return open_exec(self._cluster.api_client, self._cluster.namespace, self.name, command)

    def _has_ended(self) -> bool:
        try:
            return self._cluster.get(PODS, self.name)["status"].get("phase") in _OVER
        except MissingError:
            return True
        except ClusterError:
            return False

    def __enter__(self) -> Helper:
        with suppress(ValueError):  # not in the main thread: signals are the caller's business
            self._before = signal.signal(signal.SIGTERM, _terminate)
        try:
            self._remove_finished()
            self._create()
            self._wait()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _create(self) -> None:
        try:
            self._cluster.create(PODS, helper_pod(self.name, **self._shared, deadline_seconds=DEADLINE_SECONDS))
        except (ForbiddenError, RefusedError):
            self._refused = True
            raise

    def _wait(self) -> None:
        """Until it runs. Raises ClusterError with what it waits for."""
        begin, said = time.monotonic(), ""
        while True:
            pod = self._cluster.get(PODS, self.name)
            phase, waits = pod["status"].get("phase"), _waits(pod)
            if phase == "Running":
                return
            waited = time.monotonic() - begin
            if phase in _OVER or waited > self._start_seconds:
                message = f"the helper pod {self.name} did not start: {waits or phase}"
                raise ClusterError(message, "it needs the image and the claim of the training pods")
            if waits and waits != said and waited > _SAY_AFTER_SECONDS:
                self._say(f"... {waits}")
                said = waits
            time.sleep(_POLL_SECONDS)

    def _remove_finished(self) -> None:
        """Those of others that ended by their deadline, because who made them was killed."""
        for pod in self._cluster.find(PODS, HELPER_LABEL):
            if pod["status"].get("phase") in _OVER:
                self._cluster.delete(PODS, pod["metadata"]["name"], grace_seconds=0)

    def _leave(self) -> None:
        try:
            self._leave_pod()
        finally:
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._before)

    def _leave_pod(self) -> None:
        try:
            if not self._refused:
                self._cluster.delete(PODS, self.name, grace_seconds=0)
        except ClusterError as error:
            self._say(f"warning: the helper pod {self.name} could not be deleted; it ends by itself: {error}")


def _waits(pod: Mapping[str, Any]) -> str | None:
    wait = wait_of(pod, time.time())
    return wait.text if wait else None


def _new_name() -> str:
    return f"oslo-helper-{secrets.token_hex(4)}"


def _shared_with(pod_spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the helper takes from the training pods."""
    container = pod_spec["containers"][0]
    claim = next(volume for volume in pod_spec["volumes"] if volume["name"] == SHARED_VOLUME)
    return {
        "image": container["image"],
        "volume": claim["persistentVolumeClaim"]["claimName"],
        "image_pull_policy": container["imagePullPolicy"],
        "pull_secrets": [secret["name"] for secret in pod_spec.get("imagePullSecrets", [])],
        "service_account": pod_spec.get("serviceAccountName"),
        "node_selector": pod_spec.get("nodeSelector", {}),
        "tolerations": pod_spec.get("tolerations", []),
    }


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(143)  # by way of __exit__, so that no pod is left behind
