"""What holds for every method of ``METHODS``, with its defaults, on one tiny model: a new one is tested by being there.

What an option changes is tested in the method's own file. A method is traced three times here: ``at`` serves the start,
the merge and the gradient; one training step does so under remat, on a mesh and on a quantised base at once; and one
pass in bfloat16.
"""

import json
from functools import cache
from inspect import signature
from typing import NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import peft_jax
from peft_jax import METHODS, PeftJaxError, bind, chain, combine, flatten, ia3, lora, make_mesh, partition, quantize
from peft_jax.method import owns
from tests import peer, properties

# Arguments where the defaults cannot work on a model of 16 channels, or would not be what they are elsewhere.
ARGUMENTS = {
    "adalora": {"total_step": 10},  # which peft asks for
    "compacter": {"reduction_factor": 2},
    "miss": {"r": 4},
    "lokr": {"r": 1},  # else the second factor is a whole matrix
    "quantize": {"block_size": 16},
    "trainable_tokens": {"token_indices": (7, 14)},
}
# How far from the base the start may be, as a share of the largest logit; not a bit where nothing is said.
START = {"quantize": 1e-5, "dora": 1e-6, "hra": 1e-5, "houlsby": 1e-3, "compacter": 1e-3, "pfeiffer": 1e-2,
         "bottleneck": 1e-2}
ANOTHER_START = {"prefix", "prompt", "ptuning"}  # virtual tokens are seen
UNMERGED = {"prefix", "prompt", "ptuning", "houlsby", "pfeiffer", "parallel_adapter", "bottleneck", "compacter"}
FILE_OF_A_LORA = {"lorafa", "loraplus"}
NO_FILE = {"full": "save the whole model", "quantize": ""}
NOT_OF_PEFT = {"bitfit", "bottleneck", "compacter", "houlsby", "parallel_adapter", "pfeiffer"}
NAMES = sorted(METHODS)
TRAINED = [name for name in NAMES if name != "quantize"]
STACKED = [name for name in NAMES if "layers_to_transform" in signature(METHODS[name]).parameters]


def make(name, **options):
    return METHODS[name](**{**ARGUMENTS.get(name, {}), **options})


class Case(NamedTuple):
    """One method on the tiny model."""

    method: peft_jax.Method
    start: dict  # params of method.init on a plain base
    tuned: dict  # the same with every trainable leaf moved
    tuned_codes: dict  # the same on the codes that the plain base stands for
    at: object  # (params) -> loss, logits, gradient of the trainable leaves; compiled once


@pytest.fixture(scope="module")
def bases(peer_bases):
    """(makes a fresh torch model, Flax model with biases, plain params, the codes that they stand for)."""
    fresh, model, base = peer_bases["qwen2"]
    method = quantize(block_size=16)
    codes = method.init(None, base)
    plain = method.merge(codes)

    def torch_model():
        import torch

        theirs = fresh()
        with torch.no_grad():
            kernels = flatten(plain["layers"])
            for name, parameter in theirs.named_parameters():
                if name.endswith("proj.weight"):
                    _, _, layer, *path = name.removesuffix(".weight").split(".")
                    parameter.copy_(torch.tensor(np.asarray(kernels["/".join((*path, "kernel"))][int(layer)]).T))
        return theirs

    return torch_model, model, plain, codes


@pytest.fixture(scope="module")
def case_of(bases):
    """``case_of(name)``: the :class:`Case` of a method, made when it is first asked for."""
    _, model, plain, codes = bases

    def made(name):
        method = make(name)
        start = method.init(jax.random.key(0), plain)
        own = method.init(jax.random.key(0), codes) if name not in ("full", "quantize") else start
        tuned, tuned_codes = (properties.moved(method, params) for params in (start, own))
        return Case(method, start, tuned, tuned_codes, loss_at(method, model))

    return cache(made)


def loss_at(method, model):
    @jax.jit
    def at(trainable, frozen):
        def loss(leaves):
            logits = bind(method, model)({"params": combine(frozen, leaves)}, peer.IDS)
            errors = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], peer.IDS[:, 1:])
            return errors.mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    def parted(params):
        (loss, logits), gradient = at(*partition(params, method.labels(params)))
        return loss, logits, gradient

    return parted


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_the_base(bases, case_of, name):
    _, model, plain, _ = bases
    case = case_of(name)
    logits, base = np.asarray(case.at(case.start)[1]), np.asarray(peer.forward(model, plain))
    if name in ANOTHER_START:
        assert np.abs(logits - base).max() > 1e-4 * np.abs(base).max()
    else:
        np.testing.assert_allclose(logits, base, rtol=0, atol=START.get(name, 0) * np.abs(base).max())


