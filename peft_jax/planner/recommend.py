"""Which method to take, from the memory at hand, the model, the task, how many tasks, and what inference may cost.

Memory is judged by the planner's sum of parts, quality by a comparison's measurements where there are some, and each
reason names the figure behind it and where that comes from. Beside it stands what the code
of the article "Full Fine-Tuning vs PEFT" would say: :func:`peft_jax.planner.rule_of_thumb.article_method`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from peft_jax.core import tree
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import Method, chain
from peft_jax.methods import METHODS
from peft_jax.methods.lora.lora import lora
from peft_jax.methods.quantize import quantize
from peft_jax.models import Head
from peft_jax.planner.breakdown import groups, sum_of_parts
from peft_jax.planner.hardware import Device
from peft_jax.planner.measured_figures import Figures, read_figures
from peft_jax.planner.rule_of_thumb import COMPLEXITIES, RANKS, article_method
from peft_jax.planner.shapes import abstract, as_model, check_attention, check_sizes, shapes
from peft_jax.train.loss import cross_entropy

LATENCIES = ("any", "none")  # what inference may cost more than the base's
# What the modules are called that bottlenecks and IA3 change, in models that do not have Llama's names.
_BERT = {"houlsby": {"attention_modules": ("attention.output.dense",), "output_modules": ("output.dense",)},
         "ia3": {"target_modules": ("key", "value", "output.dense"), "feedforward_modules": ("output.dense",)}}
PLACES = {
    "gpt2": {"houlsby": {"attention_modules": ("attn",), "output_modules": ("mlp",)},
             "ia3": {"target_modules": ("c_attn", "mlp.c_proj"), "feedforward_modules": ("mlp.c_proj",)}},
    "bert": _BERT, "roberta": _BERT,
    "distilbert": {"houlsby": {"attention_modules": ("out_lin",), "output_modules": ("lin2",)},
                   "ia3": {"target_modules": ("k_lin", "v_lin", "lin2"), "feedforward_modules": ("lin2",)}},
}
_QLORA = {"quant_type": "nf4", "block_size": 64, "double_quant": True}


def _lora(kind: str, r: int) -> dict[str, Any]:
    return {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}


# Each method with its settings, by the model's type and the rank that the task wants. The order is the article's, LoRA,
# QLoRA, adapters, for where nothing is measured; full fine-tuning, the dearest, comes after them.
SETTINGS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "lora": _lora,
    "qlora": _lora,
    "houlsby": lambda kind, r: PLACES[kind]["houlsby"] if kind in PLACES else {},
    "prefix": lambda kind, r: {"num_virtual_tokens": 20},
    "ia3": lambda kind, r: PLACES[kind]["ia3"] if kind in PLACES else {},
    "full": lambda kind, r: {},
}


class Reason(NamedTuple):
    """What speaks for or against a method, and where the figure in it comes from."""

    words: str
    source: str


class Choice(NamedTuple):
    """A method with the settings it was judged with. need: bytes of each device, the margin left out. fits, spare:
    whether that and the margin are there, and bytes left, below 0 what is missing. allowed: by the latency asked for.
    """

    method: str
    settings: dict[str, Any]
    need: int
    fits: bool
    spare: int
    allowed: bool
    reasons: list[Reason]


class Recommendation(NamedTuple):
    """choices: best first. asked: the question, in words by name. article: what the article's code would answer."""

    asked: dict[str, Any]
    choices: list[Choice]
    article: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As ``recommend.json`` holds it; all sizes in bytes."""
        choices = [{**one._asdict(), "reasons": [reason._asdict() for reason in one.reasons]} for one in self.choices]
        return {"asked": self.asked, "choices": choices, "article": self.article}


def recommend(model: Any, memory: int, *, devices: int = 1, batch: int = 1, seq: int = 1024, tasks: int = 1,
              complexity: str = "moderate", latency: str = "any", figures: Mapping[str, Any] | None = None,
              methods: Sequence[str] = tuple(SETTINGS), dtype: Any = "bfloat16", param_dtype: Any = "bfloat16",
              remat: bool = True, packed: bool = False) -> Recommendation:
    """The methods of ``SETTINGS``, or those that are named, for a model, best first.

    Args:
      model: a config, such as ``peft_jax.load_config(source)``, or a model.
      memory: bytes of each device. devices: how many; weights, gradients and the optimiser are divided evenly.
      batch, seq: rows and tokens of a row that each device computes at once.
      tasks: how many adapters one base shall serve.
      complexity: of the task, "simple", "moderate" or "complex": rank 8, 16 or 32, the article's choice.
      latency: "any", or "none" where inference may cost no more than the base's: what cannot be merged is ruled out.
      figures: measurements, the ``table.json`` of a comparison as a mapping; every key of it may be absent.
      methods: to choose from, of ``SETTINGS`` and ``METHODS``; those without settings are judged with their defaults.
        dtype, param_dtype, remat: how the model would train.
      packed: rows hold several texts, positions from 0 in each: they may be longer than the model's positions.

    The order is that of :func:`ranked`.

    Raises ``PeftJaxError`` for sizes below 1 and words that are none of the above.

    >>> from peft_jax.models import LlamaConfig
    >>> sizes = LlamaConfig(99, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, True)
    >>> found = recommend(sizes, 24 * 10**9, seq=16, tasks=3, methods=("full", "prefix", "lora"))
    >>> [one.method for one in found.choices], found.article["choice"]
    (['lora', 'prefix', 'full'], 'lora')
    """
    check_sizes("recommend", memory=memory, devices=devices, batch=batch, seq=seq, tasks=tasks)
    for name, value, choices in (("complexity", complexity, COMPLEXITIES), ("latency", latency, LATENCIES)):
        if value not in choices:
            raise PeftJaxError(f"recommend: {name}={value!r}: {nearest(str(value), choices)}")
    if odd := [name for name in methods if name not in {**SETTINGS, **METHODS.files}]:
        raise PeftJaxError(f"recommend: methods={odd[0]!r}: {nearest(str(odd[0]), [*SETTINGS, *METHODS])}")
    measured = read_figures({} if figures is None else figures)
    if hasattr(model, "apply") and not hasattr(getattr(model, "config", None), "model_type"):
        raise PeftJaxError(f"recommend: a {type(model).__name__} has no config with a model_type, by which methods' "
                           "settings are chosen: plan each method with peft_jax.plan instead.")
    model = _with_head(as_model(model, dtype, param_dtype, remat))
    device = Device("each device", memory)
    check_attention(model.config, model.dtype)
    base = abstract(model)
    ask = Asked(model, base, device, devices, batch, seq, tasks, RANKS[complexity], latency, measured, packed)
    found = ranked([_choice(name, ask) for name in methods], tasks, measured)
    asked = {"memory of a device": memory, "devices": devices, "batch": f"{batch} x {seq} tokens", "tasks": tasks,
             "complexity": complexity, "latency": latency, "measured": measured.origin,
             "computing in": jnp.dtype(model.dtype).name, "weights, if plain, in": jnp.dtype(model.param_dtype).name,
             "remat": model.remat, "optimiser": "AdamW, two moments in float32",
             "margin": device.margin}
    return Recommendation(asked, found, article_method(tree.count(base), memory * devices, tasks, complexity))


def ranked(choices: Sequence[Choice], tasks: int, measured: Figures) -> list[Choice]:
    """What fits before what does not, of that the nearest miss first; then what the latency allows; with several tasks,
    adapters before whole copies; then by measured gain, methods within one standard deviation of the best alike; then
    by ``SETTINGS``."""
    order = {name: at for at, name in enumerate(dict.fromkeys([*SETTINGS, *METHODS]))}
    return sorted(choices, key=lambda one: (
        not one.fits, not one.fits and -one.spare, not one.allowed, tasks > 1 and one.method == "full",
        *measured.place(one.method), order[one.method]))


def method_of(name: str, settings: Mapping[str, Any]) -> Method:
    """A method that :func:`recommend` may choose, with its settings."""
    if name == "qlora":
        return chain(quantize(**_QLORA), lora(**settings))
    return METHODS[name](**settings)


def _with_head(model: Any) -> Any:
    """An encoder without a head has nothing to train for: with one for two classes."""
    if hasattr(model.config, "head") and model.config.head is None:
        return model.clone(config=dataclasses.replace(model.config, head=Head()))
    return model


class Asked(NamedTuple):
    """A question, checked. base: shapes of the model's parameters. r: the rank that the task wants."""

    model: Any
    base: tree.Tree
    device: Device
    devices: int
    batch: int
    seq: int
    tasks: int
    r: int
    latency: str
    measured: Figures
    packed: bool


