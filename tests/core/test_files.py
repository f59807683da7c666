"""Files that are never half there, what a killed process leaves aside, and locks."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from peft_jax.core import files
from peft_jax.errors import PeftJaxError


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or
                        sync(handle))
    monkeypatch.setattr(os, "replace", lambda one, other: order.append("rename") or replace(one, other))
    files.write(tmp_path / "results.json", "{}")
    assert order == [f"{tmp_path}/results.json.tmp", "rename", str(tmp_path)]
    order.clear()
    with files.written_aside(tmp_path / "adapter", "adapter", last="config.json") as scratch:
        (scratch / "config.json").write_text("{}")
        (scratch / "weights").write_text("1")
    kinds = [os.path.basename(one) for one in order]
    assert {"config.json", "weights"} < set(kinds[:kinds.index("rename")]) and kinds[-1] == "adapter"


def test_what_a_killed_process_left_aside_goes_and_nothing_else(tmp_path):
    for name in (".adapter-abcdefgh/new", ".adapter-mine/new", ".adapter-12345678/my notes", ".model-abcdefgh/new"):
        (tmp_path / name).mkdir(parents=True)
    files.sweep(tmp_path / "adapter", older=files.DAY)
    assert len(list(tmp_path.iterdir())) == 4  # it may be at work still
    files.sweep(tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {".adapter-mine", ".adapter-12345678", ".model-abcdefgh"}


def test_a_lock_says_whose_it_is_and_ends_with_its_process(tmp_path):
    program = f"""if True:
        import time
        from pathlib import Path
        from peft_jax.core import files
        with files.locked(Path({str(tmp_path / "lock")!r}), Path("runs/x"), "this run"):
            print("locked", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    words = f"^runs/x: another process is at this run now, number {holder.pid} on .*, since .*; wait for it, or choose"
    with pytest.raises(PeftJaxError, match=words), files.locked(tmp_path / "lock", "runs/x", "this run"):
        pytest.fail("two have it")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.locked(tmp_path / "lock", "runs/x", "this run"):
        assert (tmp_path / "lock.json").exists()
    assert not (tmp_path / "lock.json").exists()


def _pipe(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def _circle(path):
    path.symlink_to(path)


def _link_to_a_pipe(path):
    os.mkfifo(f"{path}.pipe")
    path.symlink_to(f"{path}.pipe")


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: None, "the list: there is no file .*/f"),
    (lambda path: path.mkdir(), "the list: .*/f is a folder, not a file"),
    (_pipe, "the list: .*/f is a named pipe, not a file"),
    (_link_to_a_pipe, "the list: .*/f is a named pipe, not a file"),
    (_socket, "the list: .*/f is a socket, not a file"),
    (lambda path: path.symlink_to("/dev/zero"), "the list: .*/f is a device, not a file"),
    (lambda path: path.symlink_to("/nowhere"), "the list: there is no file .*/f"),
    (_circle, "the list: .*/f' cannot be read: Too many levels of symbolic links"),
])
def test_what_is_no_plain_file_is_not_opened(tmp_path, make, words):
    make(tmp_path / "f")
    with pytest.raises(PeftJaxError, match=f"^{words}"):
        files.regular_file(tmp_path / "f", "the list")


@pytest.mark.parametrize(("name", "words"), [("a\0b", "null (byte|character)"), ("x" * 300, "File name too long"),
                                             ("\ud800", "surrogates not allowed")])
def test_what_no_path_can_be_is_refused_with_its_name(tmp_path, name, words):
    with pytest.raises(PeftJaxError, match=f"^the list: .*cannot be read: .*{words}") as caught:
        files.regular_file(tmp_path / name, "the list")
    assert "\0" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_and_a_link_to_one_are_plain_files(tmp_path):
    (tmp_path / "f").write_text("1")
    (tmp_path / "link").symlink_to("f")
    assert files.regular_file(str(tmp_path / "link"), "the list").read_text() == "1"


def test_a_file_of_a_size_that_no_such_file_has_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)  # of holes: it takes no place
    with pytest.raises(PeftJaxError, match=r"config.json has 1,099,511,627,776 bytes, and .* is the most"):
        files.read_json(tmp_path / "config.json")


@pytest.mark.parametrize(("text", "words"), [
    ('{"r": 8, "r": 9}', "the key 'r' stands there twice"), ("[" * 100_000, "not readable as JSON"),
    ("\xff", "not readable as JSON"), ("1" * 5000, "not readable as JSON"), ("[1]", r"holds \[1\], not a JSON object"),
    ('"x"', "not a JSON object"), ("", "not readable as JSON"), ("{} {}", "not readable as JSON")])
def test_json_that_is_none_or_says_two_things_is_named(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PeftJaxError, match=f"config.json.*{words}.*: fetch it again"):
        files.read_json(tmp_path / "config.json")


@pytest.mark.parametrize("error", [
    KeyError("x"), TypeError("x"), OverflowError("x"), RecursionError("x"), MemoryError(),
    UnicodeDecodeError("utf-8", b"", 0, 1, "x"), BaseException("a panic in Rust")])
def test_whatever_a_reader_raises_is_its_one_line(error):
    words = f"f.bin cannot be read as a list .{type(error).__name__}: .*: fetch it again"
    with pytest.raises(PeftJaxError, match=words), files.reading("f.bin", "a list"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(2), PeftJaxError("said already")])
def test_what_is_no_fault_of_a_file_passes(error):
    with pytest.raises(type(error)) as raised, files.reading("f.bin", "a list"):
        raise error
    assert raised.value is error


def test_the_home_of_nobody_stays_what_it_says():
    assert str(files.expanded("~nobody_of_this_name/model")) == "~nobody_of_this_name/model"
    assert files.expanded("~/model") == files.Path.home() / "model"
