"""Whatever stands in a config file, in a defaults file or behind --set: a checked config, or one InvalidFileError."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_cases import BAD_CASES, GOOD_CASES
from fuzz import AMOUNTS, ODD_TEXTS, fuzz, is_one_sentence, mutated_bytes, odd_value

from opensloth.opensloth_config import DatasetArgs, FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.run_config import dump, load
from opensloth.training_keys import FIXED, REFUSED
from runner.config_file import Target, load_file
from runner.errors import InvalidFileError
from runner.spec import JobArgs, TolerationArgs, VolumeArgs

LONGEST_PROBLEM = 2150
MOST_LINES = 102

VALUES: dict[str, Any] = {
    "name": "support-bot",
    "training_type": "sft",
    "opensloth": {
        "data_cache_path": "cache",
        "devices": [0, 1],
        "fast_model_args": {"model_name": "a/b", "max_seq_length": 512, "load_in_4bit": True},
        "lora_args": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]},
        "sequence_packing": True,
    },
    "dataset": [{"path": "train.jsonl", "columns": {"prompt": "q", "completion": "a"}, "chat_template": "chatml"}],
    "training": {"learning_rate": 2e-4, "num_train_epochs": 3, "global_batch_size": 32, "lr_scheduler_type": "cosine"},
    "job": {
        "image": "registry.example/opensloth:1.0",
        "volume": "training",
        "nodes": 2,
        "memory": "64Gi",
        "env": {"A": "b"},
        "secrets": {"HF_TOKEN": "hf/token"},
        "labels": {"team": "x"},
        "tolerations": [{"key": "gpu", "effect": "NoSchedule"}],
        "volumes": [{"mount_path": "/data", "claim": "data"}],
        "deadline": "12h",
    },
}
SECTIONS: dict[str, Any] = {
    "": ("name", "training_type", "opensloth", "dataset", "training", "job", "explicit"),
    "opensloth": tuple(OpenSlothConfig.model_fields),
    "opensloth.fast_model_args": tuple(FastModelArgs.model_fields),
    "opensloth.lora_args": tuple(LoraArgs.model_fields),
    "dataset": tuple(DatasetArgs.model_fields),
    "dataset[0]": tuple(DatasetArgs.model_fields),
    "dataset[0].columns": ("prompt", "completion", "messages"),
    "training": (*TrainingArguments.model_fields, *FIXED, *REFUSED),
    "training.lr_scheduler_kwargs": ("num_cycles", "min_lr"),
    "job": tuple(JobArgs.model_fields),
    "job.cache": ("volume", "read_only"),
    "job.env": ("A", "RANK", "HF_TOKEN", "PET_X", "a-b"),
    "job.labels": ("a", "a/b", "opensloth/x", "A" * 70),
    "job.volumes[0]": (*VolumeArgs.model_fields, "hostPath"),
    "job.tolerations[0]": tuple(TolerationArgs.model_fields),
}
FITTING: dict[str, list[tuple[str, Any]]] = {
    where: [
        (name, field.get_default(call_default_factory=True))
        for name, field in fields.items()
        if not field.is_required()
    ]
    for where, fields in {
        "opensloth": OpenSlothConfig.model_fields,
        "opensloth.fast_model_args": FastModelArgs.model_fields,
        "opensloth.lora_args": LoraArgs.model_fields,
        "training": TrainingArguments.model_fields,
        "job": JobArgs.model_fields,
    }.items()
}
"""Keys with a value that each may have."""
TEXTS = [case.text for case in (*GOOD_CASES, *BAD_CASES)]
WORDS = tuple(
    word.encode("utf-8", "surrogatepass")
    for word in (
        "&a ", "*a", "*b", "<<: *a\n", "<<: {}\n", "!!str ", "!!int ", "!!float ", "!!bool ", "!!null ",
        "!!binary ", "!!set ", "!!python/object/apply:os.system [x]\n", "!local ", "! ", "!<tag:x> ", "\n---\n",
        "\n...\n", "%YAML 1.1\n---\n", "%TAG ! x:\n---\n", "\t", "? ", ": ", "- ", ", ", "|\n", ">-\n", "|99\n",
        '"', "'", "#", "\0", "\x07", "\ufeff", "\u2028", "\x85", "[", "]", "{", "}", "[" * 60, "{a: " * 60, "\n",
        "\r", "\r\n", "  ", "\n  ", "9" * 5000, "0x" + "f" * 5000, "1e999", "-.inf", ".nan", "~", "null", "0o777",
        "\\", "\\ud800", '"\\ud800"', '"\\x00"', '"\\e[31m"', "@", "`", "=", "a: 1\na: 2\n", "true: 1\n", "1: 2\n",
        "[a]: b\n", "explicit: [x]\n", *ODD_TEXTS,
    )
)  # fmt: skip


@pytest.mark.parametrize("amount", AMOUNTS)
def test_config_files(scratch: Path, monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    monkeypatch.chdir(scratch)
    (scratch / "train.jsonl").write_text("{}\n")
    (scratch / "bad.jinja").write_bytes(b"\xff")
    targets = (Target(scratch), Target.of_cluster())

    def case(r: random.Random) -> str:
        path, defaults = scratch / "sft.yaml", scratch / "defaults.yaml"
        path.write_bytes(config_text(r))
        has_defaults = r.random() < 0.1
        if has_defaults:
            defaults.write_bytes(defaults_text(r))
        sets = [override(r) for _ in range(r.choice((0, 0, 0, 0, 1, 2)))]
        try:
            loaded = load_file(path, sets, defaults if has_defaults else None, r.choice(targets))
        except InvalidFileError as error:
            lines = str(error).splitlines()
            assert len(lines) <= MOST_LINES, f"{len(lines)} lines"
            for line in lines:
                assert is_one_sentence(line, LONGEST_PROBLEM), ascii(line)
            return "refused"
        assert load(dump(loaded.run)) == loaded.run
        return "ok"

    outcomes = fuzz("config files", case, amount)
    assert min(outcomes["ok"], outcomes["refused"]) > amount / 50


def config_text(r: random.Random) -> bytes:
    kind = r.random()
    if kind < 0.005:
        return heavy(r)
    if kind < 0.3:
        text = r.choice(TEXTS)
    else:
        values = copy.deepcopy(VALUES)
        for key in r.sample(sorted(values), r.randrange(3)):
            if key not in ("opensloth", "dataset"):
                del values[key]
        for _ in range(r.choice((0, 1, 1, 2, 3))):
            mutate_values(r, values)
        text = as_yaml(r, values)
    data = text.encode("utf-8", "surrogatepass")
    if r.random() < 0.35:
        data = mutated_bytes(r, data, WORDS)
    if r.random() < 0.01:
        data = data.decode("utf-8", "replace").encode(r.choice(("utf-16", "utf-32", "utf-8-sig")), "replace")
    return data


def defaults_text(r: random.Random) -> bytes:
    values = {"job": copy.deepcopy(VALUES["job"])}
    mutate_values(r, values)
    data = as_yaml(r, values).encode("utf-8", "surrogatepass")
    return mutated_bytes(r, data, WORDS) if r.random() < 0.4 else data


def mutate_values(r: random.Random, values: dict[str, Any]) -> None:
    """Change one place of a tree of values: a known or unknown key, a wrong type, something missing."""
    places = list(_containers(values, ""))
    where, container = r.choice(places)
    if isinstance(container, list):
        container.insert(r.randint(0, len(container)), odd_value(r))
        return
    known = SECTIONS.get(where, ())
    match r.randrange(8):
        case 0 if container:
            del container[r.choice(sorted(container, key=str))]
        case 1:
            container[r.choice(ODD_TEXTS)] = odd_value(r)
        case 2 if container:
            key = r.choice(sorted(container, key=str))
            container[key + r.choice("sx.[")] = container.pop(key)
        case 3 if container:
            container[r.choice(sorted(container, key=str))] = odd_value(r)
        case 4 if known:
            container[r.choice(known)] = odd_value(r)
        case _ if where in FITTING:
            container |= dict([r.choice(FITTING[where])])


def _containers(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield where, value
        for key, item in value.items():
            yield from _containers(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        yield where, value
        for index, item in enumerate(value):
            yield from _containers(item, f"{where}[{index}]")


def as_yaml(r: random.Random, value: Any, indent: int = 0) -> str:
    """Block or flow style, by chance, level by level."""
    if isinstance(value, dict) and value and r.random() < 0.8:
        lines = []
        for key, item in value.items():
            nested = isinstance(item, dict | list) and bool(item)
            inner = as_yaml(r, item, indent + 2)
            lines.append(
                " " * indent + scalar(r, key) + (":\n" + inner if nested and "\n" in inner else ": " + inner.strip())
            )
        return "\n".join(lines) + "\n"
    return scalar(r, value)


def scalar(r: random.Random, value: Any) -> str:
    if isinstance(value, str) and value.isascii() and value.replace("_", "").isalnum() and r.random() < 0.8:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 10**30:
        return "9" * r.choice((31, 400, 4301))
    text = json.dumps(value, ensure_ascii=r.random() < 0.5)
    return text.replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")


def heavy(r: random.Random) -> bytes:
    """What costs time or memory if it is read carelessly."""
    n = r.choice((10, 100, 1_000, 3_000))
    good = TEXTS[0]
    return r.choice(
        (
            "a: " + "[" * n + "]" * n,
            "a: " + "{b: " * n,
            "- " * n,
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 8)),
            "a0: &a0 {k: x}\n" + "".join(f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}}}\n" for i in range(1, n)),
            good + "".join(f"key{i}: {i}\n" for i in range(n)),
            good + "training:\n" + "".join(f"  key{i}: {i}\n" for i in range(n)),
            good + f"{'k' * n * 100}: 1\n",
            good + f"training: {{{'k' * n * 100}: 1}}\n",
            good + f"training: {{optim: {'k' * n * 100}}}\n",
            good + f"training: {{seed: {'7' * n * 100}}}\n",
            good + f"training: {{seed: 0x{'7' * n * 100}}}\n",
            good + f"training: {{learning_rate: 1e{'7' * n}}}\n",
            good + f"name: {'-' * n * 100}x\n",
            good + "training: {" + "? " * n + "}\n",
            good + f"training: {{report_to: [{', '.join(['x'] * n)}]}}\n",
            "dataset: [" + ", ".join(["{path: x, format: y}"] * n) + "]\n" + good.split("\n")[0] + "\n",
            f"opensloth: {{devices: [{', '.join(map(str, range(n)))}], fast_model_args: {{model_name: a/b}}}}\n",
            good + f"job: {{labels: {{{', '.join(f'k{i}: v' for i in range(n))}}}}}\n",
            good + f"job: {{memory: {'9' * n * 10}Gi, deadline: {'9' * n}h}}\n",
            "\n" * n * 100 + good,
            "#" * n * 100 + "\n" + good,
            good + "a: |\n" + "  x\n" * n * 10,
            "%TAG !x! tag:y:\n" * n + "---\n" + good,
        )
    ).encode()


def override(r: random.Random) -> str:
    where = r.choice(sorted(SECTIONS))
    key = r.choice(SECTIONS[where]) if r.random() < 0.9 else r.choice(ODD_TEXTS)
    value = r.choice(
        (
            "1", "0.5", "x", "null", "", "[]", "{}", "{a: 1}", "[1", "&a [*a]", "!!x y", "a: b: c", "'", "\t",
            "true", "9" * 5000, "[" * 100, "\x1b[31m", "\udcff", "\ud800", "---", "a\nb", *ODD_TEXTS,
        )
    )  # fmt: skip
    text = f"{where}.{key}={value}" if where else f"{key}={value}"
    if r.random() < 0.3:
        at = r.randint(0, len(text))
        text = (
            text[:at]
            + r.choice((".", "[", "]", "[0]", "[99999999999999999999]", "=", "..", "[-1]", "[٣]", " ", "\0"))
            + text[at:]
        )
    return text
