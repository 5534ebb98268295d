"""What `validate` and `submit` say of GPU memory and time, and what they refuse."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from qwen_shapes import QWEN
from stand_in import Answer

Oslo = Callable[..., Answer]
H100 = "NVIDIA-H100-80GB-HBM3"


@pytest.fixture(autouse=True)
def _without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not counted: it would take a tokenizer and seconds."""
    monkeypatch.setattr("runner.commands.config.has_train_extra", lambda: False)


@pytest.fixture
def write(sft: Path) -> Callable[..., Path]:
    """write(fast_model_args, lora, training, **job): the file of a 7B model, whose config.json lies beside it."""
    folder = sft.parent / "seven"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN["7b"]))

    def into_file(
        args: dict[str, Any] | None = None,
        *,
        lora: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        **job: Any,
    ) -> Path:
        opensloth: dict[str, Any] = {"fast_model_args": {"model_name": "seven", **(args or {})}}
        if lora:
            opensloth["lora_args"] = lora
        values = {
            "opensloth": opensloth,
            "dataset": {"path": "train.jsonl"},
            "training": training or {},
            "job": {"image": "i:1", "volume": "v", **job},
        }
        sft.write_text(yaml.safe_dump(values))
        return sft

    return into_file


@pytest.fixture
def local_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """local_gpu("81559, 9.0, NVIDIA H100"): what this machine's nvidia-smi answers."""

    def install(line: str) -> None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\necho '0, GPU-1, {line}'\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return install


def line(answer: Answer, key: str) -> str:
    return next(text for text in (answer.out + answer.err).splitlines() if text.startswith(f"{key} "))


SIXTEEN_BITS = {"load_in_4bit": False}


@pytest.mark.parametrize(
    ("gpu_memory", "keeps"),
    [
        ("80Gi", "all"),
        ("28Gi", "all in 10 layers, inputs in the others"),
        ("19Gi", "all in 1 layer, inputs in the others"),
        ("17Gi", "attention in host memory, and the MLPs of 2 layers"),
        ("15800Mi", "inputs in host memory"),
    ],
)
def test_what_is_kept_goes_by_the_memory_there_is(
    oslo: Oslo, write: Callable[..., Path], gpu_memory: str, keeps: str
) -> None:
    answer = oslo("validate", "--cluster", write(SIXTEEN_BITS, gpu_memory=gpu_memory), "-o", "json")
    assert answer.code == 0, answer.err
    found = answer.json()["plan"]["prediction"]
    assert (found["expected"]["keeps"], found["fits"], found["rough"]) == (keeps, True, False)
    assert found["expected"]["peak"] + found["context"] <= found["gpu"]["memory"]
    parts = found["expected"]
    assert parts["peak"] == sum(parts[p] for p in ("weights", "trained", "kept", "other")) + max(
        parts["loss"], parts["layer"]
    )


def test_host_memory_comes_first_where_copies_keep_up(oslo: Oslo, write: Callable[..., Path]) -> None:
    """With 7B on an H100 they do."""
    file = write(SIXTEEN_BITS, gpu_memory="20Gi", node_selector={"nvidia.com/gpu.product": H100})
    answer = oslo("validate", "--cluster", file, "-o", "json")
    found = answer.json()["plan"]["prediction"]["expected"]
    assert found["keeps"] == "attention in host memory, and the MLPs of 7 layers"


def test_the_plan_shows_memory_and_time(oslo: Oslo, write: Callable[..., Path]) -> None:
    file = write(SIXTEEN_BITS, training={"max_steps": 300}, node_selector={"nvidia.com/gpu.product": H100})
    answer = oslo("validate", "--cluster", file)
    assert answer.code == 0, answer.err
    assert re.search(
        rf"41\.\d GiB of the 79\.6 GiB of {H100} \(job\.node_selector\), keeping all for the backward pass$",
        line(answer, "memory"),
    )
    assert "weights: 14.3, trained weights and moments: 0.2, kept: 26.1, " in answer.out
    assert re.search(r"at least 14\.9 GiB, keeping inputs in host memory", answer.out)
    # 300 steps of 8 rows of 4,096 at about 17,500 tokens a second.
    assert re.search(r"about 1[78],\d00 tokens/s on each GPU, 9m\d\ds for all steps", line(answer, "speed"))