@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_adapted_or_merging_is_refused(bases, case_of, name):
    _, model, plain, _ = bases
    case = case_of(name)
    assert case.method.mergeable == (name not in UNMERGED)
    if name in UNMERGED:
        with pytest.raises(PeftJaxError):
            case.method.merge(case.tuned)
        return
    merged = case.method.merge(case.tuned)
    assert {path: leaf.shape for path, leaf in flatten(merged).items()} == {
        path: leaf.shape for path, leaf in flatten(plain).items()}
    logits = np.asarray(case.at(case.tuned)[1])
    peer.assert_close(peer.forward(model, merged), logits, 1e-5)
    if name in TRAINED:
        assert np.abs(logits - peer.forward(model, plain)).max() > 1e-2 * np.abs(logits).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in {*UNMERGED, "quantize", "full"}])
def test_merged_in_half_precision(bases, case_of, name):
    _, model, plain, _ = bases
    case = case_of(name)
    exact = np.asarray(case.at(case.tuned)[1])
    properties.check_merge_in_half_precision(case.method, model, plain, peer.IDS, exact)


@pytest.mark.parametrize("name", NAMES)
def test_labels_and_leaves_agree(bases, case_of, name):
    """Every leaf has a label, all that ``init`` adds are leaves that the method names, and shapes alone suffice."""
    method, start = case_of(name)[:2]
    _, _, plain, _ = bases
    labels, leaves, before = (flatten(one) for one in (method.labels(start), start, plain))
    assert labels.keys() == leaves.keys() and all(isinstance(label, str) for label in labels.values())
    if name not in ("bitfit", "quantize"):  # these add none here
        added = leaves.keys() - before.keys()
        assert {path for path in leaves if owns(method.leaves, path)} == added and method.leaves
        assert added or name == "ln_tuning" or name == "full"
    shapes = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), plain)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, start)
    assert method.padding(start) == 0  # of layers that are all alike


@pytest.mark.parametrize("name", TRAINED)
def test_every_trainable_leaf_has_a_gradient(case_of, name):
    case = case_of(name)
    _, _, gradient = case.at(case.tuned)
    trainable, _ = partition(case.tuned, case.method.labels(case.tuned))
    assert flatten(trainable).keys() == flatten(gradient).keys()
    for path, leaf in flatten(gradient).items():
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), path


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_under_remat_on_a_mesh_and_a_quantised_base(bases, case_of, name):
    """The loss and the gradient of the first step are those of one device on the plain base, without remat; then the
    loss falls, every trainable leaf moves and no other."""
    _, model, _, _ = bases
    case = case_of(name)
    loss, _, gradient = case.at(case.tuned)
    after, losses, ours = properties.steps(case.method, model.clone(remat=True), case.tuned_codes, peer.IDS, 4, 0.02,
                                           make_mesh(1, 2, 2, jax.devices()[:4]))
    np.testing.assert_allclose(losses[0], loss, rtol=1e-4)
    for path, leaf in flatten(gradient).items():
        expected = np.asarray(leaf)
        np.testing.assert_allclose(flatten(ours)[path], expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max() + 1e-7,
                                   err_msg=path)
    assert losses[-1] < losses[0]
    properties.check_moved(case.method, case.tuned_codes, after)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "full"])
def test_merged_on_a_quantised_base(case_of, name):
    """The weights that merging gives on the plain base that the codes stand for."""
    case = case_of(name)
    if not case.method.mergeable:
        assert any(peft_jax.quant.is_leaf(leaf) for leaf in flatten(case.tuned_codes).values())
        return
    ours = flatten(case.method.merge(case.tuned_codes))
    for path, leaf in flatten(case.method.merge(case.tuned)).items():
        np.testing.assert_allclose(peft_jax.quant.plain(ours[path]), leaf, atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKED)
