"""Splash attention, the flash attention for TPUs that comes with jax: it skips the blocks that nobody sees.

B batch, T queries, S keys, K heads of keys, G heads of queries for each, H head size. A compiler cannot cut a kernel
over a mesh, so it is done here, between rows and between heads of keys, with ``shard_map``: ``custom_partitioning``,
which needs no mesh, does not work on TPUs (github.com/jax-ml/jax/issues/38196).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import PartitionSpec

from peft_jax.core._compat import splash_backward
from peft_jax.errors import PeftJaxError
from peft_jax.models import masks

LANES = 128  # tokens of which a kernel's blocks are multiples
BLOCK_MOST = 512


def device_lacks(query: Any, device: Any = None) -> str:
    """What splash attention wants that ``query``, an array or a shape, or the device has not; "" if nothing."""
    device = jax.devices()[0] if device is None else device
    if device.platform != "tpu":
        return "a TPU"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"model.dtype=bfloat16 or float32, not {query.dtype}"
    return "" if query.shape[3] % 8 == 0 else "heads of a multiple of 8 values"


def lacks(query: Any, key: Any, mask: Any, device: Any = None) -> str:
    """As :func:`device_lacks`, of the rows and the mask too."""
    if why := device_lacks(query, device) or _rows_lack(query, key):
        return why
    if not isinstance(mask, masks.RowMask):
        return "rows without attention_mask and cache"
    return "bind(method, model, mesh)" if device is None and mask.mesh is None and jax.device_count() > 1 else ""


def _rows_lack(query: Any, key: Any) -> str:
    odd = [size for size in (query.shape[1], key.shape[1]) if size % LANES]
    return f"a multiple of {LANES} tokens a row, not {odd[0]}" if odd else ""


def attend(query, key, value, mask):
    """Attention, shapes as of :class:`peft_jax.models.attention.AttentionCore`. On other devices than TPUs it runs in
    Pallas' interpreter, slowly. The plain program is for masks that are arrays, as of a cache, and for rows shorter
    than a block.

    Raises ``PeftJaxError`` for longer rows of no multiple of 128 tokens.
    """
    if not isinstance(mask, masks.RowMask) or query.shape[1] < LANES:
        seen = masks.dense(mask, query.shape[:2])
        return jax.nn.dot_product_attention(query, key, value, mask=seen, implementation="xla")
    if why := _rows_lack(query, key):
        raise PeftJaxError(f"attn_implementation='splash' wants {why}: set data.width_multiple={LANES} and "
                           f"eval.width_multiple={LANES}, or choose auto.")
    scaled = (query * query.shape[3] ** -0.5).astype(query.dtype)
    grouped = scaled.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3]).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    ids = _segments(mask)

    def of_window(window):
        return _on_mesh(mask.mesh, *_program(mask, window, grouped.shape), grouped, key, value, ids)

    return masks.by_window(mask, of_window).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _on_mesh(mesh: Any, program: Callable, infos: Any, query: Any, *others: Any) -> Any:
    """``program(infos, query, *others)``, of which each device of a ``mesh`` computes its own rows and heads."""
    if mesh is None:
        return program(infos, query, *others)
    rows = ("data", "fsdp") if len(query) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    heads = "tensor" if query.shape[1] % mesh.shape["tensor"] == 0 else None
    cut, ids = PartitionSpec(rows, heads), PartitionSpec(rows)
    return jax.shard_map(program, mesh=mesh, in_specs=(PartitionSpec(), cut, cut, cut, ids), out_specs=cut,
                         check_vma=False)(infos, query, *others)


def _segments(mask: masks.RowMask) -> jax.Array | None:
    """Ids (B, S) of tokens that see their like only. A causal row needs none for its padding, which is behind it."""
    if mask.packed or mask.causal or mask.lengths is None:
        return mask.segment_ids
    return (jnp.arange(mask.keys) < mask.lengths[:, None]).astype(jnp.int32)


def _program(mask: masks.RowMask, window: int | None, shape: tuple[int, ...]) -> tuple[Callable, Any]:
    """``(infos, query (B, K, G, T, H), key and value (B, K, S, H), ids (B, S) or None) -> (B, K, G, T, H)``, and the
    infos, which say what blocks there are."""
    infos, kernels = _kernels(mask, window, shape)

    @jax.custom_vjp
    def attention(infos, *arrays):
        return _forward(kernels, False, infos, *arrays)

    def forward(infos, *arrays):
        out, sums = _forward(kernels, True, infos, *arrays)
        return out, (infos, *arrays, out, sums)

    def backward(residuals, cotangent):
        return None, *_backward(kernels, *residuals, cotangent), None

    attention.defvjp(forward, backward)
    return attention, infos


def _kernels(mask: masks.RowMask, window: int | None, shape: tuple[int, ...]) -> tuple[list[jax.Array], dict]:
    """(which blocks there are, as arrays; kernels without them, by whether they keep the sums of their softmax and
    whether they are interpreted)."""
    _, heads, groups, queries, _ = shape
    area, first = (queries, mask.keys), mask.keys - queries
    if window is not None:
        seen = library.LocalMask(area, (window - 1, 0), first)
    else:
        seen = library.CausalMask(area, first) if mask.causal else library.FullMask(area)
    q, kv = (max(size for size in range(LANES, BLOCK_MOST + 1, LANES) if one % size == 0) for one in area)
    blocks = library.BlockSizes(q, kv, kv, q, kv, kv, q, kv)
    made = {(kept, interpret): library.make_splash_mha(
        library.MultiHeadMask([seen] * heads * groups), block_sizes=blocks, save_residuals=kept, interpret=interpret,
        head_shards=1, q_seq_shards=1) for kept in (False, True) for interpret in (False, True)}
    return jax.tree.leaves(made[False, False]), {key: jax.tree.structure(kernel) for key, kernel in made.items()}


def _on_each_platform(one_row: Callable, kernels: dict, kept: bool, infos: Any, arrays: Any) -> Any:
    """``one_row(kernel, ...)`` over the rows of ``arrays``, interpreted where there is no TPU."""
    def run(interpret, infos, *arrays):
        return jax.vmap(partial(one_row, jax.tree.unflatten(kernels[kept, interpret], infos)))(*arrays)

    return jax.lax.platform_dependent(infos, *arrays, tpu=partial(run, False), default=partial(run, True))


def _ids(ids: jax.Array | None, queries: int) -> Any:
    return None if ids is None else library.SegmentIds(ids[len(ids) - queries:], ids)


def _forward(kernels: dict, kept: bool, infos: Any, *arrays: Any) -> Any:
    def one_row(kernel, query, key, value, ids):
        made = kernel(query.reshape(-1, *query.shape[2:]), key, value, segment_ids=_ids(ids, query.shape[2]))
        if not kept:
            return made.reshape(query.shape)
        out, (sums,) = made
        return out.reshape(query.shape), sums.reshape(query.shape[:3])

    return _on_each_platform(one_row, kernels, kept, infos, arrays)


def _backward(kernels: dict, infos: Any, *arrays: Any) -> Any:
    def one_row(kernel, query, key, value, ids, out, sums, cotangent):
        whole = (x.reshape(-1, *x.shape[2:]) for x in (query, out, sums, cotangent))
        q, out, sums, cotangent = whole
        dq, dk, dv = splash_backward(kernel, q, key, value, _ids(ids, query.shape[2]), out, sums, cotangent)
        return dq.reshape(query.shape), dk, dv

    return _on_each_platform(one_row, kernels, False, infos, arrays)
