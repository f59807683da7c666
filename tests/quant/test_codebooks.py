"""The code tables equal bitsandbytes' own, bit by bit."""

import numpy as np
import pytest
from bitsandbytes import functional as bnb

from peft_jax.quant import codebooks


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_four_bit_tables_are_bitsandbytes(quant_type):
    theirs = bnb.get_4bit_type(quant_type, device="cpu").numpy()
    assert codebooks.table(quant_type).view(np.int32).tolist() == theirs.view(np.int32).tolist()


def test_the_dynamic_code_is_bitsandbytes_to_the_bit():
    assert codebooks.dynamic().view(np.int32).tolist() == bnb.create_dynamic_map().numpy().view(np.int32).tolist()


@pytest.mark.parametrize("quant_type", codebooks.FOUR_BITS)
def test_a_byte_holds_two_codes_the_first_in_the_high_nibble(quant_type):
    values, pairs = codebooks.table(quant_type), codebooks.byte_table(quant_type)
    assert (pairs.reshape(16, 16, 2)[:, :, 0] == values[:, None]).all()
    assert (pairs.reshape(16, 16, 2)[:, :, 1] == values[None]).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_code_between_two_midpoints_stands_for_the_nearest_value(quant_type):
    bounds, order = codebooks.steps(quant_type)
    x = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    values = codebooks.table(quant_type)
    chosen = values[order[(x[:, None] > bounds).sum(1)]]
    assert (np.abs(chosen - x) == np.abs(values - x[:, None]).min(1)).all()