def test_a_gpu_that_nobody_names(oslo: Oslo, write: Callable[..., Path]) -> None:
    file = write()
    answer = oslo("validate", "--cluster", file)
    assert "compared with no GPU: job.gpu_memory says what one has, as in 80Gi" in answer.out
    assert oslo("validate", "--cluster", file, "-o", "json").json()["plan"]["prediction"]["fits"] is None
    assert "memory" not in oslo("validate", file).out, "no GPU here, and none is named"


def test_a_run_on_cpus_has_no_such_lines(
    oslo: Oslo, write: Callable[..., Path], local_gpu: Callable[[str], None]
) -> None:
    for file in (write(gpus_per_node=0, gpu_memory="1Gi"), write(training={"use_cpu": True}, gpu_memory="1Gi")):
        for flags in ((), ("--cluster",)):
            answer = oslo("validate", file, *flags)
            assert answer.code == 0
            assert "memory  " not in answer.out.replace("job.gpu_memory", "")
    local_gpu("4096, 8.9, NVIDIA L4")
    assert oslo("submit", write(training={"use_cpu": True}), "--local", steps=1).code == 0


def test_what_cannot_fit_is_a_problem_of_the_file(oslo: Oslo, write: Callable[..., Path]) -> None:
    answer = oslo("validate", "--cluster", write(SIXTEEN_BITS, gpu_memory="8Gi"))
    assert (answer.code, answer.out) == (2, "")
    assert "opensloth.fast_model_args.model_name: does not fit: training takes" in answer.err
    assert "and a GPU has 8.0 GiB (job.gpu_memory)" in answer.err
    assert "what makes it fit: --set opensloth.fast_model_args.load_in_4bit=true; or a GPU with" in answer.err
    (problem,) = oslo("validate", "--cluster", write(SIXTEEN_BITS, gpu_memory="8Gi"), "-o", "json").json()["problems"]
    assert problem["where"].startswith("sft.yaml:")


def proposals(answer: Answer) -> list[list[str]]:
    """The options of each way that a refusal names."""
    _, _, ways = answer.err.partition("what makes it fit: ")
    return [re.findall(r"--set [^\s;.]+(?:\.[^\s;.]+)*", way) for way in ways.split("; or ") if "--set" in way]


@pytest.mark.parametrize(
    ("args", "training", "gpu_memory"),
    [
        (SIXTEEN_BITS, {"per_device_train_batch_size": 64}, "24Gi"),
        (SIXTEEN_BITS | {"use_gradient_checkpointing": False}, {}, "24Gi"),
        (SIXTEEN_BITS | {"use_gradient_checkpointing": True}, {"per_device_train_batch_size": 32}, "20Gi"),
        (SIXTEEN_BITS, {"per_device_train_batch_size": 64}, "9Gi"),
        ({"full_finetuning": True}, {}, "40Gi"),
        (SIXTEEN_BITS, {"per_device_train_batch_size": 64, "global_batch_size": 64}, "24Gi"),
        (
            SIXTEEN_BITS,
            {"per_device_train_batch_size": 64, "global_batch_size": 64, "gradient_accumulation_steps": 1},
            "24Gi",
        ),
        (SIXTEEN_BITS | {"load_in_8bit": True}, {"per_device_train_batch_size": 1}, "8100Mi"),
    ],
)
def test_every_way_that_is_named_makes_it_fit(
    oslo: Oslo, write: Callable[..., Path], args: dict[str, Any], training: dict[str, Any], gpu_memory: str
) -> None:
    file = write(args, training=training, gpu_memory=gpu_memory)
    answer = oslo("validate", "--cluster", file)
    assert answer.code == 2
    ways = proposals(answer)
    assert ways
    for way in ways:
        sets = [word for option in way for word in option.split(" ")]
        assert oslo("validate", "--cluster", file, *sets).code == 0, way
        for option in way:
            if "batch_size" in option and len(way) == 1:
                setting, _, rows = option.removeprefix("--set ").partition("=")
                larger = oslo("validate", "--cluster", file, "--set", f"{setting}={int(rows) + 1}")
                assert larger.code == 2, "it is the largest that fits"


