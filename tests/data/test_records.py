"""Reading of training files: kinds of files, shapes of records, and bad ones."""

import gzip
import json
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.files import Corpus
from llama_jax.data.records import Dialog, Pair, Record, read_records, recognise
from llama_jax.errors import DataError

ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello"}

SHAPES = [
    ({"text": "a b"}, "a b"),
    ({"prompt": "a", "response": "b"}, Pair("a", "b")),
    ({"prompt": "a", "completion": "b", "id": 3}, Pair("a", "b")),
    (
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "x"},
        Dialog([ASKED, SAID]),
    ),
    (
        {"instruction": "Hi", "input": "there", "output": "Hello"},
        Dialog([{**ASKED, "input": "there"}, SAID]),
    ),
    ({"messages": [ASKED, SAID], "id": "7"}, Dialog([ASKED, SAID])),
    ({"conversations": [ASKED, SAID]}, Dialog([ASKED, SAID])),
    (
        {"messages": [{"from": "human", "value": "Hi"}, SAID]},
        Dialog([ASKED, SAID]),
    ),
    ({"prompt": [ASKED], "completion": [SAID]}, Dialog([ASKED, SAID])),
    ({"prompt": "Hi", "completion": [SAID]}, Dialog([ASKED, SAID])),
    ({"prompt": [ASKED], "response": "Hello"}, Dialog([ASKED, SAID])),
    (
        {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID]},
        Dialog([ASKED, SAID, ASKED, SAID], [False, False, False, True]),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "Hi", "train": False},
                {"from": "gpt", "value": "Hello", "train": True},
            ]
        },
        Dialog([ASKED, SAID], [False, True]),
    ),
    (
        {"messages": [{**ASKED, "content": [{"type": "text", "text": "Hi"}]}, SAID]},
        Dialog([ASKED, SAID]),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        Dialog([{"role": "system", "content": "Be."}, ASKED, SAID]),
    ),
]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BAD = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference between"),
    ({"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, "is a preference between"),
    (
        {"messages": [{**ASKED, "from": "human", "value": "other"}]},
        "message 1 of 1 has 'role' and 'from' that contradict each other",
    ),
    ([1], "is a list, not an object"),
    (None, "is nothing, not an object"),
    ({}, "has no keys, but neither text"),
    ({"txt": "a", "b": 1}, "has 'b', 'txt', but neither text"),
    ({"a\n": 1}, r"has 'a\\n', but neither"),
    ({"text": 3}, "has 3 as its 'text', not a text"),
    ({"text": None}, "has no keys"),
    ({"prompt": "a"}, "has 'prompt', but neither"),
    ({"prompt": ["a"], "response": "b"}, "message 1 of 2 is a text"),
    ({"prompt": 3, "response": "b"}, "has 3 as its 'prompt'"),
    ({"instruction": "a", "output": None}, "has 'instruction', but neither"),
    ({"messages": []}, "has no message in its 'messages'"),
    ({"messages": "a"}, "has a text as its 'messages'"),
    ({"messages": ["a"]}, "message 1 of 1 is a text"),
    ({"messages": [ASKED, {"role": "assistant"}]}, "message 2 of 2 has nothing as its"),
    ({"messages": [{"role": "tool", "content": ""}]}, "has 'tool' as its 'role'"),
    ({"messages": [{"role": ["a"], "content": ""}]}, r"has \['a'\] as its 'role'"),
    ({"messages": [{**ASKED, "content": [{"type": "image"}]}]}, "not text"),
    ({"messages": [{**SAID, "tool_calls": [{}]}]}, "'tool_calls', which no format"),
    ({"messages": [{**SAID, "weight": 0.5}]}, "has 0.5 as its 'weight', not 0 or 1"),
    ({"messages": [{**SAID, "weight": True}]}, "has True as its 'weight', not 0 or 1"),
    ({"messages": [{**SAID, "train": 1}]}, "has 1 as its 'train', not false or true"),
    ({"messages": [{**SAID, "train": "no"}]}, "has 'no' as its 'train', not false"),
    ({"messages": [{**SAID, "weight": 1, "train": False}]}, "contradict each other"),
    ({"messages": [{**ASKED, "train": True}]}, "only the assistant's can be"),
    ({"conversations": [{"from": "bot", "value": ""}]}, "has 'bot' as its 'from'"),
]


def write(path: pathlib.Path, text: str | bytes) -> pathlib.Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def contents(*files: pathlib.Path, **options: Any) -> list[Any]:
    return [record.content for record in read_records(files, **options)]


@pytest.mark.parametrize(("value", "content"), SHAPES)
def test_every_shape_is_recognised(value: object, content: object) -> None:
    assert recognise(value) == content


@pytest.mark.parametrize(("value", "complaint"), BAD)
def test_other_shapes_are_refused_in_a_sentence(value: object, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as raised:
        recognise(value)
    assert "\n" not in str(raised.value)


def test_text_can_be_preferred_to_the_parts_it_was_made_from() -> None:
    value = {"instruction": "a", "output": "b", "text": "c"}
    assert recognise(value, prefer_text=True) == "c"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_json_lines_are_read_in_order_with_their_lines(
    tmp_path: pathlib.Path, name: str
) -> None:
    text = '\ufeff{"text": "ä"}\n\n  \r\n{"text": "b"}\r\n{"text": "c"}'
    found = list(read_records([write(tmp_path / name, text)]))
    assert [record.content for record in found] == ["ä", "b", "c"]
    assert [record.location.number for record in found] == [1, 4, 5]
    assert str(found[1].location) == f"{tmp_path / name}, line 4"


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_list_is_read_item_by_item(tmp_path: pathlib.Path, name: str) -> None:
    path = write(tmp_path / name, json.dumps([v for v, _ in SHAPES], indent=1))
    found = list(read_records([path]))
    assert [record.content for record in found] == [content for _, content in SHAPES]
    assert str(found[-1].location) == f"{path}, item {len(SHAPES)}"


def test_parquet_is_read_row_by_row(tmp_path: pathlib.Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [
        {"messages": [ASKED, SAID], "score": 1.5},
        {"messages": [ASKED, {"role": "assistant", "content": None}], "score": 2.5},
        {"messages": [SAID], "score": 1.0},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    problems: list[DataError] = []
    found = list(read_records([path], on_bad="drop", on_problem=problems.append))
    assert [r.content for r in found] == [Dialog([ASKED, SAID]), Dialog([SAID])]
    assert f"{path}, row 2: message 2 of 2 has nothing" in str(problems[0])
    parquet.write_table(pyarrow.Table.from_pylist([{"score": 1.0}]), path)
    with pytest.raises(DataError, match="no column of a known name, only score"):
        contents(path)
    with pytest.raises(DataError, match="is not Parquet, or damaged"):
        contents(write(path, b"PAR1 no"))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_documents_of_text_are_cut_at_separators(
    tmp_path: pathlib.Path, name: str
) -> None:
    path = write(tmp_path / name, "one\ntwo\n<|endoftext|>\n\n<|endoftext|>\n three")
    assert contents(path) == ["one\ntwo", " three"]
    assert contents(path, separator="\n") == [
        "one", "two", "<|endoftext|>", "<|endoftext|>", " three"
    ]  # fmt: skip
    alone = write(tmp_path / "b.txt", "all of it")
    assert contents(alone, path)[0] == "all of it"


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=9),
    piece_bytes=st.integers(1, 20),
)
def test_pieces_of_a_document_share_a_line_end_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece_bytes: int
) -> None:
    text = "x" + "\n".join(lines) + "x"
    path = write(tmp_path_factory.mktemp("pieces") / "a.txt", text)
    corpus = Corpus([path], separator="<|separator|>", piece_bytes=piece_bytes)
    raws = [corpus.read(i) for i in range(len(corpus))]
    assert [raw.begins for raw in raws] == [True] + [False] * (len(raws) - 1)
    assert [raw.ends for raw in raws] == [False] * (len(raws) - 1) + [True]
    joined = raws[0].data
    for raw in raws[1:]:
        assert joined[-1:] == raw.data[:1] == b"\n"
        joined += raw.data[1:]
    assert joined.decode() == text
    assert all(b"\n" not in raw.data[piece_bytes:-1] for raw in raws)


def test_malformed_records_are_named_by_file_and_line(tmp_path: pathlib.Path) -> None:
    lines = ['{"text": "a"}', "{", "[1]", '{"text": "b"}', "\xff", "[" * 100_000]
    data = "\n".join(lines).encode("latin-1")
    path = write(tmp_path / "bad.jsonl", data)
    problems: list[DataError] = []
    found = read_records([path], on_bad="drop", on_problem=problems.append)
    assert [record.content for record in found] == ["a", "b"]
    for number, problem in zip((2, 3, 5, 6), problems, strict=True):
        assert str(problem).startswith(f"{path}, line {number}: is ")
        assert "\n" not in str(problem)
    with pytest.raises(DataError, match=r"bad.jsonl, line 2: is not JSON"):
        contents(path)


@given(
    data=st.binary(max_size=60), name=st.sampled_from(["a.jsonl", "a.json", "a.txt"])
)
def test_any_bytes_are_records_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz") / name, data)
    problems: list[DataError] = []
    found: list[Record] = []
    try:
        found += read_records([path], on_bad="drop", on_problem=problems.append)
    except DataError as error:
        problems.append(error)
    assert found or problems
    assert all(isinstance(record, Record) for record in found)
    assert all(str(path) in str(problem) for problem in problems)


KEYS = st.sampled_from(
    ["text", "prompt", "response", "completion", "instruction", "input", "output",
     "messages", "conversations", "role", "content", "from", "value", "type", "weight",
     "train"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=JSON)
def test_any_json_is_a_record_or_refused(value: object) -> None:
    try:
        content = recognise(value)
    except DataError:
        return
    if isinstance(content, Dialog):
        assert all(isinstance(m["content"], str) for m in content.messages)
    else:
        assert all(isinstance(text, str) for text in content)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        (
            "a.json",
            b'{"data": [{"text": "a"}]}',
            "one JSON object, .* its 'data' alone",
        ),
        ("b.json", b'{\n "data": [{"text": "a"}]\n}', "one JSON object, not a list"),
        (
            "c.jsonl",
            b'\n{\n "text": "a"\n}\n{\n "text": "b"\n}',
            "line 2: begins a JSON",
        ),
        ("d.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16 text"),
        ("e.jsonl", '{"text": "a"}'.encode("utf-16-le"), "is UTF-16 text"),
        ("j.txt", "a".encode("utf-16"), "is UTF-16 text"),
        ("k.txt", "a".encode("utf-32"), "is UTF-32 text"),
        ("l.jsonl", '{"text": "a"}'.encode("utf-32"), "is UTF-32 text"),
        ("m.json", b'{\n"text": "a"\n}', "one JSON object, not a list of records; put"),
        ("h.jsonl", LFS_POINTER, "is a Git LFS pointer"),
        ("n.txt", LFS_POINTER, "is a Git LFS pointer"),
        ("i.json", b"<!DOCTYPE html>\n<html>", "is a web page"),
        ("f.csv", b"text\na", "is a table of comma-separated values"),
        ("g.jsonl", b'{"text": "\xe9"}', "not UTF-8 at byte 10; save the file as"),
    ],
)
def test_files_of_another_form_are_recognized(
    tmp_path: pathlib.Path, name: str, data: bytes, complaint: str
) -> None:
    with pytest.raises(DataError, match=f"{name}.*{complaint}") as raised:
        contents(write(tmp_path / name, data))
    assert "\n" not in str(raised.value)
    if not name.endswith(".csv"):
        with pytest.raises(DataError, match=complaint):
            contents(write(tmp_path / f"{name}.gz", data))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet"])
