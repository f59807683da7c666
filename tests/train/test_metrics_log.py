"""The metrics file survives crashes and resumption; TensorBoard gets the same numbers."""

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
