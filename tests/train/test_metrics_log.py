"""The metrics file survives crashes and resumption; TensorBoard gets the same numbers."""

import os

import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.train.metrics_log import MetricsLog, read_metrics


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    assert log.last == {}
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    log = MetricsLog(tmp_path / "metrics.jsonl", 2)
    assert log.last == {"step": 2, "loss": 0.5}
    log.write(3, {"loss": 9.0})
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 3, "loss": 9.0}  # at once: the run may break
    log.close()
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.5, 9.0]


def test_a_last_line_cut_short_is_left_out_and_a_broken_one_before_it_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(PeftJaxError, match=r"metrics.jsonl:1 is not JSON"):
        read_metrics(path)


@pytest.mark.parametrize(("line", "words"), [
    ("[]", "it is \\[\\], not an object"), ("3", "it is 3, not an object"), ("{}", "step is null, not int"),
    ('{"step": "1"}', 'step is "1", not int'), ('{"step": 1, "loss": "low"}', 'loss is "low", not int or float'),
    ('{"step": 1, "loss": [1]}', "loss is .*, not int or float"), ("[" * 100_000, "is not JSON"), ("\0", "is not JSON"),
    ("\udcff", "is not JSON"), ('{"step": 1' + "0" * 400 + "}", "step is a number of hundreds of digits"),
])
def test_a_line_that_is_none_is_named(tmp_path, line, words):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1, "loss": 1.0}}\n{line}\n'.encode("utf-8", "surrogateescape"))
    with pytest.raises(PeftJaxError, match=rf"metrics.jsonl:2 .*{words}"):
        read_metrics(path)


def test_a_line_has_the_numbers_that_its_reader_needs(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    assert len(read_metrics(tmp_path / "metrics.jsonl", "loss")) == 1
    with pytest.raises(PeftJaxError, match=r"metrics.jsonl:1 is damaged, seconds is null, not int or float"):
        MetricsLog(tmp_path / "metrics.jsonl", 1, needed=("loss", "seconds"))


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_metrics_are_read_from_a_file(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(PeftJaxError, match=r"metrics.jsonl is .*: remove the line, or start a new file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_holds_the_values(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    log = MetricsLog(None, 0, tmp_path / "tensorboard")
    log.write(5, {"loss": 0.25})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = [(e.step, v.tag, v.simple_value) for e in _events(file.read_bytes(), Event) for v in e.summary.value]
    assert found == [(5, "loss", 0.25)]


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    MetricsLog(None, 4, tmp_path / "tensorboard").close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    started = [e.step for e in _events(file.read_bytes(), Event) if e.session_log.status == SessionLog.START]
    assert started == [5]  # the first step that is purged


def _events(data, event):
    """TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