def test_layers_that_are_not_adapted_stay_the_base_whatever_their_leaf_says(bases, name):
    """One leaf serves a whole stack: where a layer is off, neither the merge nor the count has it."""
    _, model, plain, _ = bases
    method = make(name, layers_to_transform=1)
    tuned = properties.moved(method, method.init(jax.random.key(0), plain))
    merged, before = (flatten(tree)["layers/self_attn/q_proj/kernel"] for tree in (method.merge(tuned), plain))
    assert [np.array_equal(one, other) for one, other in zip(merged, before, strict=True)] == [True, False, True]
    half, rounded = (jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tree) for tree in (plain, tuned))
    merged, before = (flatten(tree)["layers/self_attn/q_proj/kernel"] for tree in (method.merge(rounded), half))
    assert merged.dtype == "bfloat16"
    assert [np.array_equal(one, other) for one, other in zip(merged, before, strict=True)] == [True, False, True]
    count = peft_jax.count(partition(tuned, method.labels(tuned))[0])
    assert method.padding(tuned) == 2 * count // 3
    peer.assert_close(peer.bound_logits(method, model, tuned), peer.forward(model, method.merge(tuned)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_FILE])
def test_in_a_chain_it_is_stored_bit_for_bit(bases, case_of, name, tmp_path):
    """Behind it a method of another kind; each trains its own leaves, and one file holds both."""
    _, model, plain, _ = bases
    other = ia3(("o_proj",), ()) if any(leaf.startswith("lora_") for leaf in case_of(name).method.leaves) else lora(
        r=2, target_modules=("o_proj",))
    method = chain(case_of(name).method, other)
    tuned = properties.moved(method, method.init(jax.random.key(0), plain))
    alone = flatten(case_of(name).method.labels(case_of(name).start))
    labels = flatten(method.labels(tuned))
    assert {path: labels[path] for path in alone} == alone
    added = {path.rpartition("/")[2] for path, label in labels.items() if path not in alone and label != "frozen"}
    assert added == ({"ia3_out"} if other.config["peft_type"] == "IA3" else {"lora_a", "lora_b"})
    peft_jax.save_adapter(tmp_path, method, model, tuned)
    if name in FILE_OF_A_LORA:
        _, loaded = peft_jax.load_adapter(tmp_path, plain)
        jax.tree.map(np.testing.assert_array_equal, flatten(loaded), flatten(tuned))
    else:
        peer.check_same_bits(model, plain, method, tuned, tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_FILE])
def test_moved_here_opens_in_peft_or_loads_here(bases, case_of, name, tmp_path):
    torch_model, model, plain, _ = bases
    case = case_of(name)
    ours = np.asarray(case.at(case.tuned)[1])
    assert np.abs(ours - peer.forward(model, plain)).max() > 1e-2 * np.abs(ours).max()
    peft_jax.save_adapter(tmp_path, case.method, model, case.tuned)
    if name not in FILE_OF_A_LORA:
        peer.check_same_bits(model, plain, case.method, case.tuned, tmp_path)
    if name not in NOT_OF_PEFT:
        peft = pytest.importorskip("peft")
        peer.assert_close(ours, peer.torch_logits(peft.PeftModel.from_pretrained(torch_model(), tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_OF_PEFT | FILE_OF_A_LORA | NO_FILE.keys()])
def test_trained_by_peft_loads_here(bases, case_of, name, tmp_path):
    """Made by peft as our file says, trained there: the same logits here, and as many parameters."""
    peft = pytest.importorskip("peft")
    torch_model, model, plain, _ = bases
    case = case_of(name)
    peft_jax.save_adapter(tmp_path / "ours", case.method, model, case.start)
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours", inference_mode=False)
    config.inference_mode = False
    peer.check_loads_from_peft((torch_model, model, plain), config, tmp_path / "theirs", whole=name != "ptuning")


@pytest.mark.parametrize("name", NO_FILE)
def test_what_has_no_adapter_file_says_so(bases, case_of, name, tmp_path):
    with pytest.raises(PeftJaxError, match=NO_FILE[name]):
        peft_jax.save_adapter(tmp_path, case_of(name).method, bases[1], case_of(name).tuned)


def test_the_file_has_as_many_numbers_as_are_trained(bases, case_of, tmp_path):
    """Of methods that keep no frozen leaf in it, and fold none away."""
    others = {*NO_FILE, *FILE_OF_A_LORA, "ptuning", "vera", "trainable_tokens"}
    for name in NAMES:
        if name in NO_FILE:
            continue
        case = case_of(name)
        peft_jax.save_adapter(tmp_path / name, case.method, bases[1], case.tuned)
        peer.check_saved_without_the_base(case.method, bases[1], case.tuned, tmp_path / name)
        if name in others:
            continue
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        trainable, _ = partition(case.tuned, case.method.labels(case.tuned))
        assert sum(tensor.size for tensor in stored.values()) == peft_jax.count(trainable), name
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["peft_type"]
