"""JOB -> the backend that has it, and the run: a handle, a run's id, or a plain name, whose latest run it is."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import click

from runner import output
from runner.backend import CLUSTER_SCHEME, LOCAL_SCHEME, Backend
from runner.commands.common import Settings, settings
from runner.errors import ClusterError, NotFoundError, UsageError
from runner.identity import name_of
from runner.kube.access import Access

if TYPE_CHECKING:
    from runner.cluster import KubernetesBackend


def locate(job: str, *, past: bool = False) -> tuple[Backend, str]:
    """The run that JOB means, here first, then on the cluster.

    past: also runs whose object has been deleted, by what they left on the volume.
    Raises NotFoundError with the nearest names, UsageError when a plain name means one here and one there.
    """
    now = settings()
    if job.startswith(LOCAL_SCHEME):
        return now.local, _required(now.local, job.removeprefix(LOCAL_SCHEME), job)
    if job.startswith(CLUSTER_SCHEME):
        namespace, _, run = job.removeprefix(CLUSTER_SCHEME).partition("/")
        if not run:
            raise UsageError(f"{job} is no handle", f"expected {CLUSTER_SCHEME}NAMESPACE/RUN")
        access = now.effective_access
        return _on_cluster(Access(access.kubeconfig, access.context, namespace), run, job, past)
    here = now.local.named(job)
    if here == job or (here is not None and not now.effective_access.is_configured):
        return now.local, here
    if not now.effective_access.is_configured:
        raise _not_found(job, now.local.runs())
    if here is not None:
        return _here_or_there(now, job, here)
    return _on_cluster(now.effective_access, job, job, past, now.local.runs())


def cluster_backend(access: Access) -> KubernetesBackend:
    """Raises ClusterError when no cluster is configured."""
    from runner.cluster import KubernetesBackend  # 0.3 s that local runs need not pay
    from runner.kube.api import Cluster

    return KubernetesBackend(Cluster.connect(access, output.say), output.say)


def _here_or_there(now: Settings, job: str, here: str) -> tuple[Backend, str]:
    try:
        backend = cluster_backend(now.effective_access)
        there = backend.named(job)
    except ClusterError:  # a cluster that does not answer does not keep anybody from what is here
        return now.local, here
    if there is None:
        return now.local, here
    raise UsageError(
        f"{job} is here and on the cluster", f"say which: {now.local.handle(here)} or {backend.handle(there)}"
    )


def _on_cluster(
    access: Access, wanted: str, job: str, past: bool, here: list[str] | None = None
) -> tuple[Backend, str]:
    backend = cluster_backend(access)
    run = backend.named(wanted)
    if run is not None:
        return backend, run
    found = _in_the_past(backend, wanted) if past else None
    if found is not None:
        return found
    raise _not_found(job, [*(here or []), *backend.runs()])


def _in_the_past(backend: KubernetesBackend, wanted: str) -> tuple[Backend, str] | None:
    """A deleted run, read from the volume through a helper pod that ends with the command."""
    from runner.cluster_history import ClusterHistory

    try:
        opened = ClusterHistory.of(backend.cluster, settings().job_defaults, output.say)
        history = click.get_current_context().with_resource(opened)
        run = history.named(wanted)
    except (ClusterError, UsageError) as error:
        output.say(f"note: runs whose job was deleted were not looked for: {error.message}")
        return None
    return None if run is None else (history, run)


def _required(backend: Backend, run: str, job: str) -> str:
    runs = backend.runs()
    if run not in runs:
        raise _not_found(job, runs)
    return run


def _not_found(job: str, runs: list[str]) -> NotFoundError:
    names = sorted({*runs, *map(name_of, runs)})
    wanted = job.rpartition("/")[2]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "oslo list shows all runs"
    return NotFoundError(f"there is no run {job}", hint)
