"""Follows a run to its end, and says how it ended and what comes next."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from opensloth.files import read_json
from runner import output, why
from runner.backend import CLUSTER_SCHEME, Backend, LogLine, LogQuery, RunStatus, State, Waiting
from runner.errors import Interrupted, JobCancelledError, JobFailedError, NotFoundError
from runner.patience import OUTAGE_SECONDS, patiently


class _Terminated(Exception):
    """SIGTERM arrived."""


@contextmanager
def may_be_interrupted(handle: str, goes_on: str = "goes on") -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into Interrupted: who stops watching does not stop the job.

    goes_on: what becomes of the run.
    """

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, on_sigterm)
    hint = f"oslo logs -f {handle}   goes on watching\n  oslo cancel {handle}    stops it"
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {handle} {goes_on}", hint, exit_code=130) from error
    except _Terminated as error:
        raise Interrupted(f"terminated; {handle} {goes_on}", hint, exit_code=143) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def follow(backend: Backend, run: str, query: LogQuery, show: Callable[[LogLine], None]) -> RunStatus:
    """Show the log until the run is over; returns how it ended.

    Raises Interrupted, or JobCancelledError when the run is deleted meanwhile.
    """
    handle = backend.handle(run)
    with may_be_interrupted(handle):
        for item in backend.follow(run, query):
            if isinstance(item, Waiting):
                output.say(f"... {item.reason}")
            else:
                show(item)
    return still_there(backend, run, handle)


def follow_and_report(backend: Backend, run: str, as_json: bool) -> None:
    """Follow to the end and report it. With -o json the log goes to stderr: stdout is for one document."""
    shown = output.say if as_json else output.show
    report_end(follow(backend, run, LogQuery(), lambda line: shown(output.log_line(line))))


def show_run(backend: Backend, run: str, handle: str, as_json: bool, **more: str) -> None:
    """The last of stdout: the handle, or the run's document with `more`."""
    if not as_json:
        output.show(handle)
        return
    try:
        document = backend.get(run).to_json()
    except NotFoundError:
        document = {"run": run, "deleted": True}
    output.show_json(more | document)


def still_there(backend: Backend, run: str, handle: str, seconds: float = OUTAGE_SECONDS) -> RunStatus:
    """The run's status; one that has been deleted counts as cancelled.

    seconds: how long a cluster may be out of reach.
    """
    try:
        return patiently(lambda: backend.get(run), seconds, output.say)
    except NotFoundError as error:
        raise JobCancelledError(f"{handle} has been deleted") from error


def report_end(status: RunStatus) -> None:
    """Say on stderr where the result is and how to use it.

    Raises JobFailedError or JobCancelledError with the cause and the next command when there is none.
    """
    if status.state is State.FAILED:
        raise JobFailedError(why.sentence(status), why.next_step(status))
    if status.state is State.CANCELLED:
        raise JobCancelledError(why.sentence(status), why.next_step(status))
    output.say(f"succeeded: {status.final or status.folder}")
    if status.handle.startswith(CLUSTER_SCHEME):
        output.say(f"  oslo pull {status.handle}   copies the result here, and says how to use it")
    elif status.final:
        output.say("\n" + usage(Path(status.final)))


def base_elsewhere(final: Path) -> str | None:
    """The adapter's base model, if it is a folder that this machine does not have."""
    name = (read_json(final / "adapter_config.json") or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) and name.startswith("/") and not Path(name).exists() else None


def usage(final: Path) -> str:
    """Three lines of Python that load the result."""
    is_adapter = (final / "adapter_config.json").exists()
    base = base_elsewhere(final) if is_adapter else None
    if base is not None:
        return "\n".join(
            [
                "  from peft import PeftModel; from transformers import AutoModelForCausalLM",
                f'  base = AutoModelForCausalLM.from_pretrained("PATH/OF/{Path(base).name}")  # where it is here',
                f'  model = PeftModel.from_pretrained(base, "{final}")',
            ]
        )
    package, loader = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    imports = (
        f"from {package} import {loader}; from transformers import AutoTokenizer"
        if is_adapter
        else f"from {package} import {loader}, AutoTokenizer"
    )
    return "\n".join(
        [
            f"  {imports}",
            f'  model = {loader}.from_pretrained("{final}")',
            f'  tokenizer = AutoTokenizer.from_pretrained("{final}")',
        ]
    )