def _choice(name: str, asked: Asked) -> Choice:
    settings = SETTINGS[name](asked.model.config.model_type, asked.r) if name in SETTINGS else {}
    method = method_of(name, settings)
    size, trained = _sizes(asked, method)
    states = size["weights"] + size["gradients"] + size["optimiser"]
    need = math.ceil(states / asked.devices) + sum(size.values()) - states
    spare = asked.device.room - need
    reasons = [_memory(need, spare, states, asked.devices), *_switching(name, asked.tasks, trained),
               *_inference(method, asked.latency), *[Reason(*one) for one in asked.measured.reasons(name)]]
    return Choice(name, settings | (_QLORA if name == "qlora" else {}), need, spare >= 0, spare,
                  asked.latency == "any" or method.mergeable, reasons)


def _sizes(asked: Asked, method: Method) -> tuple[dict[str, int], int]:
    """(bytes by group, bytes of what trains)."""
    given = shapes(asked.model, method, optax.adamw(1e-4), asked.batch, asked.seq, base=asked.base,
                   packed=asked.packed)
    return groups(sum_of_parts(given, 512, cross_entropy)), tree.nbytes(given.trainable)


def _memory(need: int, spare: int, states: int, devices: int) -> Reason:
    verdict = f"{spare / 1e9:.1f} GB to spare" if spare >= 0 else f"{-spare / 1e9:.1f} GB too much"
    shared = f" each of {devices} devices, if weights and state are cut evenly" if devices > 1 else ""
    return Reason(f"training needs {need / 1e9:.1f} GB{shared}: {verdict}",
                  f"plan: sum of parts, {states / 1e9:.1f} GB of it weights, gradients and optimiser; not compiled")


