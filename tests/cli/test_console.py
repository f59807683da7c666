"""Parameter counts as Hugging Face peft counts them; the table at the end."""

import jax
import pytest

from peft_jax import lora
from peft_jax.cli import console
from peft_jax.train import progress


def test_the_line_is_peft_s():
    line = "trainable params: 921,600 || all params: 135,436,608 || trainable%: 0.6805"
    assert console.parameter_line(921_600, 135_436_608) == line


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"rank_pattern": {"layers.0.self_attn.q_proj": 1}}, {"bias": "all"},
                                       {"layers_to_transform": 1, "target_modules": ("up_proj",)}])  # fmt: skip
def test_counts_equal_peft_s_own(tiny_folder, tiny_model, arguments):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    arguments = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | arguments
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**arguments))
    method, base = lora(**arguments), tiny_model[1]
    ours = console.parameter_counts(method, base, method.init(jax.random.key(0), base))
    assert ours == theirs.get_nb_trainable_parameters()


def test_the_summary_shows_every_metric_and_cost_within_80_columns():
    metrics = dict.fromkeys(console.TITLES, 0.5)
    text = console.summary({
        "before": metrics | {"exact": 0.125}, "after": metrics | {"exact": 0.625}, "steps": 60, "seconds": 75.0,
        "trainable": 1, "all": 8, "peak_memory": {"host": 2_100_000_000}, "adapter_bytes": 3_700_000,
        "adapter": "runs/a",
    })  # fmt: skip
    assert max(map(len, text.splitlines())) <= 80
    costs = ("0.125       0.625", "12.5000 %", "1 min 15 s", "2.1 GB host", "3.7 MB  runs/a")
    for expected in (*costs, *console.TITLES.values()):
        assert expected in text


def test_more_columns_than_fit_are_tables_below_each_other():
    """As of --mode=measure: general text has a loss and no more, so its table has no empty rows."""
    rated = {"exact": 0.5, "loss": 0.25}
    columns = {"test": rated, "amazon_rating": rated, "tweet_rating": rated, "newspaper": {"loss": 4.125},
               "python_reference": {"loss": 3.5}}  # fmt: skip
    text = console.metrics_table(columns)
    assert max(map(len, text.splitlines())) <= 80 and not text.count("\n ") > 2
    first, second = text.split("\n\n")
    assert first.splitlines()[0].split() == ["test", "amazon_rating", "tweet_rating"]
    assert second.splitlines()[0].split() == ["newspaper", "python_reference"]
    assert "exact" in first and "exact" not in second and second.splitlines()[2].split()[-2:] == ["4.125", "3.500"]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    shown = progress.Progress(total=50, done=0)
    for step in range(1, 51):
        shown.update(step, 1.5, 1000.0)
    shown.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("step  1/50  loss 1.5000  1,000 tokens/s")
    assert last.startswith("step 50/50")
