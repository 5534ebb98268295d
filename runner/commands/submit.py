"""oslo submit"""

from __future__ import annotations

from pathlib import Path

import click

from opensloth import run_config
from opensloth.fingerprint import file_sha256, source_sha256
from runner import output
from runner.backend import Backend, Outcome, State, Submission
from runner.commands import watching
from runner.commands.common import (
    cluster_options,
    confirm,
    file_argument,
    json_option,
    set_option,
    settings,
    yes_option,
)
from runner.commands.predicting import gpu_of_here, require_room, with_prediction
from runner.config_file import LoadedFile, Target, load_file
from runner.identity import content_hash, latest_of_content, next_fresh, run_id
from runner.plan import build_plan, plan_text
from runner.training_side import require_train_extra

_SAID = {
    Outcome.STARTED: "started",
    Outcome.RESUMED: "taken up again as a new attempt, from the last checkpoint",
    Outcome.ATTACHED: "is running already: attached",
    Outcome.ALREADY_SUCCEEDED: "has succeeded already (--fresh starts anew)",
}


@click.command()
@file_argument
@click.option("--local", is_flag=True, help="Train on this machine.")
@click.option("--follow", is_flag=True, help="Show the log until the run is over; the exit code says how it ended.")
@set_option
@click.option("--fresh", is_flag=True, help="Start anew, even if the same content has run before.")
@click.option("--force", is_flag=True, help="Submit what does not fit into GPU memory by the prediction.")
@cluster_options
@yes_option
@json_option
def submit(
    file: Path,
    local: bool,
    follow: bool,
    sets: tuple[str, ...],
    fresh: bool,
    force: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Train as a config file says, on a cluster or with --local here.

    The same content again attaches to its run, prints its result, or goes on from its last checkpoint. The last
    line of stdout is the run's handle.
    """
    if local:
        backend, run, outcome = _submit_here(file, sets, fresh=fresh, force=force, yes=yes)
    else:
        from runner.commands.submit_cluster import submit_cluster  # 0.3 s that local runs need not pay

        backend, run, outcome = submit_cluster(file, sets, fresh=fresh, force=force, yes=yes)
    handle = backend.handle(run)
    output.say(f"{handle} {_SAID[outcome]}")
    if outcome is not Outcome.ALREADY_SUCCEEDED and not follow:
        output.say(f"  oslo logs -f {handle}\n  oslo status {handle}\n  oslo cancel {handle}")
    try:
        if outcome is Outcome.ALREADY_SUCCEEDED:
            watching.report_end(backend.get(run))
        elif follow:
            watching.follow_and_report(backend, run, as_json)
    finally:
        watching.show_run(backend, run, handle, as_json, outcome=str(outcome))


def _submit_here(
    file: Path, sets: tuple[str, ...], *, fresh: bool, force: bool, yes: bool
) -> tuple[Backend, str, Outcome]:
    now = settings()
    if now.launcher is None:
        require_train_extra("training on this machine")
    loaded = load_file(file, sets, now.defaults, Target(now.root))
    run = choose_run(loaded, now.local.runs(), fresh)
    plan = build_plan(run, loaded.run, None, None, loaded.origins)
    plan = with_prediction(plan, loaded, gpu_of_here(loaded), here=True)
    output.say(plan_text(plan))
    if not _stands(now.local, run):
        require_room(plan, loaded, force=force)
    confirm("Submit?", yes)
    return now.local, run, now.local.submit(run, Submission(run_config.dump(loaded.run)))


def _stands(backend: Backend, run: str) -> bool:
    """Whether it runs or has succeeded: nothing will be started."""
    return run in backend.runs() and backend.get(run).state not in (State.FAILED, State.CANCELLED)


def choose_run(loaded: LoadedFile, existing: list[str], fresh: bool) -> str:
    """The id that this content has, or gets, on this machine."""
    hashes = {seen: source_sha256(local) for seen, local in loaded.sources.items()}
    if loaded.run.dataset is None:
        hashes |= _hash_of_prepared(loaded.run.opensloth.data_cache_path)
    base = run_id(loaded.run.name, content_hash(loaded.run, hashes))
    if fresh:
        return next_fresh(base, existing)
    return latest_of_content(base, existing) or base


def _hash_of_prepared(folder: str) -> dict[str, str]:
    """Of a prepared dataset: its footer holds the hashes of all its files."""
    footer = Path(folder) / "oslo.json"
    if footer.is_file():
        return {folder: file_sha256(footer)}
    return {folder: source_sha256(Path(folder))} if Path(folder).is_dir() else {}
