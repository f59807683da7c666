"""Metrics: pure functions of model outputs."""

from peft_jax.evaluation.metrics import expected_rating as expected_rating
from peft_jax.evaluation.metrics import first_word as first_word
from peft_jax.evaluation.metrics import rating_metrics as rating_metrics
from peft_jax.evaluation.metrics import spearman as spearman
