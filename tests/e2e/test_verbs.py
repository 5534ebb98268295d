"""The verbs of `oslo`, as one suite that the local backend and the cluster both pass."""

from __future__ import annotations

import json
from pathlib import Path

from stage import Place, write_job


def test_from_submit_to_a_result(place: Place, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model)
    first = place.submit(file, "--follow")
    assert first.code == 0, first.err
    run = first.handle.rpartition("/")[2]
    assert "[0] step 6/6  loss " in first.out
    assert "succeeded: " in first.err

    status = place.status(run)
    assert (status["state"], status["step"], status["total_steps"], status["attempt"]) == ("succeeded", 6, 6, 1)
    assert status["handle"] == first.handle
    assert place.oslo("wait", first.handle).code == 0
    listed = {one["run"]: one for one in json.loads(place.oslo("list", "-o", "json").out)}
    assert listed[run]["state"] == "succeeded"
    assert listed[run]["loss"] == status["loss"]

    steps = [event["step"] for event in place.events(run) if event["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    tail = place.oslo("logs", run, "--rank", "0", "--tail", "1")
    assert len(tail.out.splitlines()) == 1
    assert place.oslo("logs", run, "--grep", "step 3/6").out.count("step 3/6") == 1

    again = place.submit(file)
    assert (again.code, again.handle) == (0, first.handle)
    assert "has succeeded already" in again.err
    assert place.oslo("resume", run).code == 1
    assert place.oslo("cancel", run).code == 1

    pulled = place.oslo("pull", run, tmp_path / "result")
    assert pulled.code == 0, pulled.err
    assert (tmp_path / "result" / "adapter_model.safetensors").stat().st_size > 0
    assert place.oslo("pull", run, tmp_path / "result").code == 0  # the same again is fine
    (tmp_path / "result" / "adapter_config.json").write_text("{}")
    refused = place.oslo("pull", run, tmp_path / "result")
    assert refused.code == 1
    assert "holds other files" in refused.err

    assert place.oslo("delete", run, "-y").code == 0
    assert run not in place.oslo("list").out


def test_cancel_and_resume(place: Place, model: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path, model, max_steps=600, save_steps=1000)
    submitted = place.submit(file)
    assert submitted.code == 0, submitted.err
    run = submitted.handle.rpartition("/")[2]
    assert place.oslo("wait", run, "--timeout", "1s").code == 124
    place.until(run, lambda status: (status["step"] or 0) >= 20)
    busy = place.oslo("delete", run, "-y")
    assert busy.code == 1
    assert "oslo cancel" in busy.err
    attached = place.submit(file)
    assert (attached.code, attached.handle) == (0, submitted.handle)
    assert "is running already: attached" in attached.err

    cancelled = place.oslo("cancel", run)
    assert cancelled.code == 0, cancelled.err
    assert place.status(run)["state"] == "cancelled"
    assert place.oslo("wait", run).code == 103

    resumed = place.oslo("resume", run)
    assert resumed.code == 0, resumed.err
    place.until(run, lambda status: status["state"] == "running")
    begun = [event for event in place.events(run) if event["event"] == "resumed"]
    assert begun, "it started anew"
    assert begun[-1]["step"] >= 20
    assert place.oslo("cancel", run).code == 0


def test_a_users_fault_ends_it_at_once(place: Place, model: Path, tmp_path: Path) -> None:
    answer = place.submit(write_job(tmp_path, model, bad_row=True), "--follow")
    assert answer.code == 100, answer.err
    status = place.status(answer.handle)
    assert (status["state"], status["cause"], status["exit_code"], status["attempt"]) == ("failed", "data", 3, 1)
    assert ".jsonl:3: expected a list of messages" in status["reason"]
    assert place.oslo("wait", answer.handle).code == 100
    told = place.oslo("why", answer.handle, "-o", "json").json()
    assert told["sentence"] in answer.err
    assert (told["cause"], [attempt["cause"] for attempt in told["attempts"]]) == ("data", ["data"])


def test_what_is_not_there(place: Place) -> None:
    for verb in ("status", "why", "logs", "wait", "cancel", "resume"):
        answer = place.oslo(verb, "nobody-12345678")
        assert answer.code == 102, f"{verb}: {answer.err}"
        assert "there is no run nobody-12345678" in answer.err
