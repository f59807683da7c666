"""AdaLoRA: its options, the allocation of ranks beside peft's, and the exchange with it."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax
from peft_jax import PeftJaxError, adalora, chain, combine, flatten, ia3, load_adapter, partition, save_adapter
from peft_jax.methods.adalora import allocation
from peft_jax.train.optimizer import make_optimizer
from peft_jax.train.step import init_state, make_step
from tests import peer, properties

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

RANKS = {"init_r": 4, "target_r": 2}
# name: (base, AdaLoraConfig's arguments). The same words make the adapter here and in peft.
CASES = {
    "all-linear": ("qwen2", {**RANKS, "total_step": 5, "lora_alpha": 3, "target_modules": "all-linear",
                             "bias": "lora_only"}),
    "some layers": ("tied", {**RANKS, "total_step": 5, "target_modules": ["down_proj"], "layers_to_transform": [0, 2],
                             "modules_to_save": ["model.norm"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], adalora(**options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_loads_from_peft(peer_bases[name], peft.AdaLoraConfig(task_type="CAUSAL_LM", **options), tmp_path)


def test_budgets_are_peft_s():
    for total, tinit, tfinal, every in ((50, 0, 0, 1), (200, 10, 20, 7), (33, 5, 1, 4), (1000, 100, 300, 10)):
        options = {"total_step": total, "tinit": tinit, "tfinal": tfinal, "deltaT": every, **RANKS}
        theirs = peft.tuners.adalora.RankAllocator.budget_schedule
        scheduler = SimpleNamespace(peft_config=peft.AdaLoraConfig(**options), init_bgt=28, target_bgt=14)
        left, cuts = allocation.budgets(adalora(**options).config, 28, 7, total)
        for step in range(total - tfinal + 1):
            budget, cut = theirs(scheduler, step)
            forced = step == total - tfinal
            assert (left[step], cuts[step]) == (budget, cut or forced), (options, step)


TRAINING = {"init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 2, "deltaT": 2,
            "target_modules": ["q_proj", "down_proj"]}


def trained_there(fresh, steps=8):
    """peft's AdaLoRA after some steps of SGD on random gradients, which are returned, and its E before each."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(fresh(), peft.AdaLoraConfig(task_type="CAUSAL_LM", **TRAINING))
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    gradients = [{name: torch.randn_like(p) for name, p in named.items()} for _ in range(steps)]
    return theirs, named, gradients


