"""Where a base comes from: the hub's cache, and the GGUF file that one was converted from."""

import shutil

import pytest
from huggingface_hub import constants

from veneer.base.catalog import EMBEDDED
from veneer.base.source import base_folder, gguf_of
from veneer.errors import BaseModelError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_its_folder_in_the_cache(cache, tiny_base):
    snapshot = cache / "models--org--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_base, snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    assert base_folder("org/tiny") == str(snapshot)


@pytest.mark.parametrize("name", ["org/model", "model", "a--b/model", "org/model.git"])
def test_what_is_not_in_the_cache_is_refused(cache, name):
    with pytest.raises(BaseModelError, match="this reads files, and the hub's cache on this machine has none of it"):
        base_folder(name)


def test_folders_are_themselves_and_others_are_told(tiny_base, tmp_path):
    assert base_folder(str(tiny_base)) == str(tiny_base)
    with pytest.raises(BaseModelError, match="no such file or directory"):
        base_folder(str(tmp_path / "none.gguf"))


def test_the_gguf_file_of_a_base(tiny_base, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    assert gguf_of(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    assert gguf_of("smollm2") == EMBEDDED["smollm2"].path()
    assert gguf_of(str(tmp_path / "none.gguf")) is gguf_of(str(tiny_base)) is gguf_of("org/model") is None
