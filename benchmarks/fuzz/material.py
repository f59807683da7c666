"""What is damaged: a tiny random model with its tokenizer, an adapter of it, a table, a finished run; made once."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from peft_jax.errors import PeftJaxError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ("{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<answer>' }}{{ m['content'] }}<end>\n"
            "{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}")
ROWS = [{"prompt": f"a {kind} film, number {number}, is", "completion": word, "stars": number, "note": None}
        for number in range(12) for kind, word in {"dull": " bad", "bright": " good"}.items()]  # fmt: skip
SETTINGS = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 4, "optim.learning_rate": 1e-2, "checkpoint.every": 2,
            "eval.batch_size": 4, "eval.probe": "", "eval.limit": 4, "method.r": 2, "log.tensorboard": False,
            "task.prompt_column": "prompt", "task.completion_column": "completion", "task.validation_fraction": 0.2,
            "generate.num_prompts": 1, "generate.max_new_tokens": 2, "measure.limit": 4, "measure.neighbours": "()",
            "measure.general": "()", "measure.prompt_tokens": 4, "measure.new_tokens": 2, "measure.repeats": 1}


def once(place: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``place/name``, which ``make`` fills where no process has done so yet."""
    folder = place / name
    with FileLock(place / f"{name}.lock"):
        if not folder.exists():
            aside = place / f"{name}.new"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            make(aside)
            aside.rename(folder)
    return folder


def tokenizer():
    """A byte-level BPE of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>", "<user>", "<answer>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([row["prompt"] + row["completion"] for row in ROWS] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    made.chat_template = TEMPLATE
    return made


def model(place: Path) -> Path:
    """A folder in Hugging Face's layout: two layers of the Llama family."""

    def make(folder: Path) -> None:
        import jax
        import jax.numpy as jnp

        from peft_jax.hub.save import save_pretrained
        from peft_jax.models.llama import CausalLM, LlamaConfig

        made = tokenizer()
        net = CausalLM(LlamaConfig(len(made), 16, 24, 2, 4, 2, 4, 1e-5, 1e4, 128, True))
        save_pretrained(folder, net, net.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"], made)

    return once(place, "model", make)


def table(place: Path) -> Path:
    """A folder with ``rows.jsonl``, for a task."""
    return once(place, "table", lambda folder: (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS)) and None)


def arguments(place: Path, **settings: object) -> list[str]:
    """The flags of a tiny run, but for the workdir and the mode."""
    overrides = [f"--config.{key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    return [f"--config={ROOT / 'experiments' / 'lora.py'}:model={model(place)},task={table(place) / 'rows.jsonl'}",
            *overrides]


def run(place: Path) -> Path:
    """The workdir of a finished tiny run, with all that later modes write, too."""

    def make(folder: Path) -> None:
        for mode in ("train", "eval", "measure", "merge"):
            command([*arguments(place), f"--workdir={folder}", f"--mode={mode}"])

    return once(place, "run", make)


def command(argv: list[str]) -> str:
    """What a command line prints. Raises ``PeftJaxError`` where it ends in one line, else what it ends with."""
    import run as program

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program.main(argv)
    told = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if code == 2 and len(told) == 1:
        raise PeftJaxError(told[0].removeprefix("error: "))
    if code:
        raise RuntimeError(f"exit code {code}, and on standard error: {err.getvalue()[-300:]!r}")
    return out.getvalue()
