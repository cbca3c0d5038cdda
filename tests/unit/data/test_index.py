"""Tar headers -> samples, the cache of that, and files that are not whole."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from vlmoe.data import index as index_module
from vlmoe.data.index import index_shards
from vlmoe.errors import UserError

EVERYTHING = frozenset({"txt", "json", "jpg", "seg.png"})


def _read_all(path):
    (index,) = index_shards([str(path)])
    return [(index.keys[i], index.read(i, EVERYTHING)) for i in range(len(index))]


def _add(tar, name, content=b"x"):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, tar_format):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        tar.addfile(tarfile.TarInfo("folder.d"))
        for key in ("./d.x/a", "./d.x/b", "ü" * 60 if tar_format != tarfile.USTAR_FORMAT else "c"):
            _add(tar, f"{key}.TXT", key.encode() * 300)
            _add(tar, f"{key}.seg.png", b"")
            _add(tar, f"{key}.json", b"{}")
        _add(tar, "._a.jpg")
        _add(tar, "no_extension")
    theirs = [
        (each["__key__"], {ext: content for ext, content in each.items() if not ext.startswith("__")})
        for each in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert len(theirs) == 4  # the fourth is the empty file `folder.d`
    assert _read_all(path) == [(key, {e: c for e, c in parts.items() if e in EVERYTHING}) for key, parts in theirs]


def test_cache_is_used_and_survives_anything(write_texts, cache_home, tmp_path, monkeypatch):
    path = write_texts("a{}.tar", [3]).replace("*", "0")
    fresh = _read_all(path)
    (cached,) = cache_home.rglob("*.json")
    good = json.loads(cached.read_text())

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_scan", None)  # calling it would fail
        assert _read_all(path) == fresh
    for broken in ("", "{", "[]", json.dumps({**good, "offsets": [1]}), json.dumps({**good, "keys": None})):
        cached.write_text(broken)
        assert _read_all(path) == fresh
        assert json.loads(cached.read_text()) == good
    write_texts("a{}.tar", [5])
    assert len(_read_all(path)) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a0.tar"))  # a file: nothing can be written below it
    assert len(_read_all(path)) == 5


def test_truncated_tar_gives_its_whole_samples_and_a_warning(write_texts, caplog):
    path = Path(write_texts("a{}.tar", [4]).replace("*", "0"))
    whole, content = _read_all(path), path.read_bytes()
    data = index_shards([str(path)])[0].offsets.tolist()
    cuts = {
        data[2] + 1: 2,  # within the third text
        data[2] - 100: 1,  # within its header: whether the second has more members cannot be known
        data[2] + 512: 2,  # between two members
        data[3] + 512: 3,  # before the end mark
        data[0] + 1: 0,
    }
    for cut, left in cuts.items():
        caplog.clear()
        path.write_bytes(content[:cut])
        assert _read_all(path) == whole[:left], cut
        assert str(path) in caplog.text and "truncated" in caplog.text


def test_what_is_not_a_tar_is_named(tmp_path, write_texts):
    whole = Path(write_texts("a{}.tar", [2]).replace("*", "0")).read_bytes()
    for content in (b"", b"not a tar" * 200, gzip.compress(whole)):
        path = tmp_path / "wrong.tar"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"wrong\.tar is not an uncompressed tar file"):
            index_shards([str(path)])


def test_many_files_are_read_by_processes(write_texts, tmp_path, monkeypatch, caplog):
    write_texts("a{}.tar", [2] * 5)
    paths = [str(tmp_path / f"a{n}.tar") for n in range(5)]
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:3000])
    monkeypatch.setattr(index_module, "_load", lambda *_, **__: None)
    threads = index_shards(paths)
    caplog.clear()
    monkeypatch.setattr(index_module, "MANY", 1)
    processes = index_shards(paths)
    assert [(each.path, each.keys, each.offsets.tolist()) for each in processes] == [
        (each.path, each.keys, each.offsets.tolist()) for each in threads
    ]
    assert [each.truncated for each in processes] == [False, False, False, True, False]
    assert paths[3] in caplog.text
    Path(paths[1]).write_bytes(b"")
    with pytest.raises(UserError, match=r"a1\.tar is not an uncompressed tar file"):
        index_shards(paths)


def test_few_files_stay_open(write_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_OPEN_FILES", 2)
    write_texts("a{}.tar", [2] * 5)
    indexes = index_shards([str(tmp_path / f"a{n}.tar") for n in range(5)])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    opened = len(index_module._open_files)
    for sample in (0, 1):
        for number, index in enumerate(indexes):
            assert index.read(sample, EVERYTHING) == {"txt": f"{number}.{sample}".encode()}
    assert len(index_module._open_files) <= max(2, opened)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) - before <= 2
