"""Every kind of file is read, and every way one can be broken is told with its place."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.data.reading import read

ROWS = [{"prompt": "Hé, one", "completion": "1"}, {"prompt": "two", "completion": "2"}]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_text(delimiter: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["prompt", "completion"], delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return buffer.getvalue()


def parquet_bytes() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


CONTENTS = {
    "jsonl": lambda: "\n".join(json.dumps(row) for row in ROWS).encode(),
    "json": lambda: json.dumps(ROWS, indent=2).encode(),
    "csv": lambda: csv_text().encode(),
    "tsv": lambda: "prompt\tcompletion\nHé, one\t1\ntwo\t2\n".encode(),
    "parquet": parquet_bytes,
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", list(CONTENTS))
def test_every_kind_gives_the_same_rows(tmp_path, kind, compressed):
    content = CONTENTS[kind]()
    name = f"data.{kind}" + (".gz" if compressed else "")
    stored = gzip.compress(content) if compressed else content
    table = read(put(tmp_path / name, stored))
    assert table.rows == ROWS
    assert table.columns == ("prompt", "completion")
    assert table.kind == kind
    assert table.sha256 == hashlib.sha256(stored).hexdigest()
    assert len(table) == 2
    assert table.path == tmp_path / name


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, kind):
    assert read(put(tmp_path / f"data.{kind}", b"\xef\xbb\xbf" + CONTENTS[kind]())).columns[0] == "prompt"


def test_rows_know_their_lines(tmp_path):
    jsonl = read(put(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n'))
    assert (jsonl.lines, jsonl.where(1)) == ((1, 3), "row 2 (line 3)")
    listed = read(put(tmp_path / "a.json", '[\n  {"a": 1},\n  {"a":\n 2}, {"a": 3}\n]\n'))
    assert listed.lines == (2, 3, 4)
    table = read(put(tmp_path / "a.csv", 'a,b\n1,"two\nlines"\n\n3,4\n'))
    assert table.rows == [{"a": "1", "b": "two\nlines"}, {"a": "3", "b": "4"}]
    assert table.lines == (2, 5)
    assert read(put(tmp_path / "a.tsv", "a\tb\n1\t2\n")).lines == (2,)
    assert read(put(tmp_path / "a.parquet", parquet_bytes())).where(1) == "row 2"


def test_columns_are_those_of_all_rows(tmp_path):
    assert read(put(tmp_path / "a.jsonl", '{"a": 1}\n{"b": 2, "a": 3}')).columns == ("a", "b")


def test_a_line_separator_inside_a_string_is_no_new_line(tmp_path):
    assert read(put(tmp_path / "a.jsonl", '{"a": "x\u2028y\x85z"}\n')).rows == [{"a": "x\u2028y\x85z"}]


def test_json_wrapped_in_an_object(tmp_path):
    assert read(put(tmp_path / "a.json", '{"version": 1, "data": [{"a": 1}]}')).rows == [{"a": 1}]


def test_json_of_numbered_objects(tmp_path):
    table = read(put(tmp_path / "a.json", '{"0": {"a": 1}, "1": {"a": 2}}'))
    assert table.rows == [{"id": "0", "a": 1}, {"id": "1", "a": 2}]
    assert read(put(tmp_path / "b.json", '{"0": {"id": 7}}')).rows == [{"id": 7}]


def test_tsv_takes_quotes_literally(tmp_path):
    table = read(put(tmp_path / "a.tsv", 'text\tlabel\r\n" half a quote\t1\r\nsay ""so""\t0\r\n'))
    assert table.rows == [{"text": '" half a quote', "label": "1"}, {"text": 'say ""so""', "label": "0"}]


def test_a_table_without_a_header(tmp_path):
    path = put(tmp_path / "a.tsv", "gj04\t1\t\tOne.\ngj05\t0\t*\tTwo.\n")
    table = read(path, header=False)
    assert table.columns == ("c1", "c2", "c3", "c4")
    assert table.rows[0] == {"c1": "gj04", "c2": "1", "c3": "", "c4": "One."}
    assert table.lines == (1, 2)
    with pytest.raises(UserError, match="no name for column 3 of 4") as caught:
        read(path)
    assert "header=False" in str(caught.value)


def test_kind_overrides_the_name(tmp_path):
    assert read(put(tmp_path / "a.txt", "x\ty\n1\t2\n"), kind="tsv").rows == [{"x": "1", "y": "2"}]
    with pytest.raises(UserError, match="unknown kind of file 'jsonk'; known: jsonl, json"):
        read(tmp_path / "a.txt", kind="jsonk")


@pytest.mark.parametrize(
    "text,texts,lines",
    [
        (" one \n\ntwo\n", [" one ", "two"], (1, 3)),
        ("one\ntwo\n\n\n", ["one", "two"], (1, 2)),
        ("\n\none\ntwo", ["one", "two"], (3, 4)),
        ("one\r\ntwo\r\n", ["one", "two"], (1, 2)),
        ("one\ntwo\n \t\nthree\n", ["one\ntwo", "three"], (1, 4)),
        ("\none\ntwo\n\f\nthree\n\nfour\f \n", ["one\ntwo", "three\n\nfour"], (2, 5)),
    ],
)
def test_txt_is_lines_or_paragraphs_or_documents(tmp_path, text, texts, lines):
    table = read(put(tmp_path / "a.txt", text))
    assert [row["text"] for row in table.rows] == texts
    assert table.lines == lines
    assert table.columns == ("text",)


def test_long_csv_fields_are_read_and_the_limit_put_back(tmp_path):
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    assert read(put(tmp_path / "a.csv", f"a\n{long}\n")).rows == [{"a": long}]
    assert csv.field_size_limit() == before


def test_a_missing_file_names_its_neighbours(tmp_path):
    put(tmp_path / "train.jsonl", "{}")
    put(tmp_path / "other.csv", "a")
    with pytest.raises(UserError, match=r"no such file; .* holds other.csv, train.jsonl\n  fix: nearest: train.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="no folder"):
        read(tmp_path / "nowhere" / "a.jsonl")


def test_a_directory(tmp_path):
    put(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match=r"is a directory, not a data file; it holds train.jsonl\n.*train.jsonl"):
        read(tmp_path)


def test_an_unknown_ending(tmp_path):
    with pytest.raises(UserError, match=r"cannot tell the kind of file from its name \(\.xlsx\)"):
        read(put(tmp_path / "a.xlsx", "x"))
    with pytest.raises(UserError, match="no ending"):
        read(put(tmp_path / "data", "x"))


def test_undecodable_bytes(tmp_path):
    with pytest.raises(UserError, match=r"byte 0xe9 at byte offset 9 \(line 2\)"):
        read(put(tmp_path / "a.csv", b"a,b\n1,caf\xe9 x\n"))
    with pytest.raises(UserError, match="byte offset 8"):
        read(put(tmp_path / "b.csv", b"\xef\xbb\xbfa\ncaf\xe9 x\n"))
    with pytest.raises(UserError, match="UTF-16"):
        read(put(tmp_path / "c.csv", "a,b\n1,2\n".encode("utf-16")))


def test_a_broken_gzip_file(tmp_path):
    for number, content in enumerate([b"no gzip at all", gzip.compress(b'{"a": 1}' * 50)[:-12]]):
        with pytest.raises(UserError, match="not a whole gzip file"):
            read(put(tmp_path / f"{number}.jsonl.gz", content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file(tmp_path, name):
    with pytest.raises(UserError, match="empty"):
        read(put(tmp_path / name, b""))


@pytest.mark.parametrize("name,content", [("a.csv", "a,b\n"), ("a.tsv", "a\tb\n"), ("a.json", "[]"), ("b.json", "{}")])
def test_a_file_without_rows(tmp_path, name, content):
    with pytest.raises(UserError):
        read(put(tmp_path / name, content))


def test_broken_jsonl_names_every_line(tmp_path):
    path = put(tmp_path / "a.jsonl", '{"a": 1}\n{"a": }\n[1]\n{"a": 2\n7\n')
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "line 2: broken JSON: Expecting value at column 7" in message
    assert "line 3: a list, not an object" in message
    assert "line 4: broken JSON" in message
    assert "line 5: a number, not an object" in message


def test_many_broken_lines_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"\(\+15 more\)"):
        read(put(tmp_path / "a.jsonl", "x\n" * 25))


def test_json_and_jsonl_taken_for_each_other(tmp_path):
    with pytest.raises(UserError, match='kind="json"'):
        read(put(tmp_path / "a.jsonl", json.dumps(ROWS, indent=1)))
    with pytest.raises(UserError, match='kind="jsonl"'):
        read(put(tmp_path / "a.json", "\n".join(json.dumps(row) for row in ROWS)))


def test_broken_json_names_the_line(tmp_path):
    with pytest.raises(UserError, match="line 3: broken JSON"):
        read(put(tmp_path / "a.json", '[\n{"a": 1},\n{"a" 2}\n]'))
    with pytest.raises(UserError, match="line 2: broken JSON: Expecting ',' or ']'"):
        read(put(tmp_path / "b.json", '[{"a": 1}\n{"a": 2}]'))
    with pytest.raises(UserError, match="line 1: broken JSON"):
        read(put(tmp_path / "c.json", '[{"a": 1},'))
    with pytest.raises(UserError, match="nested too deeply"):
        read(put(tmp_path / "d.json", "[" * 100_000))


def test_json_with_things_that_are_not_objects(tmp_path):
    with pytest.raises(UserError, match=r"row 2 \(line 2\): a string, not an object"):
        read(put(tmp_path / "a.json", '[{"a": 1},\n"b"]'))
    with pytest.raises(UserError, match="holds a number"):
        read(put(tmp_path / "b.json", "3"))
    with pytest.raises(UserError, match=r"2 lists \(train, test\)"):
        read(put(tmp_path / "c.json", '{"train": [{}], "test": [{}]}'))
    with pytest.raises(UserError, match=r"no list \(keys: a\)"):
        read(put(tmp_path / "d.json", '{"a": 1}'))


def test_ragged_tables_name_the_line(tmp_path):
    with pytest.raises(UserError, match="line 3: 3 fields where the first line has 2"):
        read(put(tmp_path / "a.csv", "a,b\n1,2\n1,2,3\n"))
    with pytest.raises(UserError, match="line 2: 1 fields where the first line has 2"):
        read(put(tmp_path / "a.tsv", "a\tb\n1\n"))


def test_a_csv_with_an_open_quote(tmp_path):
    with pytest.raises(UserError, match="line 3: broken csv"):
        read(put(tmp_path / "a.csv", 'a,b\n1,2\n3,"four\n5,6\n'))


def test_a_column_named_twice(tmp_path):
    with pytest.raises(UserError, match="names a column twice: a"):
        read(put(tmp_path / "a.csv", "a,b,a\n1,2,3\n"))


def test_a_broken_parquet_file(tmp_path):
    with pytest.raises(UserError, match="not a readable parquet file"):
        read(put(tmp_path / "a.parquet", b"PAR1 nothing of the kind"))


FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5))
def test_csv_json_and_jsonl_give_back_what_was_written(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("round")
    rows = [{"a": first, "b": second} for first, second in pairs]
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *pairs])
    assert read(put(folder / "a.csv", buffer.getvalue())).rows == rows
    assert read(put(folder / "a.json", json.dumps(rows, indent=1))).rows == rows
    assert read(put(folder / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))).rows == rows
