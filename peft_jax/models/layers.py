"""All layers of a model as one scan, compiled once whatever their number; their weights lie in stacks."""

from typing import Any

from flax import linen as nn

from peft_jax.core.remat import POLICY


def scan_layers(model: nn.Module, layer: type[nn.Module], in_axes: Any = nn.broadcast) -> Any:
    """``layer`` repeated ``model.config.num_hidden_layers`` times, as a module class.

    The activations of a layer are computed again in the backward pass: all of them where ``model.remat``, else those
    that ``POLICY`` does not keep. Of the arguments behind the first ``in_axes`` says which are the same for all
    layers (``nn.broadcast``) and which have a layer axis in front (0). To be called inside ``model``.
    """
    return nn.scan(
        nn.remat(layer, prevent_cse=False, policy=None if model.remat else POLICY),
        variable_axes={"params": 0, "cache": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=model.config.num_hidden_layers,
        # Flax checks what is broadcast, here nothing, by tracing a layer twice; only random draws depend on it.
        check_constancy_invariants=model.has_rng("params") or model.has_rng("dropout"),
    )
