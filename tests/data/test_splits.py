"""Which side an example falls on depends on its text alone."""

from peft_jax.data import sources
from tests.data.test_sources import ROWS


def test_split_ignores_order_and_other_examples():
    examples = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS * 10]
    train, held = sources.split_by_hash(examples, 0.3)
    again, held_again = sources.split_by_hash(examples[::-1][:25], 0.3)
    sides = {e["prompt"]: "held" for e in held} | {e["prompt"]: "train" for e in train}
    assert len(train) + len(held) == 400 and held
    assert all(sides[e["prompt"]] == "held" for e in held_again) and all(sides[e["prompt"]] == "train" for e in again)


def test_split_fraction_and_duplicates():
    examples = [{"text": f"Sentence number {i}"} for i in range(5000)]
    assert 0.18 < len(sources.split_by_hash(examples, 0.2)[1]) / 5000 < 0.22
    twins = [{"text": f"  sentence NUMBER\n{i} "} for i in range(5000)]
    held = {sources.text_key(e) for e in sources.split_by_hash(examples, 0.2)[1]}
    assert {sources.text_key(e) for e in sources.split_by_hash(twins, 0.2)[1]} == held


def test_halves_of_what_is_held_out_share_nothing_and_lose_nothing():
    """Held-out texts all have low hashes of the split: the half has to come from a hash of its own."""
    _, held = sources.split_by_hash([{"prompt": f"question {i}"} for i in range(1000)], 0.1)
    validation, test = (sources.half_by_hash(held, part) for part in ("validation", "test"))
    assert len(validation) + len(test) == len(held) and 0.3 < len(test) / len(held) < 0.7
    assert not [one for one in test if one in validation]
    assert sources.half_by_hash(held, "all") == held


def test_chats_with_the_same_question_are_duplicates():
    """Whatever was answered, and whatever was asked after it."""
    turns = [[{"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"), texts)]
             for texts in (("be kind", "Why?", "so", "and?"), ("Be  kind", "why?", "no"))]
    assert [sources.text_key({"messages": one}) for one in turns] == ["be kind why?"] * 2
    assert sources.text_key({"messages": turns[0][:2]}) == "be kind why?"


def test_sample_is_fixed_ordered_and_not_the_low_end_of_the_split():
    examples = [{"text": str(i)} for i in range(1000)]
    sample = sources.sample_by_hash(examples, 50)
    assert len(sample) == 50 and sample == [e for e in examples if e in sample]
    assert {e["text"] for e in sources.sample_by_hash(examples[::-1], 50)} == {e["text"] for e in sample}
    assert max(sources.hash_fraction(e["text"]) for e in sample) > 0.5
