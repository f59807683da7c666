"""What a file says is what is learnt: text as it stands there, whatever it looks like, with or without ``datasets``."""

import json
import os
import subprocess
import sys

import pytest

from peft_jax.data.files import read_table
from peft_jax.errors import PeftJaxError, needed


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("number", ["4", "0.5", "10000000.0", "1e-5", "12345678901234567890", "1.10", "-0.0", "-0",
                                    "1E3"])
def test_a_number_is_written_as_in_the_file(tmp_path, number):
    rows = read_table(written(tmp_path, "a.jsonl", f'{{"answer": {number}}}\n{{"answer": "007"}}\n'))
    assert [str(row["answer"]) for row in rows] == [number, "007"]
    assert json.loads(json.dumps(rows[0]["answer"])) == json.loads(number)  # still a number, for a template's tojson


@pytest.mark.parametrize("answers", [["2024-01-02", "2024-01-03"], ["2024-01-02", "n/a"], ["12:30", "1e5"],
                                     ["true", "null"]])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_that_looks_like_something_else_stays_text(tmp_path, name, answers):
    content = {"a.jsonl": "".join(json.dumps({"answer": one}) + "\n" for one in answers),
               "a.json": json.dumps([{"answer": one} for one in answers]),
               "a.csv": "answer\n" + "\n".join(answers)}[name]
    assert [row["answer"] for row in read_table(written(tmp_path, name, content))] == answers


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    for name, content in (("a.csv", b"text\nhi\n"), ("a.jsonl", b'{"text": "hi"}\n'), ("a.json", b'[{"text": "hi"}]')):
        assert read_table(written(tmp_path, name, b"\xef\xbb\xbf" + content)) == [{"text": "hi"}]


def test_json_lines_under_the_other_ending_and_rows_of_other_keys(tmp_path):
    path = written(tmp_path, "a.json", '{"a": "1"}\n\n{"b": "2"}\n')
    assert read_table(path) == [{"a": "1", "b": None}, {"a": None, "b": "2"}]


def test_a_csv_has_quotes_lines_in_them_and_long_fields(tmp_path):
    rows = read_table(written(tmp_path, "a.csv", 'a,b\r\n"x, ""y""\nz",NA\r\n\r\n' + "w" * 200_000 + ",\r\n"))
    assert rows == [{"a": 'x, "y"\nz', "b": "NA"}, {"a": "w" * 200_000, "b": ""}]


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", "a,b\n1,2\n3\n", r"a\.csv: the row that ends on line 3 has 1 fields, the first line names 2"),
    ("a.csv", "a,a\n1,2\n", "two columns are called 'a'"),
    ("a.csv", b"a,b\n\xff\xfe,2\n", "it is not UTF-8"),
    ("a.csv", 'a,b\n"1,2\n', r"a\.csv, line 2: "),
    ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl, line 1: not valid JSON"),
    ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2: not a JSON object"),
    ("a.json", '{"data": [{"a": 1}]}', "must hold one JSON array of objects"),
    ("a.json", '[{"a": 1}, 2]', r"a\.json, entry 2: not a JSON object"),
    ("a.json", "", "must hold one JSON array"),
    ("a.parquet", "no parquet", r"cannot read .*a\.parquet"),
    ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: not valid JSON"),
    ("a.json", "[" * 100_000, r"a\.json: not valid JSON"),
    ("a.jsonl", '{"a": {"b": 1, "b": 2}}', r"line 1: not valid JSON \(the key 'b' stands there twice"),
    ("a.json", '[{"a": 1, "a": 1}]', r"the key 'a' stands there twice"),
    ("a.jsonl", '{"a": "\\ud83d"}', r"line 1: not valid JSON .*surrogates not allowed"),
    ("a.json", '[{"\\uDC00": 1}]', r"not valid JSON .*surrogates not allowed"),
    ("a.jsonl", '{"a": ' + "1" * 5000 + "}", r"line 1: not valid JSON \(Exceeds the limit"),
    ("a.jsonl", b"\0" * 100, r"line 1: not valid JSON"),
    ("a.jsonl", '{"a": 1}'.encode("utf-16"), r"line 1: not valid JSON"),
    ("a.csv", "a\n\0\n", r"a\.csv, line 2: it holds a NUL"),
    ("a.txt", "text", r"'\.txt' is not a known file ending"),
])
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    with pytest.raises(PeftJaxError, match=words):
        read_table(written(tmp_path, name, content))


def test_files_are_read_without_datasets_and_parquet_says_what_it_wants(tmp_path):
    """As on an image for accelerators, which has jax and transformers and little else."""
    jsonl, parquet = written(tmp_path, "a.jsonl", '{"a": "1"}\n'), written(tmp_path, "a.parquet", "")
    code = ("import sys\nsys.modules['datasets'] = sys.modules['gguf'] = None\n"
            "from peft_jax.data.files import read_table\n"
            f"print(read_table({jsonl!r}))\nread_table({parquet!r})\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[{'a': '1'}]\n"
    assert run.stderr.splitlines()[-1].endswith(
        f"the package datasets is needed to read {parquet}, and is not installed: pip install datasets")


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        needed("broken_package", "here")


def test_reading_a_table_shows_no_bar(tmp_path, capfd):
    """``datasets`` would draw "Generating train split" on standard error, terminal or not."""
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "mine.parquet")
    capfd.readouterr()
    assert [row["text"] for row in read_table(str(tmp_path / "mine.parquet"))] == ["one", "two"]
    assert "Generating" not in capfd.readouterr().err and not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(("make", "words"), [
    (os.mkdir, "no data file at .*a.jsonl', which is a folder: name the files"),
    (os.mkfifo, "the data: .*a.jsonl is a named pipe, not a file"),
    (lambda path: path.symlink_to("/dev/zero"), "the data: .*a.jsonl is a device, not a file"),
    (lambda path: path.symlink_to(path), "the data: .*a.jsonl' cannot be read: Too many levels"),
    (lambda path: path.symlink_to("/nowhere"), "the data: there is no file .*a.jsonl"),
    (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40), "has 1.1e.12 bytes, more than the"),
])
@pytest.mark.parametrize("pattern", ["a.jsonl", "?.jsonl"])
def test_what_is_no_file_that_memory_holds_is_not_opened(tmp_path, make, words, pattern):
    make(tmp_path / "a.jsonl")
    words = "no data file at .*" if pattern != "a.jsonl" and "folder" in words else words
    with pytest.raises(PeftJaxError, match=words):
        read_table(str(tmp_path / pattern))


@pytest.mark.parametrize("path", [".", "/", "x" * 300, "x" * 300 + ".jsonl", "a\0b.jsonl", "~nobody/a.csv", "", "["])
def test_what_no_data_file_is_called_is_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PeftJaxError):
        read_table(path)


def test_a_whole_letter_may_be_written_as_its_halves(tmp_path):
    assert read_table(written(tmp_path, "a.jsonl", '{"a": "\\ud83d\\ude00 \\\\ud"}')) == [{"a": "\U0001f600 \\ud"}]


def test_a_damaged_parquet_file_is_the_error_alone(tmp_path, capfd):
    with pytest.raises(PeftJaxError, match="cannot read"):
        read_table(written(tmp_path, "a.parquet", "no parquet"))
    assert capfd.readouterr() == ("", "")