def test_fewer_rows_keep_the_batch(oslo: Oslo, write: Callable[..., Path]) -> None:
    training = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 23}
    answer = oslo("validate", "--cluster", write(SIXTEEN_BITS, training=training, gpu_memory="22900Mi"))
    assert ["--set training.per_device_train_batch_size=23", "--set training.gradient_accumulation_steps=64"] in (
        proposals(answer)
    )


def test_four_bits_need_their_package(
    oslo: Oslo, write: Callable[..., Path], local_gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.commands.predicting._has_bitsandbytes", lambda: False)
    local_gpu("8192, 8.9, NVIDIA L4")
    answer = oslo("submit", write({}), "--local", steps=1)
    assert answer.code == 2
    assert "load_in_4bit=true (after `pip install 'opensloth[gpu]'`)" in answer.err


def test_submit_refuses_and_gives_way_to_force(
    oslo: Oslo, write: Callable[..., Path], local_gpu: Callable[[str], None], root: Path
) -> None:
    local_gpu("8192, 8.9, NVIDIA L4")
    file = write(SIXTEEN_BITS)
    answer = oslo("submit", file, "--local", steps=1)
    assert (answer.code, answer.out) == (2, "")
    assert "NVIDIA L4 has 8.0 GiB (this machine)" in answer.err
    assert not (root / "runs").exists()
    forced = oslo("submit", file, "--local", "--force", "--follow", steps=1)
    assert forced.code == 0, forced.err
    assert "warning: does not fit" in forced.err
    assert "submitted all the same: --force" in forced.err
    again = oslo("submit", file, "--local", steps=1)
    assert again.code == 0, "it has succeeded: nothing is started"


class EmptyNamespace(BaseHTTPRequestHandler):
    """An API server's answers where nothing is, not even a claim."""

    asked_for: list[str]

    def do_GET(self) -> None:
        self.asked_for.append(self.path)
        one = self.path.partition("?")[0].rpartition("/")[2] not in ("pytorchjobs", "pods", "events")
        self._answer(404 if one else 200, {"kind": "Status", "code": 404} if one else {"items": []})

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.mark.enable_socket
@pytest.mark.filterwarnings("ignore:HTTPResponse.getheader:DeprecationWarning")  # the cluster's client
def test_a_cluster_is_asked_for_nothing_that_cannot_fit(oslo: Oslo, write: Callable[..., Path], tmp_path: Path) -> None:
    EmptyNamespace.asked_for = []
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyNamespace) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kubeconfig = tmp_path / "kubeconfig"
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "oslo"}}
        entries = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
        kubeconfig.write_text(yaml.safe_dump({"current-context": "c", **entries}))
        file = write(SIXTEEN_BITS, gpu_memory="8Gi")
        answer = oslo("submit", file, "--kubeconfig", kubeconfig)
        assert (answer.code, answer.out) == (2, "")
        assert "of the 8.0 GiB of a GPU (job.gpu_memory)" in line(answer, "memory")
        assert "does not fit" in answer.err
        assert not any("claims" in path for path in EmptyNamespace.asked_for), "it has not come to that"
        forced = oslo("submit", file, "--kubeconfig", kubeconfig, "--force")
        server.shutdown()
    assert forced.code == 1, "there is no claim"
    assert "submitted all the same: --force" in forced.err
    assert any("claims" in path for path in EmptyNamespace.asked_for)


def test_the_rest_is_started_without_a_word_of_warning(
    oslo: Oslo, write: Callable[..., Path], local_gpu: Callable[[str], None]
) -> None:
    local_gpu("81559, 9.0, NVIDIA H100 80GB HBM3")
    answer = oslo("submit", write(SIXTEEN_BITS), "--local", "--follow", steps=1)
    assert answer.code == 0
    assert "79.6 GiB of NVIDIA H100 80GB HBM3 (this machine)" in line(answer, "memory")
    assert "does not fit" not in answer.err


