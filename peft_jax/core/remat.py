"""Which intermediate results a rematerialised layer keeps: those that its author named, here, with :func:`keep`.

Everything else is computed again in the backward pass. Worth keeping is what takes a large matrix product to get back.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"
POLICY = jax.checkpoint_policies.save_only_these_names(NAME)


def keep(x):
    """Mark ``x`` as worth its memory under ``jax.checkpoint(..., policy=POLICY)``; does nothing elsewhere."""
    return checkpoint_name(x, NAME)
