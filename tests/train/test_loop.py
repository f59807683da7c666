"""The loop: an interrupted run ends exactly where an uninterrupted one does; a broken loss stops it."""

import itertools
import signal
import time
from contextlib import closing
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from peft_jax import lora
from peft_jax.binding.linen import bind
from peft_jax.cli.build_optimizer import build_optimizer, build_schedule
from peft_jax.core import tree
from peft_jax.core.rows import real_tokens
from peft_jax.data import Batches, encode_all
from peft_jax.errors import PeftJaxError
from peft_jax.train import loop
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.loop import at_step, due, fit
from peft_jax.train.metrics_log import MetricsLog, read_metrics
from peft_jax.train.step import init_state, make_step

STEPS = 5
WORDS = [" good", " bad", " great"] * 4
EXAMPLES = [{"prompt": f"the film number {i} is", "completion": word} for i, word in enumerate(WORDS)]
METHOD = lora(r=2, lora_dropout=0.1)


class Interrupting:
    """Batches that press Ctrl-C when the batch of a step is asked for."""

    def __init__(self, batches, step):
        self.batches, self.step, self.accumulate_steps = batches, step, batches.accumulate_steps

    def at(self, step):
        if step == self.step:
            signal.raise_signal(signal.SIGINT)
        return self.batches.at(step)


class Setting(NamedTuple):
    batches: Any
    params: Any
    optimizer: Any
    schedule: Any
    step: Any


@pytest.fixture(scope="module", params=[1, 2], ids=["one batch", "accumulated"])
def setting(request, tiny_model, tiny_tokenizer):
    """All that a run needs, compiled once for the tests of this file."""
    config = base.get_config()
    config.data.batch_size = 2
    config.optim.update(learning_rate=1e-2, steps=STEPS, accumulate_steps=request.param)
    encoded, _ = encode_all(EXAMPLES, tiny_tokenizer, config.data)
    batches = Batches(encoded, config.data, config.seed, request.param)
    model, params = tiny_model
    optimizer = build_optimizer(config.optim, STEPS)
    return Setting(batches, METHOD.init(jax.random.key(0), params), optimizer, build_schedule(config.optim, STEPS),
                   make_step(bind(METHOD, model), optimizer, 16))  # fmt: skip


def run(setting, folder, batches=None, log_every=1, **options):
    """Train in ``folder`` as run.py does; (state, frozen leaves)."""
    trainable, frozen = tree.partition(setting.params, METHOD.labels(setting.params))
    trainable = jax.tree.map(jnp.copy, trainable)  # the step consumes its state
    folder.mkdir(exist_ok=True)
    with closing(Checkpoints(folder / "checkpoints", keep=2)) as checkpoints:
        state = checkpoints.restore(init_state(trainable, setting.optimizer, jax.random.key(3)))
        with closing(MetricsLog(folder / "metrics.jsonl", int(state.step))) as log:
            state = fit(setting.step, state, frozen, batches or setting.batches, total_steps=STEPS,
                        schedule=setting.schedule, checkpoints=checkpoints, log=log, checkpoint_due=due(2),
                        log_every=log_every, **options)  # fmt: skip
    return state, frozen


def losses(folder):
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(row[name] for name in names) for row in read_metrics(folder / "metrics.jsonl")]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, *((s.step, s.trainable, s.opt_state) for s in (one, other)))


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_ends_bit_identical(setting, tmp_path):
    whole, _ = run(setting, tmp_path / "whole")
    stopped, _ = run(setting, tmp_path / "parts", Interrupting(setting.batches, step=3))
    assert int(stopped.step) == 3
    assert (tmp_path / "parts" / "checkpoints" / "3").is_dir()
    resumed, _ = run(setting, tmp_path / "parts")
    assert_same(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    rates = [rate for *_, rate in losses(tmp_path / "whole")]
    assert rates == [float(setting.schedule(step)) for step in range(STEPS)] and len(set(rates)) > 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_crash_between_checkpoints_repeats_the_steps_since(setting, tmp_path):
    class Crashing(Interrupting):
        def at(self, step):
            if step == self.step:
                raise OSError("the disk is gone")
            return self.batches.at(step)

    whole, _ = run(setting, tmp_path / "whole")
    with pytest.raises(OSError, match="the disk is gone"):
        run(setting, tmp_path / "parts", Crashing(setting.batches, step=4))
    assert [row[0] for row in losses(tmp_path / "parts")] == [1, 2, 3]
    resumed, _ = run(setting, tmp_path / "parts")
    assert_same(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.slow
def test_every_trainable_leaf_moves_and_the_frozen_base_neither_moves_nor_is_stored(setting, tmp_path):
    before = {path: np.array(leaf) for path, leaf in tree.flatten(setting.params).items()}
    state, frozen = run(setting, tmp_path / "run")
    still = [path for path, leaf in tree.flatten(state.trainable).items() if np.array_equal(before[path], leaf)]
    assert not still
    for path, leaf in tree.flatten(frozen).items():
        np.testing.assert_array_equal(before[path], leaf)
    assert (tmp_path / "run" / "checkpoints" / str(STEPS)).is_dir()
    stored = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / str(STEPS)).rglob("*"))
    assert stored < tree.nbytes(frozen)


