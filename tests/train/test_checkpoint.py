"""Checkpoints: bit for bit, only what trains, clear errors."""

import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.train.checkpoint import Checkpoints, storable
from peft_jax.train.step import init_state

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 9)))


def state_of(rank=3, step=0):
    trainable = {"q": {"lora_a": jax.random.normal(jax.random.key(rank), (5, rank)), "lora_b": jnp.ones((rank, 2))}}
    return init_state(trainable, TX, jax.random.key(7))._replace(step=jnp.int32(step))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    plain = [state._replace(rng=jax.random.key_data(state.rng)) for state in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *plain)


def save(folder, *states, keep=2):
    with closing(Checkpoints(folder, keep)) as checkpoints:
        for state in states:
            checkpoints.save(state)


def restore(folder, like):
    with closing(Checkpoints(folder, keep=2)) as checkpoints:
        return checkpoints.restore(like)


@pytest.mark.slow
def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    trained = state_of(step=4)
    updates, opt_state = TX.update(trained.trainable, trained.opt_state, trained.trainable)
    trained = trained._replace(trainable=updates, opt_state=opt_state)
    save(tmp_path, trained)
    same(restore(tmp_path, state_of()), trained)


def test_without_a_checkpoint_the_state_given_is_the_state(tmp_path):
    state = state_of()
    assert restore(tmp_path / "none", state) is state


def test_only_the_newest_are_kept_and_saving_a_step_twice_is_no_error(tmp_path):
    save(tmp_path, *(state_of(step=step) for step in (1, 2, 3, 3)), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_a_checkpoint_of_another_shape_is_a_clear_error(tmp_path):
    save(tmp_path, state_of(rank=3, step=1))
    with pytest.raises(PeftJaxError, match=r"1 is not of this run: .*Choose another folder .*--workdir.*--overwrite"):
        restore(tmp_path, state_of(rank=4))


def empty(file):
    file.write_bytes(b"")


def halve(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, empty, halve])
@pytest.mark.parametrize("file", ["default/_METADATA", "default/manifest.ocdbt", "the values"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_serves(tmp_path, damage, file):
    save(tmp_path, *(state_of(step=step, rank=400) for step in (1, 2)))
    values = max((tmp_path / "2").rglob("*"), key=lambda found: found.stat().st_size)
    damage(values if file == "the values" else tmp_path / "2" / file)
    with pytest.raises(PeftJaxError, match=rf"{tmp_path}/2 cannot be read: .*go on from step 1, or .*--overwrite"):
        restore(tmp_path, state_of(rank=400))
    shutil.rmtree(tmp_path / "2")
    same(restore(tmp_path, state_of(rank=400)), state_of(step=1, rank=400))


def test_without_a_checkpoint_before_the_damaged_one_training_starts_anew(tmp_path):
    save(tmp_path, state_of(step=3))
    shutil.rmtree(tmp_path / "3" / "default")
    with pytest.raises(PeftJaxError, match=rf"{tmp_path}/3 cannot be read: .*Remove that folder to go on from step 0"):
        restore(tmp_path, state_of())


def test_of_several_good_checkpoints_the_newest_is_named(tmp_path):
    save(tmp_path, *(state_of(step=step) for step in (1, 2, 3)), keep=3)
    shutil.rmtree(tmp_path / "3" / "default")
    with closing(Checkpoints(tmp_path, keep=3)) as checkpoints, pytest.raises(PeftJaxError, match="go on from step 2"):
        checkpoints.restore(state_of())


@pytest.mark.slow
def test_a_bit_that_turned_over_in_a_checkpoint_is_noticed(tmp_path):
    states = [state_of(step=step, rank=400) for step in (1, 2)]
    save(tmp_path, *states)
    values = max((tmp_path / "2").rglob("*"), key=lambda found: found.stat().st_size)
    whole = values.read_bytes()
    noticed = []
    for place in np.random.default_rng(0).integers(0, len(whole), 12).tolist():
        values.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        try:
            same(restore(tmp_path, state_of(rank=400)), states[1])  # a byte that nothing reads
        except PeftJaxError as error:
            noticed.append(str(error))
    assert any("is damaged: ['trainable']['q']['lora_a'] is not what was written. Remove that folder to go on from "
               "step 1" in line for line in noticed), noticed


def test_a_checkpoint_from_before_there_were_checksums_is_read(tmp_path):
    with closing(ocp.CheckpointManager(tmp_path)) as manager:
        manager.save(2, args=ocp.args.StandardSave(storable(state_of(step=2))))
    same(restore(tmp_path, state_of()), state_of(step=2))
