import jax
import jax.numpy as jnp
import pytest

from peft_jax import PeftJaxError
from peft_jax.core import tree

PARAMS = {"embed": {"embedding": jnp.ones((5, 2))},
          "layers": {"q": {"kernel": jnp.ones((2, 3)), "lora_a": jnp.ones(4)}}}  # fmt: skip


def test_flatten_and_back_keeps_paths_and_order():
    flat = tree.flatten(PARAMS)
    assert list(flat) == ["embed/embedding", "layers/q/kernel", "layers/q/lora_a"]
    assert tree.unflatten(flat) == PARAMS


def test_anything_but_a_dict_is_one_leaf():
    assert list(tree.flatten({"a": {"b": (1, [2])}})) == ["a/b"]


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_a_path_that_is_leaf_and_folder_is_an_error(flat):
    with pytest.raises(PeftJaxError, match="'a"):
        tree.unflatten(flat)


def test_map_paths_gives_each_leaf_its_path():
    assert tree.map_paths(lambda path, leaf: f"{path}={leaf}", {"a": {"b": 1}}) == {"a": {"b": "a/b=1"}}


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = [("q/kernel", 1), (".*/kernel", 2), ("kernel", 3)]
    paths = ("q/kernel", "x/q/kernel", "kernel", "kernel/x")
    assert [tree.first_match(rules, path, 0) for path in paths] == [1, 2, 3, 0]


def test_partition_and_combine_are_inverse():
    labels = tree.map_paths(lambda path, _: "fast" if "lora" in path else "frozen", PARAMS)
    trainable, frozen = tree.partition(PARAMS, labels)
    assert list(tree.flatten(trainable)) == ["layers/q/lora_a"]
    assert list(tree.flatten(frozen)) == ["embed/embedding", "layers/q/kernel"]
    assert jax.tree.structure(tree.combine(trainable, frozen)) == jax.tree.structure(PARAMS)


def test_combine_takes_the_later_leaf():
    assert tree.combine({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4}) == {"a": {"x": 1, "y": 3}, "b": 4}


def test_labels_of_another_tree_are_an_error():
    with pytest.raises(PeftJaxError, match=r"differ in 1 leaves, the first is 'layers/q/lora_a'"):
        tree.partition(PARAMS, {"embed": {"embedding": "frozen"}, "layers": {"q": {"kernel": "frozen"}}})


def test_count_and_bytes():
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": {"c": jnp.ones(4)}}
    assert (tree.count(params), tree.nbytes(params)) == (10, 6 * 2 + 4 * 4)
    assert tree.count(jax.eval_shape(lambda: params)) == 10