def test_ranks_are_allocated_as_in_peft(peer_bases, tmp_path):
    """The same start, gradients and plain SGD in both: after every step the same factors, cut entries of e included."""
    fresh, _, base = peer_bases["llama"]
    theirs, named, gradients = trained_there(fresh)
    theirs.save_pretrained(tmp_path / "start")
    method, params = load_adapter(tmp_path / "start", base)
    trainable, _ = partition(params, method.labels(params))
    tx = method.optimizer(optax.sgd(0.1), 8)
    state = tx.init(trainable)
    update = jax.jit(tx.update)
    cut = []
    for step, slope in enumerate(gradients, 1):
        for name, parameter in named.items():
            parameter.grad = slope[name]
            parameter.data -= 0.1 * slope[name]
        theirs.base_model.update_and_allocate(step)
        updates, state = update(as_ours(slope, trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        expected = flatten(as_ours(named, trainable))
        for path, leaf in flatten(trainable).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=f"{path} after {step}")
        cut.append(sum(int((leaf == 0).sum()) for path, leaf in flatten(trainable).items() if path.endswith("_e")))
    assert cut[0] == cut[2] == 0 and cut[1] > 0 and cut[-1] == cut[-3] == 12  # 6 modules, from 4 to 2 each


def as_ours(tensors, like):
    """peft's parameters or gradients as a tree like ours, layers stacked."""
    found = {}
    for path, leaf in flatten(like).items():
        folder, _, name = path.rpartition("/")
        layers = []
        for layer in range(leaf.shape[0]):
            module = folder.replace("layers/", f"layers.{layer}.").replace("/", ".")
            key = f"base_model.model.model.{module}.lora_{name[-1].upper()}.default"
            layers.append(tensors[key].detach().numpy().T)
        found[path] = jnp.asarray(np.stack(layers).reshape(leaf.shape))
    return peft_jax.unflatten(found)


@pytest.mark.slow
def test_a_cut_adapter_of_peft_loads_here(peer_bases, tmp_path):
    fresh, model, base = peer_bases["llama"]
    theirs, named, gradients = trained_there(fresh)
    for step, slope in enumerate(gradients, 1):
        for name, parameter in named.items():
            parameter.grad = slope[name]
            parameter.data -= 0.1 * slope[name]
        theirs.base_model.update_and_allocate(step)
    expected = peer.torch_logits(theirs)
    theirs.save_pretrained(tmp_path)
    method, params = load_adapter(tmp_path, base)
    peer.assert_close(peer.bound_logits(method, model, params), expected)
    trainable, _ = partition(params, method.labels(params))
    assert peft_jax.count({p: leaf for p, leaf in flatten(trainable).items() if p.endswith("_e")}) - sum(
        int((~own).sum()) for _, own in allocation.modules(method.config, params)) == 12


@pytest.mark.slow
def test_a_cut_adapter_opens_in_peft_and_here(peer_bases, tmp_path):
    """Trained by our step with the method's optimiser and penalty; one module loses all of its ranks."""
    fresh, model, base = peer_bases["llama"]
    method = adalora(**TRAINING)
    params = method.init(jax.random.key(0), base)
    trainable, frozen = partition(params, method.labels(params))
    tx = method.optimizer(optax.adam(0.05), 8)
    step = make_step(peft_jax.bind(method, model), tx, 64, penalty=method.penalty)
    state = init_state(trainable, tx, jax.random.key(0))
    for _ in range(8):
        state, _ = step(state, frozen, properties.batch_of(peer.IDS))
    tuned = flatten(combine(frozen, state.trainable))
    assert sum(int((leaf == 0).sum()) for path, leaf in tuned.items() if path.endswith("_e")) == 12
    tuned["layers/mlp/down_proj/adalora_e"] = tuned["layers/mlp/down_proj/adalora_e"].at[1].set(0)
    tuned = peft_jax.unflatten(tuned)
    ours = peer.bound_logits(method, model, tuned)
    save_adapter(tmp_path, method, model, tuned)
    peer.assert_close(ours, peer.torch_logits(peft.PeftModel.from_pretrained(fresh(), tmp_path)))
    again, loaded = load_adapter(tmp_path, base)
    peer.assert_close(peer.bound_logits(again, model, loaded), ours, 1e-5)
    peer.assert_close(peer.forward(model, again.merge(loaded)), ours)
    save_adapter(tmp_path / "again", again, model, loaded)
    _, twice = load_adapter(tmp_path / "again", base)
    jax.tree.map(np.testing.assert_array_equal, twice, loaded)


@pytest.mark.slow
def test_the_penalty_is_peft_s(peer_bases, tmp_path):
    fresh, _, base = peer_bases["llama"]
    theirs, _, _ = trained_there(fresh)
    theirs.save_pretrained(tmp_path)
    method, params = load_adapter(tmp_path, base)
    ids = torch.tensor(peer.IDS)
    with torch.no_grad():
        whole = theirs(ids, labels=ids).loss
        theirs.peft_config["default"].orth_reg_weight = 0.0
        expected = float(whole - theirs(ids, labels=ids).loss)
    np.testing.assert_allclose(method.penalty(params), expected, rtol=1e-5)
    partial_stack = adalora(**TRAINING | {"layers_to_transform": 1})
    slope = jax.grad(partial_stack.penalty)(partial_stack.init(jax.random.key(0), base))
    assert all(np.isfinite(leaf).all() for leaf in flatten(slope).values())


@pytest.mark.slow
def test_the_training_step_adds_the_penalty_to_the_gradient(peer_bases):
    """With a weight far above the loss, A and B only become orthogonal."""
    _, model, base = peer_bases["llama"]
    method = chain(ia3(target_modules=("k_proj",), feedforward_modules=()), adalora(**RANKS, orth_reg_weight=100.0,
                                                                                    tinit=30))
    params = method.init(jax.random.key(0), base)
    trainable, frozen = partition(params, method.labels(params))
    tx = method.optimizer(optax.adam(0.02), 60)
    step, state = make_step(peft_jax.bind(method, model), tx, 64, penalty=method.penalty), init_state(trainable, tx,
                                                                                              jax.random.key(0))
    before = method.penalty(params)
    for _ in range(25):
        state, _ = step(state, frozen, properties.batch_of(peer.IDS))
    assert method.penalty(combine(frozen, state.trainable)) < 0.2 * before


def test_counts_are_the_closed_form():
    """r (in + out + 1) a module: with r = 12 on q and v of SmolLM2-135M, 30 layers of 576 and 576 or 192."""
    shapes = {"q_proj": (30, 576, 576), "v_proj": (30, 576, 192)}
    base = {"layers": {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}}
    method = adalora()
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), base)
    assert peft_jax.count(partition(params, method.labels(params))[0]) == 30 * 12 * (576 + 576 + 1 + 576 + 192 + 1)


def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    for options, said in (({"target_r": 9, "init_r": 8}, "target_r=9 is above init_r=8"),
                          ({"lora_alpha": 0}, "above 0"), ({"beta1": 1}, "beta1=1"), ({"init_r": 0}, "init_r=0"),
                          ({"tinit": 6, "tfinal": 4, "total_step": 10}, "leave none of 10 steps")):
        with pytest.raises(PeftJaxError, match=said):
            adalora(**options)
    with pytest.raises(PeftJaxError, match="leave none of 5 steps"):
        adalora(tfinal=5).optimizer(optax.sgd(1.0), 5)
    with pytest.raises(PeftJaxError, match=r"did you mean down_proj\?"):
        adalora(target_modules=("down_porj",)).init(jax.random.key(0), base)


@pytest.mark.slow
def test_importance_is_that_of_clipped_gradients():
    """As in peft, whose trainer clips before it allocates."""
    method = adalora(target_modules=("q_proj",), total_step=10, tinit=1, tfinal=2, **RANKS)
    base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (6, 8))}}
    params = method.init(jax.random.key(1), base)
    leaves, _ = partition(params, method.labels(params))
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape), leaves)
    small = jax.tree.map(lambda leaf: leaf * 0.01 / optax.tree.norm(gradients), gradients)
    options = {"learning_rate": 0.1, "schedule": "constant", "warmup_ratio": 0.0, "around": method.optimizer}
    states = []
    for gradient, clip in ((gradients, 0.01), (small, 0.0)):
        tx = make_optimizer(10, clip_norm=clip, **options)
        states.append(tx.update(gradient, tx.init(leaves), leaves)[1][1]["allocation"])
    chex.assert_trees_all_close(*states, rtol=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(states[0].sensitivity)) > 0
