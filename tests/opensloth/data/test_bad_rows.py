"""Bad rows among good ones, by the command that pods run: the good ones are kept, the bad ones counted and named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_tools import Events, chat, make_tokenizer, write_jsonl
from measured import at_most

from opensloth.data.built import BuiltData
from opensloth.data.documents import IGNORE
from opensloth.data.encode import Encoder
from opensloth.data.prepared import PreparedDataset
from opensloth.errors import DataError
from opensloth.run_config import RunConfig, dump

MakeConfig = Callable[..., RunConfig]
Build = Callable[..., BuiltData]
# Not ru_maxrss: a process begins with the value of the one that started it, here a test run that has had much.
MEASURED_COMMAND = (
    "import re, sys; from pathlib import Path; from opensloth.data.__main__ import main; code = main(sys.argv[1:]); "
    "sys.stderr.write(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]); sys.exit(code)"
)

BAD = {
    b"": None,  # an empty line is no row
    b"   ": None,
    b"{": "not JSON: the line ends in the middle of a value",
    b"nonsense": "not JSON: Expecting value at column 1",
    b"[1, 2]": "expected a JSON object, got a list",
    b"null": "expected a JSON object, got null",
    b'{"messages": "\xff"}': "not UTF-8: byte 0xff at position 15",
    b"\0\0\0\0": "contains a NUL byte: is this a text file?",
    b'{"messages": []}': "the list of messages is empty",
    b'{"other": 1}': "column 'messages' is missing",
    b'{"messages": [{"role": "robot", "content": "a"}]}': "message 0 has the role 'robot'; known: ",
    b'{"messages": [{"role": "user"}]}': "message 0 has no content",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "contains half a surrogate pair, which is not text",
    b'{"messages": ' + b"[" * 100_000: "nested too deeply",
    b'{"messages": ' + b"9" * 5_000 + b"}": "not JSON: Exceeds the limit (4300 digits) for integer string conversion",
}


def good(number: int) -> bytes:
    return json.dumps({"messages": chat(f"question {number}", f"answer {number}")}).encode()


def run_build(config: RunConfig) -> tuple[int, list[dict[str, Any]], float]:
    """Exit code, events, and the most memory that it had, in MiB."""
    command = [sys.executable, "-c", MEASURED_COMMAND, "build", "--config", "-"]
    done = subprocess.run(command, input=dump(config), capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    peak = int(done.stderr.rsplit("\n", 1)[-1]) / 1024
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], peak


def answers(path: str) -> list[str]:
    tokenizer, data = make_tokenizer(), PreparedDataset.open(path)
    said = [ids[labels != IGNORE] for ids, labels in map(data.row, range(len(data)))]
    return [tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in said]


def test_each_kind_of_bad_row_among_good_ones(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [line for number, bad in enumerate(BAD) for line in (good(number), bad)]
    path.write_bytes(b"\n".join(lines))
    code, events, _ = run_build(make_config(path, bad_rows="skip"))
    assert code == 0
    result = events[-1]
    problems = sum(problem is not None for problem in BAD.values())
    counts = result["sources"][0]
    assert (counts["read"], counts["kept"], counts["bad"]) == (len(BAD) + problems, len(BAD), problems)
    assert answers(result["path"]) == [f"answer {number}" for number in range(len(BAD))]
    skipped = [e["message"] for e in events if e["event"] == "note" and e["message"].startswith("skipped")]
    first = [(number, problem) for number, problem in enumerate(BAD.values()) if problem][:5]
    for note, (number, problem) in zip(skipped, first, strict=True):
        assert note.startswith(f"skipped {path}:{2 * number + 2}: {problem}")


@pytest.mark.parametrize("line", [line for line, problem in BAD.items() if problem], ids=lambda line: repr(line[:20]))
def test_each_kind_of_bad_row_is_an_error_unless_they_are_skipped(built: Build, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good(0), good(1), line, good(2)]))
    with pytest.raises(DataError) as caught:
        built(path)
    assert caught.value.message.startswith(f"{path}:3: {BAD[line]}")
    assert caught.value.hint == "mend the row, or set dataset.bad_rows: skip"
    assert not list((tmp_path / "cache").glob("*/oslo.json"))
    assert built(path, bad_rows="skip").documents == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_huge_rows_do_not_fill_the_memory(make_config: MakeConfig, tmp_path: Path) -> None:
    """63 MiB are read and found to be too long; 200 MiB are passed over. About 20 s."""
    path, plain = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(plain, [{"messages": chat("a", "b")}])
    _, _, before = run_build(make_config(plain))
    with path.open("wb") as stream:
        for number, mib in enumerate((63, 200, 63, 63)):
            stream.write(good(number) + b"\n")
            row = json.dumps({"messages": chat("x" * ((mib << 20) - 200), "y")}).encode()
            stream.write(row + b"\n")
            assert abs(len(row) - (mib << 20)) < 1_000
        stream.write(good(4))
    code, events, peak = run_build(make_config(path, bad_rows="skip"))
    assert code == 0, events
    counts = events[-1]["sources"][0]
    assert (counts["kept"], counts["bad"], counts["dropped_overlength"]) == (5, 1, 3)
    assert any(f"{path}:4: longer than 64 MiB" in e.get("message", "") for e in events)
    assert answers(events[-1]["path"]) == [f"answer {number}" for number in range(5)]
    at_most("MiB of memory that rows of 63 and 200 MiB take beyond that of one small row", peak - before, 600)


@pytest.mark.parametrize(("policy", "outcome"), [("drop", "dropped_overlength"), ("truncate", "truncated")])
def test_a_text_that_is_far_too_long_is_not_tokenised_whole(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, outcome: str
) -> None:
    longest = 0

    def watch(encoder: Any, batch: Any) -> Any:
        nonlocal longest
        longest = max([longest, *(len(item.text) for item in batch)])
        return original(encoder, batch)

    original = Encoder.tokenise
    monkeypatch.setattr(Encoder, "tokenise", watch)
    rows = [{"messages": chat("a", "b")}, {"messages": chat("hi", "so it is " * 40_000)}]
    result = built(write_jsonl(tmp_path / "a.jsonl", rows), overlength=policy)
    assert result.sources[0][outcome] == 1
    assert result.documents == (2 if policy == "truncate" else 1)
    assert longest <= 512 * 64
    if policy == "truncate":
        assert len(PreparedDataset.open(result.path).row(1)[0]) == 512


def test_a_text_that_is_far_too_long_is_an_error_where_the_config_says_so(built: Build, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}, {"messages": chat("a", "b" * 50_000)}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 500\d\d characters, over max_seq_length 512"):
        built(path, overlength="error")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.jsonl.gz"])
def test_an_empty_file(built: Build, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        built(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message
    assert re.search(r"no rows|ends before|not a whole gzip", caught.value.message), caught.value.message


# --- a template or a tokenizer that does not fit ------------------------------------------------------

TEMPLATES = {
    "{{ raise_exception('I do not like this') }}": "cannot render a question and its answer: .* I do not like this",
    "{% for m in messages %}{{ m.content.nothing.at.all }}{% endfor %}": "cannot render a question and its answer",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "does not render what an assistant said",
    "{% for m in messages %}{{ m.content }": "the chat template is not valid: line 1",
    "{% for m in messages %}{{ m.content }}": "the chat template is not valid: line 1",
    "{{ messages | nofilter }}": "the chat template is not valid: line 1: No filter named 'nofilter'",
    "{% for m in messages %}{{ m['content'] }}{{ 1 / 0 }}{% endfor %}": "cannot render a question and its answer",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "cannot render a question and its answer",
    "{% include 'x' %}": "cannot render a question and its answer",
    "{{ messages.__class__.__mro__ }}": "cannot render a question and its answer|does not render",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_does_not_fit_is_one_error(built: Build, tmp_path: Path, template: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}])
    with pytest.raises(DataError, match=TEMPLATES[template]) as caught:
        built(path, chat_template=template)
    assert caught.value.message.isprintable()


def test_a_template_that_refuses_some_rows_makes_them_bad(built: Build, tmp_path: Path, events: Events) -> None:
    template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('refused') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat(a, "b")} for a in ("a", "no", "c")])
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template refuses this conversation: refused"):
        built(path, chat_template=template)
    assert built(path, chat_template=template, bad_rows="skip").documents == 2


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings(built: Build, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokenizer) - 1}))
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}])
    with pytest.raises(DataError) as caught:
        built(path, model=model)
    assert caught.value.message == (
        f"'{model}': its tokenizer makes ids up to {len(tokenizer) - 1}, its config.json knows {len(tokenizer) - 1} ids"
    )