def test_plain_torch_is_a_rough_estimate_that_refuses_clear_cases_only(oslo: Oslo, write: Callable[..., Path]) -> None:
    """Between the card's memory and 1.25 of it the estimate is not good enough."""
    dropout = {"r": 8, "lora_dropout": 0.1}
    found = oslo("validate", "--cluster", write(SIXTEEN_BITS, lora=dropout), "-o", "json").json()["plan"]["prediction"]
    assert found["why_not_fused"] == "the fast path has no adapter dropout"
    assert found["rough"] is True
    assert found["tokens_per_second"] is None
    assert found["smallest"]["peak"] < found["expected"]["peak"], "targets are not counted: there may be few"
    takes = (found["smallest"]["peak"] + found["context"]) / (1 << 20)
    for share, code in ((1.1, 0), (1.3, 2)):
        file = write(SIXTEEN_BITS, lora=dropout, gpu_memory=f"{int(takes / share)}Mi")
        answer = oslo("validate", "--cluster", file)
        assert answer.code == code, share
        assert "about" in (answer.out + answer.err)


def test_defaults_that_give_way_here_are_counted_as_what_they_give_way_to(
    oslo: Oslo, write: Callable[..., Path], local_gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bitsandbytes neither weights in 4 bits nor moments in 8."""
    local_gpu("183359, 10.0, NVIDIA B200")
    found = {}
    for installed in (True, False):
        monkeypatch.setattr("runner.commands.predicting._has_bitsandbytes", lambda there=installed: there)
        for args in ({}, {"full_finetuning": True}):
            plan = oslo("validate", write(args), "-o", "json").json()["plan"]
            found[installed, bool(args)] = plan["prediction"]["smallest"]
    assert found[True, False]["weights"] < found[False, False]["weights"] / 2
    assert found[False, True]["trained"] == found[True, True]["trained"] * 20 // 10


def test_unpacked_rows_are_never_refused(oslo: Oslo, write: Callable[..., Path]) -> None:
    """They are as long as their documents, which nobody has counted."""
    file = write(SIXTEEN_BITS, gpu_memory="1Gi")
    answer = oslo("validate", "--cluster", file, "--set", "opensloth.sequence_packing=false", "-o", "json")
    assert answer.code == 0, answer.err
    assert answer.json()["plan"]["prediction"]["fits"] is None


def test_a_window_shorter_than_a_row_is_no_reason_to_refuse(oslo: Oslo, write: Callable[..., Path]) -> None:
    """What counts is the longest document, which nobody has looked for yet."""
    file = write(SIXTEEN_BITS, gpu_memory="1Gi")
    windowed = QWEN["7b"] | {"use_sliding_window": True, "sliding_window": 1024}
    (file.parent / "seven" / "config.json").write_text(json.dumps(windowed))
    answer = oslo("validate", "--cluster", file, "-o", "json")
    assert answer.code == 0, answer.err
    found = answer.json()["plan"]["prediction"]
    assert (found["fits"], found["why_not_fused"]) == (
        None, "documents may be longer than the attention window of 1024",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [(None, "config.json cannot be read here"), ({"model_type": "gpt2"}, "its config.json has no usable hidden_size")],
)
def test_a_model_whose_sizes_are_not_to_be_had(
    oslo: Oslo, write: Callable[..., Path], config: dict[str, Any] | None, reason: str
) -> None:
    file = write(gpu_memory="1Gi")
    path = file.parent / "seven" / "config.json"
    path.unlink()
    if config is not None:
        path.write_text(json.dumps(config))
    answer = oslo("validate", "--cluster", file)
    assert answer.code == 0
    assert (
        line(answer, "memory")
        .partition("not predicted: ")[2]
        .endswith((reason, f"{reason}: No such file or directory"))
    )
    plan = oslo("validate", "--cluster", file, "-o", "json").json()["plan"]
    assert plan["prediction"] is None
    assert reason in plan["not_predicted"]


def test_the_hub_is_not_asked_when_it_must_not_be(oslo: Oslo, write: Callable[..., Path]) -> None:
    """HF_HUB_OFFLINE is set in every test."""
    file = write({"model_name": "team/model"}, gpu_memory="1Gi")
    answer = oslo("validate", "--cluster", file)
    assert answer.code == 0
    assert (
        "not predicted: team/model is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set" in answer.out
    )


def test_gpu_memory_is_not_part_of_the_run(oslo: Oslo, write: Callable[..., Path]) -> None:
    one, other, none = (oslo("render", write(**job)).out for job in ({"gpu_memory": "80Gi"}, {"gpu_memory": 24e9}, {}))
    assert one == other == none
