"""A checksum changes with every bit, and not with the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax import make_mesh
from peft_jax.core.checksums import checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool"])
def test_a_checksum_changes_with_every_bit_of_an_array(dtype):
    array = np.asarray(jnp.arange(6).reshape(2, 3).astype(dtype))
    first = checksums({"a": array})
    for place in range(array.nbytes if dtype != "bool" else 0):
        for bit in range(8):
            changed = bytearray(array.tobytes())
            changed[place] ^= 1 << bit
            other = np.frombuffer(bytes(changed), array.dtype).reshape(2, 3)
            assert checksums({"a": other})["['a']"] != first["['a']"], (place, bit)
    assert checksums({"a": ~array if dtype == "bool" else array[::-1]})["['a']"] != first["['a']"]


def test_a_checksum_is_the_same_on_a_mesh():
    array = jax.random.normal(jax.random.key(0), (8, 4))
    mesh = make_mesh(data=2, fsdp=4)
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec("fsdp", "data")))
    assert checksums({"a": spread}) == checksums({"a": array})
