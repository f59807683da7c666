"""Data: examples from a source, token ids with a loss mask, batches of static shape."""

from peft_jax.data.batches import Batches as Batches
from peft_jax.data.batches import eval_batches as eval_batches
from peft_jax.data.batches import prompt_batches as prompt_batches
from peft_jax.data.sources import load_examples as load_examples
from peft_jax.data.tokenize import Encoded as Encoded
from peft_jax.data.tokenize import choice_tokens as choice_tokens
from peft_jax.data.tokenize import encode as encode
from peft_jax.data.tokenize import encode_all as encode_all
from peft_jax.data.tokenize import encode_prompts as encode_prompts
