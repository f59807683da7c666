"""Tiny real tokenizers, trained here in a moment: byte-level BPE (GPT, Llama 3, SmolLM) and SentencePiece style (Llama
2).
"""

import pytest

TEXT = [
    "Review: the film is good, bad, great, okay or terrible.",
    "In one word, the movie is good",
    "user assistant system hello world",
] * 20
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(train_bpe):
    """Byte-level BPE with a ChatML template; adds no bos, like SmolLM2."""
    made = train_bpe(TEXT, 450, SPECIAL, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def spaced_tokenizer():
    """Writes a space before every text and <s> before every sequence, like Llama 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made
