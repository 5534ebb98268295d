"""Good and bad files, each with its exact message."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_cases import BAD_CASES, GOOD_CASES, Case
from golden import assert_golden

from opensloth.fingerprint import source_sha256
from runner.config_file import LoadedFile, Target, load_file
from runner.data_paths import hash_in
from runner.errors import InvalidFileError

DOC = Path(__file__).parents[2] / "docs" / "config-errors.md"
SHARED = Path("/shared")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}\n")


def load(case: Case) -> LoadedFile:
    Path("sft.yaml").write_text(case.text)
    defaults = None
    if case.defaults is not None:
        defaults = Path("defaults.yaml")
        defaults.write_text(case.defaults)
    target = Target(SHARED, SHARED / "inputs") if case.cluster else Target(Path("/root-of-tests"))
    return load_file(Path("sft.yaml"), case.sets, defaults, target)


@pytest.mark.parametrize("case", GOOD_CASES, ids=lambda case: case.title)
def test_good_files(case: Case) -> None:
    assert load(case).run.name == "sft"


@pytest.mark.parametrize("case", BAD_CASES, ids=lambda case: case.title)
def test_bad_files(case: Case) -> None:
    with pytest.raises(InvalidFileError) as caught:
        load(case)
    assert [line.strip() for line in str(caught.value).splitlines()] == case.says
    assert caught.value.exit_code == 2


def test_the_docs_have_every_case() -> None:
    assert_golden(DOC, as_markdown())


def test_paths_are_made_absolute(tmp_path: Path) -> None:
    loaded = load(Case("", GOOD_CASES[0].text + "training: {output_dir: out}\n"))
    assert loaded.run.dataset is not None
    assert loaded.run.dataset[0].path == str(tmp_path / "train.jsonl")
    assert loaded.run.opensloth.data_cache_path == "/root-of-tests/cache"
    assert loaded.run.training.output_dir == str(tmp_path / "out")
    assert loaded.sources == {str(tmp_path / "train.jsonl"): tmp_path / "train.jsonl"}


def test_on_a_cluster_local_data_is_named_by_its_hash() -> None:
    text = GOOD_CASES[0].text.replace("}\n", "}\n", 1) + "job: {image: i, volume: v, gpus_per_node: 2}\n"
    loaded = load(Case("", text, cluster=True))
    assert loaded.run.dataset is not None
    digest = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    assert loaded.run.dataset[0].path == f"/shared/inputs/{digest}/train.jsonl"
    assert loaded.run.opensloth.data_cache_path == "/shared/cache"
    assert loaded.run.opensloth.devices == [0, 1]


def test_a_path_of_the_volume() -> None:
    text = "opensloth: {fast_model_args: {model_name: a/b}}\ndataset: {path: 'pvc:d/x.jsonl'}\n"
    loaded = load(Case("", f"{text}job: {{image: i, volume: v}}\n", cluster=True))
    assert loaded.run.dataset is not None
    assert loaded.run.dataset[0].path == "/shared/d/x.jsonl"


CLUSTER = "job: {image: i, volume: v}\n"


def folder(path: str, **files: str) -> Path:
    """files: name without `.json` -> content."""
    Path(path).mkdir(parents=True)
    for name, text in files.items():
        Path(path, f"{name}.json").write_text(text)
    return Path(path).resolve()


def test_on_a_cluster_folders_of_this_machine_are_inputs() -> None:
    model, lora = folder("m", config="{}"), folder("lora", adapter_config="{}")
    checkpoint = folder("runs/step-00000020", manifest="{}")
    text = (
        "opensloth: {fast_model_args: {model_name: m}, pretrained_lora: ./lora}\ndataset: {path: train.jsonl}\n"
        f"training: {{resume_from_checkpoint: {checkpoint}}}\n{CLUSTER}"
    )
    loaded = load(Case("", text, cluster=True))
    named = {seen: local for seen, local in loaded.sources.items() if local.is_dir()}
    assert named == {
        f"/shared/inputs/{source_sha256(local)}/{local.name}": local for local in (model, lora, checkpoint)
    }
    found = (
        loaded.run.opensloth.fast_model_args.model_name,
        loaded.run.opensloth.pretrained_lora,
        loaded.run.training.resume_from_checkpoint,
    )
    assert found == tuple(named)
    assert {hash_in(seen) for seen in named} == {source_sha256(local) for local in named.values()}


def test_on_a_cluster_a_folder_is_checked_as_here() -> None:
    folder("empty")
    text = f"{GOOD_CASES[0].text}{CLUSTER}"
    with pytest.raises(InvalidFileError, match=r"empty is no adapter: it holds no adapter_config\.json"):
        load(Case("", text, sets=("opensloth.pretrained_lora=empty",), cluster=True))


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("a/b", "a/b"),
        ("pvc:models/a", "/shared/models/a"),
        ("pvc:/models/a", "/shared/models/a"),
        ("/shared/models/a", "/shared/models/a"),
        ("/models/of/the/image", "/models/of/the/image"),
    ],
)
def test_models_that_only_pods_see_stay_as_they_are(given: str, resolved: str) -> None:
    sets = (f"opensloth.fast_model_args.model_name={given}",)
    loaded = load(Case("", f"{GOOD_CASES[0].text}{CLUSTER}", sets=sets, cluster=True))
    assert loaded.run.opensloth.fast_model_args.model_name == resolved
    assert [local.name for local in loaded.sources.values()] == ["train.jsonl"]


def test_in_a_local_run_a_model_folder_is_read_in_place() -> None:
    model = folder("m", config="{}")
    loaded = load(Case("", GOOD_CASES[0].text, sets=("opensloth.fast_model_args.model_name=m",)))
    assert loaded.run.opensloth.fast_model_args.model_name == str(model)
    assert [local.name for local in loaded.sources.values()] == ["train.jsonl"]


def test_the_grace_period_says_where_it_comes_from() -> None:
    full = ("opensloth.fast_model_args={model_name: a/model-7b, full_finetuning: true}",)
    loaded = load(Case("", GOOD_CASES[0].text, sets=full))
    assert loaded.job.grace_period == "270s"
    assert loaded.origins["job.grace_period"] == "derived: a checkpoint of 42.0 GB at 200 MB/s"
    loaded = load(Case("", GOOD_CASES[0].text, sets=(*full, "job.grace_period=10m")))
    assert loaded.job.grace_period == "10m"
    assert loaded.origins["job.grace_period"] == "--set job.grace_period=10m"


def test_a_template_file_is_read(tmp_path: Path) -> None:
    Path("chat.jinja").write_text("{{ messages }}")
    loaded = load(Case("", GOOD_CASES[0].text, sets=("dataset.chat_template=chat.jinja",)))
    assert loaded.run.dataset is not None
    assert loaded.run.dataset[0].chat_template == "{{ messages }}"


def test_a_template_file_that_is_not_utf8_is_a_problem_at_its_key() -> None:
    Path("chat.jinja").write_bytes(b"{{ messages }}\n\xe9")
    with pytest.raises(InvalidFileError) as caught:
        load(Case("", GOOD_CASES[0].text, sets=("dataset.chat_template=chat.jinja",)))
    (problem,) = caught.value.problems
    assert problem.path == "dataset.chat_template"
    assert problem.message == "chat.jinja: line 2: byte 0xe9 is not UTF-8: save the file as UTF-8"


def test_folders_to_go_on_from_are_made_absolute(tmp_path: Path) -> None:
    for folder, marker in (("adapter", "adapter_config.json"), ("step-00000020", "manifest.json")):
        Path(folder).mkdir()
        Path(folder, marker).write_text("{}")
    sets = ("opensloth.pretrained_lora=adapter", "training.resume_from_checkpoint=step-00000020")
    run = load(Case("", GOOD_CASES[0].text, sets=sets)).run
    assert run.opensloth.pretrained_lora == str(tmp_path / "adapter")
    assert run.training.resume_from_checkpoint == str(tmp_path / "step-00000020")
    assert load(Case("", GOOD_CASES[0].text, sets=("training.resume_from_checkpoint=true",))).run.training == (
        run.training.model_copy(update={"resume_from_checkpoint": True})
    )


def test_a_folder_that_is_no_adapter_and_one_that_is_no_checkpoint(tmp_path: Path) -> None:
    Path("empty").mkdir()
    sets = ("opensloth.pretrained_lora=empty", "training.resume_from_checkpoint=empty")
    with pytest.raises(InvalidFileError) as caught:
        load(Case("", GOOD_CASES[0].text, sets=sets))
    assert {(problem.path, problem.message) for problem in caught.value.problems} == {
        ("opensloth.pretrained_lora", "empty is no adapter: it holds no adapter_config.json"),
        ("training.resume_from_checkpoint", "empty is no checkpoint: it holds no manifest.json"),
    }


def test_origins() -> None:
    case = Case(
        "",
        GOOD_CASES[0].text + "job:\n  nodes: 2\n  env: {A: x}\n",
        sets=("job.gpus_per_node=4", "training.seed=7"),
        defaults="job:\n  image: i\n  nodes: 9\n  env: {A: y, B: z}\n",
    )
    loaded = load(case)
    assert (loaded.job.nodes, loaded.job.gpus_per_node, loaded.job.env) == (2, 4, {"A": "x", "B": "z"})
    origins = loaded.origins
    assert origins["job.nodes"] == "sft.yaml:4"
    assert origins["job.image"] == "defaults.yaml:2"
    assert origins["job.env.A"] == "sft.yaml:5"
    assert origins["job.env.B"] == "defaults.yaml:4"
    assert origins["job.gpus_per_node"] == "--set job.gpus_per_node=4"
    assert origins["training.seed"] == "--set training.seed=7"
    assert loaded.run.training.seed == 7


def test_a_secret_in_a_set_is_never_shown() -> None:
    secret = "hf_" + "a1B2" * 8
    for argument in (f"job.env.NAME={secret}", f"job.env={{NAME: {secret}}}", f"training.hub_token={secret}"):
        with pytest.raises(InvalidFileError) as caught:
            load(Case("", GOOD_CASES[0].text, sets=(argument,)))
        assert secret not in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    Path("sft.yml").write_text("")
    with pytest.raises(InvalidFileError, match=r"cannot be read: No such file or directory \(did you mean sft.yml\?\)"):
        load_file(Path("sft.yaml"), (), None, Target(SHARED))


def test_a_file_that_is_not_utf8() -> None:
    Path("sft.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(InvalidFileError, match="line 2: byte 0xff is not UTF-8"):
        load_file(Path("sft.yaml"), (), None, Target(SHARED))


def message_of(text: str, *sets: str) -> str:
    with pytest.raises(InvalidFileError) as caught:
        load(Case("", text, sets=sets))
    return str(caught.value)


def test_what_a_terminal_would_obey_is_escaped_in_messages() -> None:
    said = message_of(GOOD_CASES[0].text + '"\\e[31m\\n": 1\n', "training.seed=\x1b[2J")
    assert "sft.yaml:3: \\x1b[31m\\n: unknown key" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_a_message_has_an_end() -> None:
    said = message_of(GOOD_CASES[0].text + f"{'k' * 1_000}: 1\n" + "".join(f"k{i}: 1\n" for i in range(2_000)))
    assert said.splitlines()[0] == "2001 problems in sft.yaml:"
    assert said.splitlines()[-1] == "  and 1901 more"
    assert max(map(len, said.splitlines())) < 1_000


@pytest.mark.parametrize("path", ["x" * 5_000 + ".jsonl", "~nosuchuser/x.jsonl", "x/" * 3_000 + "x"])
def test_a_path_that_can_be_none_is_not_there(path: str) -> None:
    said = message_of(GOOD_CASES[0].text, f"dataset.path={path}", f"dataset.chat_template={path}.jinja")
    assert said.count("no such file") == 2


def test_a_home_of_nobody_is_a_folder_of_that_name(tmp_path: Path) -> None:
    loaded = load(Case("", GOOD_CASES[0].text, sets=("training.output_dir=~nosuchuser/out",)))
    assert loaded.run.training.output_dir == str(tmp_path / "~nosuchuser" / "out")


def test_infinity_among_the_schedules_arguments_would_be_lost_on_the_way() -> None:
    said = message_of(GOOD_CASES[0].text + "training: {lr_scheduler_kwargs: {min_lr: .inf}}\n")
    assert "sft.yaml:3: training.lr_scheduler_kwargs: expected finite numbers" in said


@pytest.mark.parametrize(
    ("text", "exists"),
    [("OWNER/NAME", True), ("imdb", True), ("data/NAME", False), ("NAME.jsonl", False), ("./x", False)],
)
def test_what_counts_as_a_hub_name(text: str, exists: bool) -> None:
    Path("data").mkdir()
    case = Case("", f"opensloth: {{fast_model_args: {{model_name: a/b}}}}\ndataset: {{path: {text}}}\n")
    if exists:
        assert load(case).sources == {}
    else:
        with pytest.raises(InvalidFileError, match="no such file or folder"):
            load(case)


def as_markdown() -> str:
    lines = [
        "# Config files and what oslo says to them",
        "",
        "Generated from the tests (tests/support/config_cases.py). Beside each `sft.yaml` lies a `train.jsonl`.",
        "A file with problems ends every command with exit code 2; all problems are said at once.",
        "",
        "## Files with problems",
    ]
    for case in BAD_CASES:
        lines += [*_head(case), "```text", *(_indented(case.says)), "```"]
    lines += ["", "## Files without problems"]
    for case in GOOD_CASES:
        lines += _head(case)
    return "\n".join(lines) + "\n"


def _head(case: Case) -> list[str]:
    lines = ["", f"### {case.title}", "", "```yaml", *case.text.rstrip("\n").split("\n"), "```"]
    if case.defaults is not None:
        lines += ["", "with this defaults.yaml:", "", "```yaml", *case.defaults.rstrip("\n").split("\n"), "```"]
    if case.sets:
        lines += ["", "with " + " ".join(f"`--set '{argument}'`" for argument in case.sets) + ":"]
    if case.cluster:
        lines += ["", "for a cluster (`oslo render`):"]
    return [*lines, ""] if not case.is_good else lines


def _indented(says: list[str]) -> list[str]:
    return [says[0], *(f"  {line}" for line in says[1:])]