def test_a_second_interrupt_is_python_s_own(setting, tmp_path):
    class Twice(Interrupting):
        def at(self, step):
            if step == self.step:
                signal.raise_signal(signal.SIGINT)
            return super().at(step)

    with pytest.raises(KeyboardInterrupt):
        run(setting, tmp_path / "run", Twice(setting.batches, step=2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(setting, tmp_path):
    class Broken(Interrupting):
        def at(self, step):
            batch = self.batches.at(step)
            return batch | {"loss_weight": batch["loss_weight"] * (np.nan if step == self.step else 1)}

    with pytest.raises(PeftJaxError, match=r"broke at step 4: .*loss nan.* the checkpoint of step 2 is kept"):
        run(setting, tmp_path / "run", Broken(setting.batches, step=3))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]
    assert [row[0] for row in losses(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_step_is_read_when_the_next_one_is_under_way_or_something_depends_on_it(setting, tmp_path):
    order = []

    class Number:
        def __init__(self, value, step):
            self.value, self.step = value, step

        def __float__(self):
            order.append(f"read {self.step}")
            return float(self.value)

    def step(state, frozen, batch):
        number = 1 + int(state.step)
        order.append(f"begin {number}")
        state, metrics = setting.step(state, frozen, batch)
        return state, {name: Number(value, number) for name, value in metrics.items()}

    run(setting._replace(step=step), tmp_path / "run", evaluate=lambda state: order.append("evaluate") or {},
        evaluate_due=due(0, {3}))  # fmt: skip
    assert list(dict.fromkeys(order)) == ["begin 1", "begin 2", "read 1", "read 2", "begin 3", "read 3", "evaluate",
                                          "begin 4", "read 4", "begin 5", "read 5"]  # checkpoints after 2, 4, 5


def test_what_is_due_when():
    at = [[step for step in range(1, 10) if due(every, also)(step)] for every, also in ((0, ()), (3, ()), (4, {3, 9}))]
    assert at == [[], [3, 6, 9], [3, 4, 8, 9]]


@pytest.mark.slow
def test_evaluations_on_the_way_are_logged_and_cost_no_training_time(setting, tmp_path):
    def run_evaluating(folder, batches=None):
        return run(setting, folder, batches, evaluate=lambda state: time.sleep(0.5) or {"loss": float(state.step)},
                   evaluate_due=due(0, {2, STEPS}), log_every=4)  # fmt: skip

    began = time.perf_counter()
    run_evaluating(tmp_path / "whole")
    taken = time.perf_counter() - began
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [(row["step"], row.get("eval_loss")) for row in rows] == [(2, 2.0), (4, None), (5, 5.0)]
    assert rows[-1]["seconds"] < taken - 1
    run_evaluating(tmp_path / "parts", Interrupting(setting.batches, step=2))
    run_evaluating(tmp_path / "parts")
    resumed = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [(row["step"], row.get("eval_loss")) for row in resumed] == [(2, 2.0), (4, None), (5, 5.0)]


@pytest.mark.slow
def test_the_last_step_and_the_one_that_was_stopped_at_are_logged(setting, tmp_path):
    run(setting, tmp_path / "run", Interrupting(setting.batches, step=3), log_every=4)
    assert [row[0] for row in losses(tmp_path / "run")] == [3]
    run(setting, tmp_path / "run", log_every=4)
    assert [row[0] for row in losses(tmp_path / "run")] == [3, 4, 5]


def test_the_log_tells_seconds_over_resumptions_and_real_tokens_each(setting, tmp_path, monkeypatch):
    """By a clock that moves on by a second whenever it is looked at: once for each step."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    run(setting, tmp_path / "run", Interrupting(setting.batches, step=2))
    run(setting, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["seconds"] for row in rows] == [1, 2, 3, 4, 5]
    tokens = [int(real_tokens(at_step(setting.batches, step)).sum()) for step in range(STEPS)]
    assert [row["tokens_per_second"] for row in rows] == [*tokens[:4], (tokens[3] + tokens[4]) / 2]


def test_a_clock_leaves_out_pauses_and_the_first_step_s_rate(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock, told = loop._Clock(before=7.0), []
    for seconds, tokens in ((4, 8), (1, 30), (1, 10)):
        now[0] += seconds
        told.append(clock.lap(tokens))
        with clock.paused():
            now[0] += 50
    assert [one["seconds"] for one in told] == [11, 12, 13]
    assert [one["tokens_per_second"] for one in told] == [2, 30, 20]


def test_any_number_that_is_not_finite_stops(tmp_path):
    values = {"loss": float("inf"), "grad_norm": 1.0, "update_norm": float("nan")}
    with closing(Checkpoints(tmp_path, keep=1)) as none, \
            pytest.raises(PeftJaxError, match=r"step 3: loss inf, update_norm nan; no checkpoint was written yet"):
        loop._check_finite(values, 3, none)


def test_a_copy_that_nobody_asked_for_is_an_error_where_it_is_guarded(setting, tmp_path):
    def copying(state, frozen, batch):
        return setting.step(state, frozen, jax.tree.map(np.asarray, batch))

    run(setting._replace(step=copying), tmp_path / "allowed")
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(setting._replace(step=copying), tmp_path / "guarded", guard="disallow")


def test_a_trace_is_of_the_steps_after_the_first(tmp_path, capsys):
    trace, running = loop.Trace(tmp_path / "trace", steps=2), []
    for _ in range(4):
        with trace:
            running.append(trace.running)
    assert running == [False, True, True, False] and list((tmp_path / "trace").rglob("*.xplane.pb"))
    trace.close()
    assert capsys.readouterr().out == ""
    unused = loop.Trace(tmp_path / "unused", steps=2)
    with unused:
        pass
    unused.close()
    assert "no step was profiled" in capsys.readouterr().out
