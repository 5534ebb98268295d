"""oslo submit, on a cluster: plan, question, server's check, upload, create, and a look whether the pods come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from opensloth import run_config
from opensloth.human import human_bytes
from runner import output, transfer
from runner.backend import Outcome, Submission
from runner.cluster import KubernetesBackend
from runner.cluster_history import ClusterHistory
from runner.cluster_status import template_of
from runner.commands import watching
from runner.commands.common import confirm, settings
from runner.commands.predicting import gpu_of_cluster, require_room, with_prediction
from runner.config_file import LoadedFile, Target, load_file
from runner.errors import Interrupted
from runner.helper import Helper
from runner.identity import latest_of_content, next_fresh, run_id
from runner.kube.api import Cluster
from runner.plan import build_plan, plan_text
from runner.pytorchjob import notes
from runner.rendering import cluster_content, job_manifest
from runner.server_check import check_on_server

ASK_ABOVE_BYTES: Final = 1 << 30
_PODS_SECONDS: Final = 60.0
"""How long the operator may take to make the pods."""
_POLL_SECONDS: Final = 0.5


def submit_cluster(
    file: Path, sets: tuple[str, ...], *, fresh: bool, force: bool, yes: bool
) -> tuple[KubernetesBackend, str, Outcome]:
    """Returns the backend, the run and what it came to."""
    loaded, cluster = load_for_cluster(file, sets)
    backend = KubernetesBackend(cluster, output.say)
    content = cluster_content(loaded)
    run = _choose_run(backend, run_id(loaded.run.name, content), loaded, fresh)
    manifest = job_manifest(loaded, run, content)
    with _nothing_left_behind():
        outcome = _submit(backend, run, loaded, manifest, force=force, yes=yes)
    if outcome in (Outcome.STARTED, Outcome.RESUMED):
        with watching.may_be_interrupted(backend.handle(run)):
            _await_pods(backend, run)
    return backend, run, outcome


def check_file_on_server(file: Path, sets: tuple[str, ...]) -> None:
    """The dry run of a submit. Raises ClusterError with what the cluster says against it."""
    loaded, cluster = load_for_cluster(file, sets)
    content = cluster_content(loaded)
    check_on_server(cluster, job_manifest(loaded, run_id(loaded.run.name, content), content), output.say)
    output.say(f"{cluster.where} would accept it: dry runs of the job and its pods")


def load_for_cluster(file: Path, sets: tuple[str, ...]) -> tuple[LoadedFile, Cluster]:
    """The file, and the cluster that it is for; flags beat what the file says."""
    now = settings()
    loaded = load_file(file, sets, now.defaults, Target.of_cluster())
    access = now.access_for(loaded.job.context, loaded.job.namespace)
    if now.access.namespace:
        loaded = replace(loaded, job=loaded.job.model_copy(update={"namespace": now.access.namespace}))
    return loaded, Cluster.connect(access, output.say)


def _choose_run(backend: KubernetesBackend, base: str, loaded: LoadedFile, fresh: bool) -> str:
    existing = backend.runs()
    if not fresh:
        return latest_of_content(base, existing) or base
    # Also of deleted jobs: their folders are still there, and would be taken up.
    with ClusterHistory.of(backend.cluster, loaded.job.model_dump(), output.say) as history:
        return next_fresh(base, [*existing, *history.runs()])


def _submit(
    backend: KubernetesBackend, run: str, loaded: LoadedFile, manifest: dict[str, Any], *, force: bool, yes: bool
) -> Outcome:
    submission = Submission(run_config.dump(loaded.run), manifest)
    standing = backend.standing(run)
    plan = build_plan(run, loaded.run, loaded.job, None, loaded.origins)
    plan = with_prediction(plan, loaded, gpu_of_cluster(loaded), here=False)
    output.say(plan_text(plan))
    output.say(f"into {backend.cluster.where}")
    for note in notes(loaded.job):
        output.say(f"note: {note}")
    if standing is Outcome.ATTACHED and backend.has_other_settings(run, manifest):
        output.say("note: the running job keeps its own settings of `job`; cancel it and submit again to change them")
    if standing in (Outcome.ATTACHED, Outcome.ALREADY_SUCCEEDED):
        return standing
    require_room(plan, loaded, force=force)
    confirm("Submit?", yes)
    check_on_server(backend.cluster, manifest, output.say)
    if loaded.sources:
        _upload(backend.cluster, loaded.sources, manifest, yes)
    return backend.submit(run, submission)


def _upload(cluster: Cluster, sources: Mapping[str, Path], manifest: dict[str, Any], yes: bool) -> None:
    """Bring local files and folders to the volume, those that are not there yet."""
    with Helper(cluster, template_of(manifest)["spec"], output.say) as helper:
        missing = transfer.missing_bytes(helper, sources)
        if missing > ASK_ABOVE_BYTES:
            confirm(f"Copy {human_bytes(missing)} to the volume?", yes)
        transfer.upload(helper, sources, output.event_sayer())


def _await_pods(backend: KubernetesBackend, run: str) -> None:
    """Until every pod exists, or the job waits in a queue; says why one cannot be created."""
    end, said = time.monotonic() + _PODS_SECONDS, ""
    while True:
        missing, failures = backend.missing_pods(run)
        if not missing:
            return
        why = failures[-1] if failures else "the training operator has not made them; does it run?"
        if failures and why != said:
            output.say(f"... {_pods(missing)} cannot be created: {why}")
            said = why
        if time.monotonic() > end:
            late = f"{_pods(missing)} missing after {_PODS_SECONDS:.0f} s: {why}"
            output.say(f"warning: {late}\n  the job stays, and begins once they can be made")
            return
        time.sleep(_POLL_SECONDS)


def _pods(count: int) -> str:
    return "1 pod" if count == 1 else f"{count} pods"


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Say after Ctrl-C what there is: the job is made in one request, at the very end."""
    try:
        yield
    except KeyboardInterrupt as error:
        hint = "what has been copied to the volume stays there and is not copied again"
        raise Interrupted("interrupted: nothing was submitted", hint, exit_code=130) from error
