"""Where each sample of a tar file lies: its headers are read once, the index is kept on disk, bytes are read by offset.

A sample is a run of members that share their name up to the first dot of the base name (webdataset's convention); what
follows that dot is the extension. Axes: members of one shard, ends (its samples + 1).
"""

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from vlmoe.data.sample import BrokenSample
from vlmoe.errors import UserError

READERS = 8  # of headers, at a time
MANY = 16  # tar files that are worth processes
MAX_OPEN_FILES = 256  # tar files that one process keeps open
CACHE_VERSION = 1
BLOCK = 512  # bytes; tar headers and data start at multiples of it

_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_log = logging.getLogger(__name__)
_open_files: OrderedDict[tuple[str, int, int], int] = OrderedDict()


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar file. `size` and `mtime_ns` say which version of the file this describes."""

    path: str
    size: int  # bytes
    mtime_ns: int
    truncated: bool  # the file ends before its end mark; its last sample is left out
    keys: list[str]  # one a sample
    first_members: Int[np.ndarray, " ends"]  # where each sample starts among the members, and the end: samples + 1
    extensions: list[str]  # the distinct ones
    extension_ids: Int[np.ndarray, " members"]
    offsets: Int[np.ndarray, " members"]  # bytes
    sizes: Int[np.ndarray, " members"]  # bytes

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, sample: int, extensions: frozenset[str]) -> dict[str, bytes]:
        """The bytes of those members of a sample whose extension is asked for, by extension.

        Raises:
            BrokenSample: the file cannot be read there any more.
        """
        return {
            name: _read_at(self, offset=int(self.offsets[member]), size=int(self.sizes[member]))
            for name, member in self.members(sample).items()
            if name in extensions
        }

    def members(self, sample: int) -> dict[str, int]:
        """Extension -> place among the members of the shard."""
        places = range(self.first_members[sample], self.first_members[sample + 1])
        return {self.extensions[self.extension_ids[place]]: place for place in places}


def index_shards(paths: Sequence[str]) -> list[ShardIndex]:
    """The indexes of tar files, from the cache (`$XDG_CACHE_HOME` or `~/.cache`, `vlmoe/index`) or from their headers.

    A truncated file gives the samples before the cut and a warning. Many files are read by several processes, for it is
    Python that reading their headers waits for.

    Raises:
        UserError: a file cannot be read or is not an uncompressed tar file.
    """
    with _readers(len(paths)) as pool:
        indexes = [*tqdm(pool.map(_index, paths), total=len(paths), desc="reading shard headers", delay=2)]
    for index in indexes:
        if index.truncated:
            _log.warning("%s is truncated: using the %d whole samples at its start", index.path, len(index))
    return indexes


def _readers(files: int) -> Executor:
    if files < MANY or sys.platform != "linux":
        return ThreadPoolExecutor(READERS)
    return ProcessPoolExecutor(min(READERS, len(os.sched_getaffinity(0))), multiprocessing.get_context("fork"))


def _index(path: str) -> ShardIndex:
    try:
        stat = os.stat(path)
        cached = _load(path, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        index = cached or _scan(path, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
    except tarfile.ReadError as error:
        raise UserError(f"{path} is not an uncompressed tar file ({error}); remove it or make it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if cached is None:
        _save(index)
    return index


def _scan(path: str, *, size: int, mtime_ns: int) -> ShardIndex:
    keys: list[str] = []
    first_members: list[int] = []
    extension_ids: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    ids: dict[str, int] = {}
    in_sample: set[str] = set()
    end = 0
    with tarfile.open(path, "r:") as tar, contextlib.suppress(tarfile.ReadError):  # raised by the loop: a cut
        for member in tar:
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            name = _MEMBER_NAME.fullmatch(member.name)
            if not member.isreg() or name is None:
                continue
            key, extension = name[1], name[2].lower()
            if not keys or key != keys[-1] or extension in in_sample:
                keys.append(key)
                first_members.append(len(offsets))
                in_sample.clear()
            in_sample.add(extension)
            extension_ids.append(ids.setdefault(extension, len(ids)))
            offsets.append(member.offset_data)
            sizes.append(member.size)
    with open(path, "rb") as file:
        file.seek(end)
        truncated = file.read(BLOCK) != bytes(BLOCK)
    if truncated and keys:  # whether its last sample has all its members cannot be known
        keys.pop()
        whole = first_members.pop()
        extension_ids, offsets, sizes = extension_ids[:whole], offsets[:whole], sizes[:whole]
    return ShardIndex(
        path=path,
        size=size,
        mtime_ns=mtime_ns,
        truncated=truncated,
        keys=keys,
        first_members=np.array([*first_members, len(offsets)], dtype=np.int64),
        extensions=list(ids),
        extension_ids=np.array(extension_ids, dtype=np.int64),
        offsets=np.array(offsets, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
    )


def _cache_file(path: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "vlmoe", "index", hashlib.sha256(os.path.abspath(path).encode()).hexdigest() + ".json")


def _load(path: str, *, size: int, mtime_ns: int) -> ShardIndex | None:
    """The remembered index, or None when there is none, or one of another version of the file, or a broken one."""
    try:
        said = json.loads(_cache_file(path).read_bytes())
        if (said.pop("version"), said["size"], said["mtime_ns"]) != (CACHE_VERSION, size, mtime_ns):
            return None
        for name in ("first_members", "extension_ids", "offsets", "sizes"):
            said[name] = np.array(said[name], dtype=np.int64)
        index = ShardIndex(**{**said, "path": path})
        members = len(index.offsets)
        whole = len(index.sizes) == len(index.extension_ids) == members == index.first_members[-1]
        return index if whole and len(index.first_members) == len(index.keys) + 1 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _save(index: ShardIndex) -> None:
    said = {name: each.tolist() if isinstance(each, np.ndarray) else each for name, each in asdict(index).items()}
    target = _cache_file(index.path)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as file:
            json.dump({"version": CACHE_VERSION, **said}, file)
        os.replace(file.name, target)


def _read_at(index: ShardIndex, *, offset: int, size: int) -> bytes:
    try:
        content = os.pread(_descriptor(index), size, offset)
    except OSError:
        raise BrokenSample("unreadable shard") from None
    if len(content) < size:
        raise BrokenSample("unreadable shard")
    return content


def _descriptor(index: ShardIndex) -> int:
    """An open file of this process; the one used longest ago is closed. Safe across a fork: `pread` moves no offset."""
    which = (index.path, index.size, index.mtime_ns)
    if which in _open_files:
        _open_files.move_to_end(which)
    else:
        _open_files[which] = os.open(index.path, os.O_RDONLY | os.O_CLOEXEC)
        if len(_open_files) > MAX_OPEN_FILES:
            os.close(_open_files.popitem(last=False)[1])
    return _open_files[which]
