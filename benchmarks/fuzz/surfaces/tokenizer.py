"""The files of a tokenizer; judged by transformers' own reading of the same folder."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial, equal

FILES = ("tokenizer.json", "tokenizer_config.json")
TEXTS = ("a dull film, number 3, is bad", "<user>é\u202e<end>", "")


def prepare(place: Path) -> Path:
    ours(material.model(place))  # so that all is imported
    return material.model(place)


def trial(base: Path, rng: Random, folder: Path) -> Trial:
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / file.name)
    file, harmless = folder / rng.choice(FILES), False
    content = json.loads(file.read_text())
    chance = rng.random()
    if chance < 0.1:
        what = damages.kind_of(file, rng)
    elif chance < 0.2:
        file.write_bytes(damages.dumped(damages.shuffled(content, rng), rng))
        what, harmless = "keys in another order", True
    elif chance < 0.5:
        what, changed = damages.bytes_of(file.read_bytes(), rng)
        file.write_bytes(changed)
    else:
        place, odd = rng.choice(_places(content, rng)), rng.choice(damages.ODD)
        dropped = rng.random() < 0.3
        file.write_text(json.dumps(damages.drop(content, place) if dropped else damages.put(content, place, odd)))
        what = f"{'.'.join(map(str, place))} {'is gone' if dropped else f'is {str(odd)[:40]!r}'}"
    return Trial(f"{file.name}: {what}", lambda: ours(folder), _as_theirs(folder), harmless)


def _places(content: dict[str, Any], rng: Random) -> list[tuple]:
    """Places, those of the long vocabulary as seldom as others."""
    places = list(damages.paths(content))
    short = [place for place in places if place[:2] not in (("model", "vocab"), ("model", "merges"))]
    return short if rng.random() < 0.8 else places


def ours(folder: Path) -> dict[str, Any]:
    from peft_jax.hub.tokenizer import load_tokenizer

    return told(load_tokenizer(folder))


def told(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of some texts, and its special tokens."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {"ids": ids, "texts": [tokenizer.decode(one) for one in ids], "eos": tokenizer.eos_token_id,
            "length": len(tokenizer)}


def _as_theirs(folder: Path):
    def judge(result: dict[str, Any]) -> str:
        from transformers import AutoTokenizer

        try:
            theirs = told(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True))
        except Exception as error:  # they raise bare Exception
            return f"it was accepted, and transformers refuses it: {type(error).__name__}: {error}"
        return equal(theirs)(result)

    return judge
