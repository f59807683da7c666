"""A model whose head is tied to its embedding, on a quantised base: what each method merges, or why it does not."""

from inspect import signature

import numpy as np
import pytest
from jax import random

from peft_jax import METHODS, PeftJaxError, flatten, quant, quantize
from tests import peer, properties
from tests.methods.test_every_method import NAMES, UNMERGED, make

MERGED = [name for name in NAMES if name not in {*UNMERGED, "quantize", "full"}]


@pytest.fixture(scope="module")
def tied(peer_bases):
    """(Flax model, codes, the plain params that they stand for): the embedding, which is the head too, is plain."""
    _, model, base = peer_bases["tied"]
    method = quantize(block_size=16)
    codes = method.init(None, base)
    return model, codes, method.merge(codes)


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_merged_it_has_the_weights_of_the_plain_base_and_no_head_of_its_own(tied, name):
    model, codes, plain = tied
    method = make(name)
    if name == "bitfit":
        with pytest.raises(PeftJaxError, match="this model has no biases"):
            method.init(random.key(0), codes)
        return
    on_codes, on_plain = (properties.moved(method, method.init(random.key(0), base)) for base in (codes, plain))
    merged, expected = flatten(method.merge(on_codes)), flatten(method.merge(on_plain))
    assert merged.keys() == expected.keys() == flatten(plain).keys()
    assert any(not np.array_equal(leaf, flatten(plain)[path]) for path, leaf in expected.items())
    for path, leaf in expected.items():
        np.testing.assert_allclose(quant.plain(merged[path]), leaf, atol=1e-6, err_msg=path)
    if name in ("lora", "trainable_tokens"):  # beside kernels, and in the embedding that both ends share
        peer.assert_close(peer.forward(model, method.merge(on_plain)), peer.bound_logits(method, model, on_codes), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MERGED if "target_modules" in signature(METHODS[name]).parameters])
def test_a_head_that_is_not_there_is_named(tied, name):
    with pytest.raises(PeftJaxError, match="lm_head"):
        make(name, target_modules=("lm_head",)).init(random.key(0), tied[1])