def test_a_pointer_to_a_compressed_file_is_recognized(
    tmp_path: pathlib.Path, name: str
) -> None:
    (tmp_path / name).write_bytes(LFS_POINTER)
    with pytest.raises(DataError, match="is a Git LFS pointer instead of the file"):
        contents(tmp_path / name)


def test_an_empty_file_among_others_has_no_records(tmp_path: pathlib.Path) -> None:
    files = [write(tmp_path / name, "") for name in ("a.txt", "b.jsonl", "c.json.gz")]
    assert contents(*files, write(tmp_path / "d.txt", "a")) == ["a"]


def test_answers_in_a_prompt_are_not_learnt() -> None:
    record = {"prompt": [ASKED, SAID, ASKED], "completion": [SAID]}
    assert recognise(record) == Dialog(
        [ASKED, SAID, ASKED, SAID], [False, False, False, True]
    )


def test_a_byte_order_mark_is_dropped(tmp_path: pathlib.Path) -> None:
    for name, data in (
        ("a.jsonl", '{"text": "a"}'),
        ("a.json", '[{"text": "a"}]'),
        ("b.json", '{"text": "a"}'),
        ("a.txt", "a"),
    ):
        assert contents(write(tmp_path / name, "\ufeff" + data)) == ["a"]


def test_files_that_cannot_be_read_are_named(tmp_path: pathlib.Path) -> None:
    empty = write(tmp_path / "empty.jsonl", "\n\n")
    for path, complaint in (
        (tmp_path / "none.jsonl", r"none.jsonl: cannot be read \(No such file"),
        (tmp_path, "of no known kind"),
        (write(tmp_path / "a.xyz", "x"), "of no known kind"),
        (empty, "no record in .*empty.jsonl"),
        (write(tmp_path / "a.json", '[{"text": "a"}'), "not a list in JSON"),
    ):
        with pytest.raises(DataError, match=complaint):
            contents(path)
    with pytest.raises(DataError, match="no file is given"):
        contents()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}' * 99)[:-9])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: is not gzip, or is cut off"):
        contents(cut)


def test_expanded_files_are_removed_with_the_corpus(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.json.gz", '[{"text": "a"}]')
    place = tmp_path / "expanded"
    place.mkdir()
    corpus = Corpus([path, path], folder=place)
    assert len(corpus) == 2
    assert len(list(place.rglob("*"))) == 5  # a folder, and two files for each
    del corpus
    assert not list(place.iterdir())


def test_a_missing_package_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "llama-jax\[parquet\]"'):
        contents(write(tmp_path / "a.parquet", b"PAR1"))


def test_real_instructions_are_all_recognised(assets: pathlib.Path) -> None:
    found = contents(assets / "text" / "alpaca-999.json")
    assert len(found) == 999
    assert all(isinstance(content, Dialog) for content in found)