def _switching(name: str, tasks: int, trained: int) -> list[Reason]:
    if tasks == 1:
        return []
    if name == "full":
        return [Reason(f"{tasks} tasks are {tasks} whole copies, {tasks * trained / 1e9:.2f} GB",
                       "plan: trained parameters")]
    mixes = SETTINGS.get(name) is _lora
    how = "each row of a batch its own (mix_adapters)" if mixes else "one at a time, combine(base, adapter)"
    return [Reason(f"{tasks} tasks share the base: {tasks} adapters of {trained / 1e6:.1f} MB that switch without "
                   f"recompiling, {how}", "plan: trained parameters, in float32")]


def _inference(method: Method, latency: str) -> list[Reason]:
    if latency == "any":
        return []
    if not method.mergeable:
        return [Reason("it cannot be merged, so inference costs more than the base's: ruled out", "the method itself")]
    return [Reason("merged into the weights it costs nothing at inference; a merged model serves one task",
                   "the method itself")]


def describe_recommendation(found: Recommendation) -> str:
    """The recommendation for people."""
    asked = [f"{name:<24}{f'{value / 1e9:.1f} GB' if name in ('memory of a device', 'margin') else value}"
             for name, value in found.asked.items()]
    lines = []
    for at, one in enumerate(found.choices, 1):
        verdict = "fits" if one.fits else "does not fit"
        settings = ", ".join(f"{name}={value}" for name, value in one.settings.items())
        lines += [f"{at}. {one.method}{f' ({settings})' if settings else ''}: {verdict}"
                  f"{'' if one.allowed else ', ruled out by latency'}",
                  *(f"     {reason.words} [{reason.source}]" for reason in one.reasons)]
    return "\n".join([*asked, "", *lines, "", *_article(found.article)])


def _article(article: Mapping[str, Any]) -> Sequence[str]:
    needs = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in article["needs"].items())
    memory = article["memory"] / 2**30
    return ['The rule of the article "Full Fine-Tuning vs PEFT": '
            f"{article['words']} ({needs}, of {memory:.1f} of its GB, 1024**3 bytes)"]
