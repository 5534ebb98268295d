"""From files to a prepared dataset: counts, policies, splits, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_tools import Events, chat, make_tokenizer, write_jsonl

from opensloth.data.built import BuiltData
from opensloth.data.documents import IGNORE
from opensloth.data.prepared import EVAL_DIR, PreparedDataset, weighted
from opensloth.errors import DataError

Build = Callable[..., BuiltData]


def rows(count: int, *, length: int = 1) -> list[dict[str, Any]]:
    return [{"messages": chat(f"say {i}", " ".join([str(i)] * length))} for i in range(count)]


def contents(data: PreparedDataset) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in map(data.row, range(len(data)))]


def test_what_is_built_is_what_is_read(tmp_path: Path, built: Build, events: Events) -> None:
    result = built(write_jsonl(tmp_path / "a.jsonl", rows(40)))
    data = PreparedDataset.open(result.path)
    assert (result.documents, result.reused, result.eval_documents) == (40, False, 0)
    assert len(data) == len(data.lengths) == len(data.targets) == 40
    tokenizer = make_tokenizer()
    for i in range(40):
        ids, labels = data.row(i)
        assert ids.dtype == labels.dtype == np.int32
        assert len(ids) == data.lengths[i]
        assert (labels[1:] != IGNORE).sum() == data.targets[i]
        assert not ids.flags.owndata  # a view of the file
        assert not ids.flags.writeable
        assert tokenizer.decode(ids[labels != IGNORE]) == f"{i}<|im_end|>"
    assert result.tokens == data.lengths.sum()
    assert result.target_tokens == data.targets.sum()
    assert result.rows == -(-result.tokens // 512)
    assert result.row_fill == pytest.approx(result.tokens / (result.rows * 512))
    assert result.sources[0]["kept"] == result.sources[0]["read"] == 40
    assert f"{tmp_path / 'a.jsonl'}: format messages (detected from the columns)" in events.notes()
    progress = [event for event in events.seen if event["event"] == "progress"]
    last = {"event": "progress", "phase": "tokenise", "done": 40, "total": 40, "unit": "rows"}
    assert progress[-1] == last
    assert progress.count(last) == 1


def test_without_packing_each_document_is_a_row(tmp_path: Path, built: Build) -> None:
    assert built(write_jsonl(tmp_path / "a.jsonl", rows(5)), packing=False).rows == 5


def test_datasets_opens_what_was_written(tmp_path: Path, built: Build) -> None:
    from datasets import load_from_disk

    result = built(write_jsonl(tmp_path / "a.jsonl", rows(6)))
    loaded = load_from_disk(f"{result.path}/train")
    data = PreparedDataset.open(result.path)
    assert [(row["input_ids"], row["labels"]) for row in loaded] == contents(data)
    loaded.map(lambda row: row)  # the features it declares are those of the file


def test_a_plain_save_to_disk_folder_is_a_prepared_dataset(tmp_path: Path, built: Build, events: Events) -> None:
    from datasets import Dataset

    ids = [[1, 2, 3], [4, 5], list(range(9)), [6, 7]]
    labels = [[1, -100, 3], [-100, 5], [-100] * 8 + [8], [6, 7]]
    Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(tmp_path / "saved")
    data = PreparedDataset.open(tmp_path / "saved")
    assert contents(data) == list(zip(ids, labels, strict=True))
    assert data.lengths.tolist() == [3, 2, 9, 2]
    assert data.targets.tolist() == [1, 1, 1, 1]
    assert data.epoch_documents().tolist() == [0, 1, 2, 3]
    result = built(cache=tmp_path / "saved", max_seq_length=8)
    assert (result.path, result.documents, result.tokens) == (str(tmp_path / "saved"), 3, 7)
    assert "leaving out 1 of 4 rows over max_seq_length 8" in events.notes("warning")[0]
    short = PreparedDataset.open(tmp_path / "saved", max_length=8)
    assert contents(short) == [(ids[i], labels[i]) for i in (0, 1, 3)]


def save_splits(folder: Path, **splits: list[list[int]]) -> Path:
    from datasets import Dataset, DatasetDict

    saved = {name: Dataset.from_dict({"input_ids": ids, "labels": ids}) for name, ids in splits.items()}
    DatasetDict(saved).save_to_disk(folder)
    return folder


GOOD, LONG, UNFIT = [1, 2, 3], [1] * 9, [1, 9999]


def test_which_splits_are_used(tmp_path: Path, built: Build, events: Events) -> None:
    folder = save_splits(tmp_path / "three", train=[GOOD] * 3, validation=[GOOD] * 2, test=[GOOD])
    result = built(cache=folder)
    assert (result.documents, result.eval_documents, result.eval_target_tokens) == (3, 2, 4)
    assert [(source["path"], source["evaluation"]) for source in result.sources] == [
        (f"{folder}/train", False), (f"{folder}/validation", True),
    ]  # fmt: skip
    assert len(PreparedDataset.open(folder, EVAL_DIR)) == 2
    folder = save_splits(tmp_path / "two", train=[GOOD], test=[GOOD])
    assert built(cache=folder).eval_documents == 0
    assert events.notes("info") == [
        f"{tmp_path}/three: of its splits, 'train' is trained, 'validation' is evaluated, 'test' not used",
        f"{tmp_path}/two: of its splits, 'train' is trained, none is evaluated, 'test' not used",
    ]
    save_splits(tmp_path / "both", train=[GOOD], eval=[GOOD] * 2, validation=[GOOD] * 3)
    assert built(cache=tmp_path / "both").eval_documents == 2


def test_the_evaluation_part_of_a_prepared_dataset_is_checked_too(tmp_path: Path, built: Build, events: Events) -> None:
    folder = save_splits(tmp_path / "unfit", train=[GOOD], eval=[GOOD, UNFIT])
    with pytest.raises(DataError, match=r"unfit/eval: row 1: 'input_ids' has the id 9999"):
        built(cache=folder)
    folder = save_splits(tmp_path / "long", train=[GOOD], eval=[LONG, GOOD])
    result = built(cache=folder, max_seq_length=8)
    assert (result.eval_documents, result.eval_target_tokens) == (1, 2)
    found = result.sources[1]
    assert (found["path"], found["read"], found["kept"], found["dropped_overlength"]) == (f"{folder}/eval", 2, 1, 1)
    assert f"{folder}/eval: leaving out 1 of 2 rows over max_seq_length 8" in events.notes("warning")
    folder = save_splits(tmp_path / "longer", train=[GOOD], eval=[LONG])
    with pytest.raises(DataError, match="longer/eval: no rows are left to evaluate on, of 1\n  raise"):
        built(cache=folder, max_seq_length=8)


def test_an_evaluation_part_without_documents_is_none(tmp_path: Path, built: Build, events: Events) -> None:
    result = built(write_jsonl(tmp_path / "a.jsonl", rows(3)), eval_fraction=1e-9)
    assert (Path(result.path) / EVAL_DIR / "state.json").is_file()
    assert not PreparedDataset.has_eval(result.path)
    assert "the evaluation split is empty" in events.notes("warning")[0]
    folder = save_splits(tmp_path / "saved", train=[GOOD], eval=[])
    assert not PreparedDataset.has_eval(folder)
    assert built(cache=folder).eval_documents == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[1, 2]]}, "the column 'labels' is missing"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "row 0: 'input_ids' has 2 items, 'labels' has 1"),
        ({"input_ids": [[1, 2], [1, 9999]], "labels": [[1, 2], [1, 2]]}, "row 1: 'input_ids' has the id 9999"),
        ({"input_ids": [[1, -5]], "labels": [[1, 2]]}, "row 0: 'input_ids' has the id -5"),
        ({"input_ids": [[1, 2]], "labels": [[1, 9999]]}, "row 0: 'labels' has 9999"),
        ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "row 0: 'labels' has -1"),
        ({"input_ids": [[1, 2]], "labels": [[1, -100]]}, "row 0: column 'labels' has no targets"),
        ({"input_ids": [["a"]], "labels": [[1]]}, "column 'input_ids' holds lists of string"),
        ({"input_ids": [1], "labels": [[1]]}, "column 'input_ids' holds int32, expected lists"),
        ({"input_ids": [[1] * 513], "labels": [[1] * 513]}, "no rows are left to train on, of 1"),
    ],
)
def test_unfit_prepared_rows_are_refused(tmp_path: Path, built: Build, columns: Any, message: str) -> None:
    from datasets import Dataset

    Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError) as caught:
        built(cache=tmp_path / "saved")
    assert message in str(caught.value)
    assert str(tmp_path / "saved") in str(caught.value)


def test_folders_that_are_no_prepared_dataset(tmp_path: Path, built: Build) -> None:
    with pytest.raises(DataError, match="no such folder, and there is no dataset section"):
        built(cache=tmp_path / "nothing")
    with pytest.raises(DataError, match="is not a prepared dataset\n  expected what `oslo data build`"):
        built(cache=tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is a prepared dataset, and there is a dataset section as well"):
        built(write_jsonl(tmp_path / "a.jsonl", rows(1)), cache=tmp_path)
    with pytest.raises(DataError, match="is a file, expected a folder"):
        built(tmp_path / "a.jsonl", cache=tmp_path / "a.jsonl")


# --- what is dropped ------------------------------------------------------------------------------


def test_overlong_rows(tmp_path: Path, built: Build, events: Events) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(3), *rows(2, length=50), {"messages": chat("x" * 99, "no")}])
    dropped = built(path, max_seq_length=50).sources[0]
    assert (dropped["kept"], dropped["dropped_overlength"]) == (3, 3)
    assert f"{path}: rows dropped: 3 of 6 (3 over max_seq_length)" in events.notes("warning")
    result = built(path, max_seq_length=50, overlength="truncate")
    cut = result.sources[0]
    # The start is kept; of the last row, only the prompt: it has no targets left.
    assert (cut["kept"], cut["truncated"], cut["no_targets"]) == (5, 3, 1)
    assert PreparedDataset.open(result.path).lengths.max() == 50
    exact = built(path, max_seq_length=len(PreparedDataset.open(result.path).row(0)[0]))
    assert exact.documents == 3
    with pytest.raises(DataError, match="no rows are left to train on"):
        built(path, max_seq_length=exact.tokens // 3 - 1)
    with pytest.raises(DataError, match=r"a\.jsonl:4: \d+ tokens, over max_seq_length 50\n  raise"):
        built(path, max_seq_length=50, overlength="error")


def test_losing_more_than_half_is_said_loudly(tmp_path: Path, built: Build, events: Events) -> None:
    built(write_jsonl(tmp_path / "a.jsonl", [*rows(1), *rows(3, length=50)]), max_seq_length=50)
    assert "MORE THAN HALF of the rows were dropped: 3 of 4" in events.notes("warning")[0]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (rows(2, length=50), {"max_seq_length": 50}, "2 over max_seq_length\n  raise opensloth.fast_model_args"),
        ([{"messages": chat("a")}], {}, "1 without targets\n  check dataset.train_on and the roles"),
        ([{"text": ""}], {"format": "text", "model": "base"}, "1 of one token\n  is this the right column"),
        ([], {}, "no rows in it\n  is this the right file?"),
        (rows(2), {"eval_fraction": 0.999999}, "all rows went into the evaluation split"),
    ],
)
def test_nothing_left_is_an_error(
    tmp_path: Path, built: Build, content: Any, options: dict[str, Any], message: str
) -> None:
    if options.get("model"):
        make_tokenizer(None, bos=False).save_pretrained(tmp_path / "nobos")
        options = options | {"model": tmp_path / "nobos"}
    with pytest.raises(DataError) as caught:
        built(write_jsonl(tmp_path / "a.jsonl", content), **options)
    assert message in str(caught.value)
    assert not list((tmp_path / "cache").glob(".*.building"))
    assert not list((tmp_path / "cache").glob("*.lock"))


def test_bad_rows_are_errors_or_counted(tmp_path: Path, built: Build, events: Events) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    path.write_text(path.read_text() + '{"messages": []}\n' * 8 + "{\n" + '{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:4: the list of messages is empty\n  mend the row"):
        built(path)
    result = built(path, bad_rows="skip")
    assert (result.sources[0]["kept"], result.sources[0]["bad"]) == (3, 10)
    skipped = [note for note in events.notes("warning") if note.startswith("skipped")]
    assert len(skipped) == 5
    assert skipped[0] == f"skipped {path}:4: the list of messages is empty"
    assert skipped[-1].endswith(", further ones are only counted")


def test_a_file_of_bad_rows_only(tmp_path: Path, built: Build) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("oops\n" * 99)
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON: .*\n  none of the first 64 rows is readable"):
        built(path, bad_rows="skip")


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path, built: Build) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(2))
    path.write_text(path.read_text() + '{"messages": [{"role": "user", "content": "\\ud800"}]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: contains half a surrogate pair"):
        built(path)
    assert built(path, bad_rows="skip").documents == 2


@pytest.mark.parametrize("levels", [970, 100_000])
@pytest.mark.parametrize("place", ["tools", "arguments", "messages"])
def test_what_is_nested_too_deeply_is_a_bad_row(tmp_path: Path, built: Build, place: str, levels: int) -> None:
    call = {"name": "f", "arguments": {"x": "DEEP"}}
    bad = {
        "tools": {"messages": chat("a", "b"), "tools": [{"x": "DEEP"}]},
        "arguments": {"messages": [*chat("a"), {"role": "assistant", "tool_calls": [call]}]},
        "messages": {"messages": "DEEP"},
    }[place]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(2), bad])
    path.write_text(path.read_text().replace('"DEEP"', "[" * levels + "]" * levels))
    result = built(path, bad_rows="skip")
    assert (result.sources[0]["kept"], result.sources[0]["bad"]) == (2, 1)


def test_what_a_terminal_would_obey_is_escaped_in_messages(tmp_path: Path, built: Build) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(1), {"messages": [{"\x1b[31m\n": "x" * 5_000}]}])
    with pytest.raises(DataError) as caught:
        built(path)
    assert caught.value.message.endswith(r"a.jsonl:2: message 0 has no role; keys found: \x1b[31m\n")


def test_ids_outside_the_vocabulary_are_bad_rows(tmp_path: Path, built: Build) -> None:
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    path = write_jsonl(tmp_path / "a.jsonl", [row, {**row, "input_ids": [1, 10**30]}, {**row, "labels": [0, 5000]}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .* more than 64 bits"):
        built(path)
    assert built(path, bad_rows="skip").sources[0]["bad"] == 2


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path: Path, built: Build) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    with pytest.raises(DataError, match=r"its tokenizer makes ids up to 3\d\d, its config.json knows 100 ids"):
        built(write_jsonl(tmp_path / "a.jsonl", rows(1)), model=tmp_path / "model")


def test_a_model_folder_that_is_none(tmp_path: Path, built: Build) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(1))
    with pytest.raises(DataError, match="no such model folder"):
        built(path, model=tmp_path / "nothing")
    with pytest.raises(DataError, match="this folder has no tokenizer"):
        built(path, model=tmp_path)


def test_num_samples_takes_the_first_rows(tmp_path: Path, built: Build) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(9))
    result = built(path, num_samples=4)
    assert result.documents == 4
    assert contents(PreparedDataset.open(result.path)) == contents(PreparedDataset.open(built(path).path))[:4]


# --- templates ------------------------------------------------------------------------------------


def test_a_base_model_needs_a_template_for_messages(tmp_path: Path, built: Build, base_folder: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(2))
    with pytest.raises(DataError, match="needs a chat template, and the tokenizer has none"):
        built(path, model=base_folder)
    own = PreparedDataset.open(built(path).path)
    given = PreparedDataset.open(built(path, model=base_folder, chat_template="chatml").path)
    assert contents(given) == contents(own)


@pytest.mark.parametrize("kind", ["file", "text"])
def test_templates_from_a_file_or_inline(tmp_path: Path, built: Build, base_folder: Path, kind: str) -> None:
    text = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    text += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "t.jinja").write_text(text)
    option = text if kind == "text" else str(tmp_path / "t.jinja")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}])
    data = PreparedDataset.open(built(path, model=base_folder, chat_template=option).path)
    ids, labels = data.row(0)
    assert make_tokenizer().decode(ids) == "[user]a</s>[assistant]b</s>"
    assert make_tokenizer().decode(ids[labels != IGNORE]) == "b</s>"


def test_a_template_that_is_not_there(tmp_path: Path, built: Build) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(1))
    with pytest.raises(DataError, match=r"chat_template: /no/t\.jinja: no such file"):
        built(path, chat_template="/no/t.jinja")
    with pytest.raises(DataError, match="chat_template 'qwen' is not known\n  give 'chatml'"):
        built(path, chat_template="qwen")


def test_the_end_of_an_open_turn_is_learned(tmp_path: Path, built: Build, base_folder: Path) -> None:
    headings = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    headings += "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}])
    ids, labels = PreparedDataset.open(built(path, model=base_folder, chat_template=headings).path).row(0)
    assert make_tokenizer().decode(ids[labels != IGNORE]) == "b</s>"


TEXTS = {"prompt": "a", "completion": "b"}
TURNS = {"prompt": chat("a", "b", "c"), "completion": "d"}
SEGMENTS = {"segments": [{"label": False, "text": "a 1 "}, {"label": True, "text": "b"}]}


@pytest.mark.parametrize(("row", "template"), [(TEXTS, "chatml"), (TURNS, "chatml"), (TEXTS, None), (SEGMENTS, None)])
def test_train_on_all_trains_every_message_and_segment(
    tmp_path: Path, built: Build, base_folder: Path, row: dict[str, Any], template: str | None
) -> None:
    def first(**options: Any) -> tuple[Any, Any]:
        path = write_jsonl(tmp_path / "a.jsonl", [row])
        return PreparedDataset.open(built(path, model=base_folder, chat_template=template, **options).path).row(0)

    ids, labels = first(train_on="all")
    assert (labels[1:] == ids[1:]).all()
    ids, labels = first()
    assert (labels[1:] == IGNORE).any()


def test_what_no_prompt_gives_is_learned(tmp_path: Path, built: Build, base_folder: Path) -> None:
    bare = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}])
    ids, labels = PreparedDataset.open(built(path, model=base_folder, chat_template=bare).path).row(0)
    assert make_tokenizer().decode(ids[labels != IGNORE]) == "[assistant]b</s>"


def test_what_the_template_does_not_show_is_said(tmp_path: Path, built: Build, events: Events) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "content": "b", "tool_calls": [call], "reasoning_content": "hm"}
    row = {"messages": [{"role": "user", "content": "a"}, turn], "tools": [{"name": "f"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [row, row])
    built(path)
    assert [note.rpartition("does not show ")[2] for note in events.notes("warning")] == [
        "'reasoning_content': it is lost",
        "'tool_calls': it is lost",
        "'tools': it is lost",
    ]


# --- splits and weights ---------------------------------------------------------------------------


def test_equal_rows_are_on_one_side_of_the_split(tmp_path: Path, built: Build) -> None:
    twice = [*rows(100), *reversed(rows(100))]
    result = built(write_jsonl(tmp_path / "a.jsonl", twice), eval_fraction=0.3)
    train = {str(row) for row in contents(PreparedDataset.open(result.path))}
    evaluation = {str(row) for row in contents(PreparedDataset.open(result.path, EVAL_DIR))}
    assert len(train) + len(evaluation) == 100
    assert not train & evaluation
    assert (result.documents, result.eval_documents) == (2 * len(train), 2 * len(evaluation))
    assert 10 < len(evaluation) < 50
    assert PreparedDataset.has_eval(result.path)


def test_an_evaluation_source(tmp_path: Path, built: Build) -> None:
    train, test = write_jsonl(tmp_path / "a.jsonl", rows(9)), write_jsonl(tmp_path / "b.jsonl", rows(4, length=2))
    result = built(train, eval_path=str(test), num_samples=8, weight=3.0)
    assert (result.documents, result.eval_documents) == (3 * 8, 4)
    assert len(PreparedDataset.open(result.path, EVAL_DIR).epoch_documents()) == 4
    assert [source["evaluation"] for source in result.sources] == [False, True]
    assert PreparedDataset.open(result.path, EVAL_DIR).targets.sum() == result.eval_target_tokens


def test_weights_repeat_and_leave_out(tmp_path: Path, built: Build) -> None:
    datasets = []
    for name, count, weight in (("a", 4, 1.0), ("b", 4, 2.5), ("c", 4, 0.5)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows(count, length="abc".index(name) + 1))
        datasets.append({"path": str(path), "weight": weight})
    result = built(datasets=datasets, packing=False)
    data = PreparedDataset.open(result.path)
    assert len(data) == 12
    times = np.bincount(data.epoch_documents(), minlength=12)
    assert times[:4].tolist() == [1, 1, 1, 1]
    assert sorted(times[4:8].tolist()) == [2, 2, 3, 3]
    assert sorted(times[8:].tolist()) == [0, 0, 1, 1]
    assert result.rows == result.documents == len(data.epoch_documents()) == 16
    assert result.tokens == (data.lengths * times).sum()
    assert result.target_tokens == (data.targets * times).sum()
    assert result.row_fill == pytest.approx(result.tokens / (16 * 512))
    assert [source["kept"] for source in result.sources] == [4, 4, 4]
    assert sum(source["tokens"] for source in result.sources) == data.lengths.sum() != result.tokens


def test_weights_that_leave_nothing_are_an_error(tmp_path: Path, built: Build) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(1))
    for _ in range(2):  # built, and found in the cache
        with pytest.raises(DataError, match=r"weights leave out all 1 documents\n  raise dataset\.weight"):
            built(path, weight=0.5)


@pytest.mark.parametrize("weight", [0.1, 0.3, 1 / 3, 0.7, 1.0, 1.9, 3.0])
def test_weighted_counts_are_exact(weight: float) -> None:
    documents = np.arange(1000, dtype=np.int64)
    chosen = weighted(documents, weight)
    assert abs(len(chosen) - 1000 * weight) < 1
    times = np.bincount(chosen, minlength=1000)
    assert times.max() - times.min() <= 1
