"""Full fine-tuning with the source article's recipe: the yardstick for every method with fewer parameters.

    python run.py --config=experiments/full.py
    python run.py --config=experiments/full.py --config.method.last_n_layers=4

Claim: the metrics rise as with an adapter or more; how much general text suffers is a matter of the rate: newspaper
loss 4.91 stays at 5e-5 and rises to 6.02 at 2e-4 (LOG.md). 100 % of the parameters train: 16 bytes for each (float32
copy, gradient, two moments) beside the activations, of which rematerialisation keeps one per layer. Paper: none of
its own; the settings are the article's. Number: 0.370 → 0.550 among the five words, rank correlation 0.714 → 0.780,
with --config.optim.learning_rate=5e-05 and 30 steps, 100 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD
EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="full")
    config.model.update(dtype="bfloat16", param_dtype="bfloat16", remat=True)
    config.data.batch_size = 2
    config.optim.update(learning_rate=2e-5, schedule="cosine", warmup_ratio=0.03, accumulate_steps=8, epochs=3.0)
    config.eval.every_epoch = True
    config.checkpoint.update(every=0, every_epoch=True)
    config.log.every = 10
    return config
