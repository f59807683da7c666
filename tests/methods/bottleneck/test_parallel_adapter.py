"""Parallel adapters: their promises. Their equation, place and files: test_bottleneck.py."""

import pytest

from peft_jax import parallel_adapter
from tests import peer, properties

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_promises_of_a_method(peer_bases):
    _, model, base = peer_bases["qwen2"]
    properties.check_training(parallel_adapter(), model, base, peer.IDS)
    properties.check_remat(parallel_adapter(), model, base, peer.IDS)
    properties.check_start_is_base(parallel_adapter(), model, base, peer.IDS)
