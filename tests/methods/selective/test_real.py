"""The methods that train the model's own leaves, on the real SmolLM2; against real peft where it has them."""

import pytest

from peft_jax import bitfit, full, ln_tuning, trainable_tokens
from tests import peer, properties

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.real


@pytest.fixture
def base(smollm2, smollm2_peer):
    """(makes a fresh torch model, Flax model, params), as tests.peer takes it."""
    return smollm2_peer, *smollm2[:2]


@pytest.mark.parametrize("method, config", [
    (ln_tuning(), peft.LNTuningConfig(task_type="CAUSAL_LM")),
    (trainable_tokens([7, 21, 14]), peft.TrainableTokensConfig(token_indices=[7, 21, 14], task_type="CAUSAL_LM")),
], ids=["ln_tuning", "trainable_tokens"])  # fmt: skip
def test_adapters_are_exchanged_with_peft(base, method, config, tmp_path):
    peer.check_opens_in_peft(base, method, tmp_path / "ours")
    peer.check_loads_from_peft(base, config, tmp_path / "theirs")


@pytest.mark.parametrize("method", [bitfit(add_missing=True), full(last_n_layers=1)], ids=["bitfit", "full"])
def test_training_starts_from_the_model_itself(base, method):
    _, model, params = base
    properties.check_start_is_base(method, model, params, peer.IDS)
