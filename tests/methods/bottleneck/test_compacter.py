"""Compacter's own: the Kronecker products in numpy, its count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import bind, compacter, houlsby
from tests import peer, properties


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"factorized_phm_rule": True}, {"shared_phm_rule": False},
                                     {"factorized_phm_W": False, "phm_bias": False}])
def test_it_is_a_houlsby_adapter_of_kronecker_products(peer_bases, options):
    _, model, base = peer_bases["llama"]
    method = compacter(2, phm_dim=2, phm_rank=2, mh_adapter=False, **options)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    mlp = params["layers"]["mlp"]

    def product(tree, name):
        return np.asarray(tree[name] if name in tree else tree[f"{name}_left"] @ tree[f"{name}_right"])

    def matrix(name, layer):
        inner = product(mlp, f"phm_{name}")[layer]
        rule = product(mlp, f"phm_{name}_rule")[layer] if "shared_phm_rule" in options else product(params, "phm_rule")
        return sum(np.kron(a, w) for a, w in zip(rule, inner, strict=True))

    plain = houlsby(2, mh_adapter=False)
    same = plain.init(jax.random.key(0), base)
    for name in ("down", "up"):
        same["layers"]["mlp"][f"adapter_{name}"] = jnp.stack([matrix(name, layer) for layer in range(3)])
        if "phm_bias" not in options:
            same["layers"]["mlp"][f"adapter_{name}_bias"] = mlp[f"adapter_{name}_bias"]
    peer.assert_close(peer.bound_logits(method, model, params), peer.bound_logits(plain, model, same), 1e-5)


def test_counts_are_the_closed_form():
    """A module has 2 r (h + b) + b + h, which is 2 p (r h/p + r b/p) of the matrices; the model p^3 more."""
    h, b, p, r, layers = 768, 24, 4, 1, 12
    base = {"layers": {"self_attn": {"o_proj": {"kernel": jax.ShapeDtypeStruct((layers, h, h), jnp.float32)}},
                       "mlp": {"down_proj": {"kernel": jax.ShapeDtypeStruct((layers, 4 * h, h), jnp.float32)}}}}
    method = compacter(32, phm_dim=p, phm_rank=r)
    params = jax.eval_shape(lambda tree: method.init(jax.random.key(0), tree), base)
    trainable, _ = peft_jax.partition(params, method.labels(params))
    assert peft_jax.count(trainable) == 2 * layers * (2 * r * (h + b) + b + h) + p**3 == 57_088


@pytest.mark.slow
def test_the_shared_rule_gets_the_gradient_of_all_modules(peer_bases):
    _, model, base = peer_bases["llama"]
    method = compacter(2)
    params = properties.moved(method, method.init(jax.random.key(0), base))

    @jax.jit
    def loss(rule):
        return (bind(method, model)({"params": {**params, "phm_rule": rule}}, peer.IDS) ** 2).mean()

    gradient = jax.grad(loss)(params["phm_rule"])
    way = np.random.default_rng(0).normal(size=gradient.shape).astype(np.float32)
    numeric = (loss(params["phm_rule"] + 1e-2 * way) - loss(params["phm_rule"] - 1e-2 * way)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(gradient, way), numeric, rtol=1e-2)
