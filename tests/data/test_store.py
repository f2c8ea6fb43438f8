"""Shard sets behind folders, URLs and commands: the same blocks from each, whatever the network and the disk do."""

import itertools
import logging
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from mspt.data import cache as caches
from mspt.data import store
from mspt.data.cache import Cache
from mspt.data.shardset import INDEX, MANIFEST, BadBlock, ShardSet
from mspt.data.store import StoreSettings
from mspt.errors import UserError
from tests.data.molecules import write_set
from tests.data.serving import CUT, RESET, SILENT, serving

LARGE = 1 << 30


@pytest.fixture(scope="module")
def expected(qm9):
    """The bytes of its blocks."""
    shardset = ShardSet.open(qm9)
    return [shardset.read(number) for number in range(8)]


@pytest.fixture
def server(qm9, monkeypatch):
    monkeypatch.setattr(store, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(store, "SILENCE", 0.2)
    with serving(qm9) as running:
        yield running


@pytest.fixture
def in_memory(qm9):
    """A URL of fsspec's filesystem in memory."""
    system = fsspec.filesystem("memory")
    system.put(str(qm9), "/store-test", recursive=True)
    yield "memory://store-test"
    system.rm("/store-test", recursive=True)


def cached(folder, **changes):
    return StoreSettings(cache=str(folder), **{"cache_bytes": LARGE, **changes})


def all_of(shardset):
    return [shardset.read(number) for number in range(len(shardset.block_records))]


def entries(folder):
    return [path for path in folder.iterdir() if path.name.endswith(caches.SUFFIX)]


@pytest.mark.parametrize("kind", ["file", "memory", "memory cached", "http", "http cached", "pipe"])
def test_the_same_from_everywhere(qm9, expected, server, in_memory, tmp_path, kind):
    url = {
        "file": f"file://{qm9}",
        "memory": in_memory,
        "http": server.url,
        "pipe": f"pipe:cat {qm9}/{{file}}",
    }[kind.split()[0]]
    keeps = kind.endswith("cached") or kind == "pipe"
    shardset = ShardSet.open(url, cached(tmp_path, allow_pipe=True) if keeps else StoreSettings())
    for _ in range(2):
        assert all_of(shardset) == expected
    assert [r.key for r in shardset.records([59, 0, 30])] == [r.key for r in ShardSet.open(qm9).records([59, 0, 30])]
    assert shardset.view(5).tobytes() == expected[5]
    assert len(shardset.block(5)["ptr"]) == 9
    shardset.verify()
    assert len(entries(tmp_path)) == (9 if keeps else 0)  # eight blocks and the index


def test_local_blocks_are_views_of_the_file(qm9, expected):
    """Processes of a machine share the pages, and nothing can write to them."""
    shardset = ShardSet.open(qm9)
    views = [shardset.view(5) for _ in range(2)]
    assert np.shares_memory(*views) and not views[0].flags.writeable
    del shardset
    assert views[0].tobytes() == expected[5]


def test_only_the_bytes_of_the_blocks_are_asked_for(server, expected, tmp_path):
    shardset = ShardSet.open(server.url, cached(tmp_path))
    server.requests.clear()
    for number in (6, 1, 6, 1):
        assert shardset.read(number) == expected[number]
    spans = [(int(shardset.offset[n]), int(shardset.offset[n] + shardset.size[n]) - 1) for n in (6, 1)]
    assert server.requests == [("shard-00002.tar", spans[0]), ("shard-00000.tar", spans[1])]


def test_few_descriptors_and_none_that_stay(qm9, expected, monkeypatch):
    monkeypatch.setattr(store, "FILES", 2)

    def count():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd"))

    shardset = ShardSet.open(qm9)
    for _ in range(2):
        assert all_of(shardset) == expected
        assert count() == 2
    del shardset
    assert count() == 0


@pytest.mark.parametrize("kind", ["folder", "http", "http cached"])
def test_threads_read_at_once(qm9, server, expected, tmp_path, monkeypatch, kind):
    """Also where files are closed under each other, because more are asked for than are held open."""
    monkeypatch.setattr(store, "FILES", 1)
    settings = cached(tmp_path, cache_bytes=sum(map(len, expected[:2]))) if "cached" in kind else None
    shardset = ShardSet.open(qm9 if kind == "folder" else server.url, settings)
    numbers = np.random.default_rng(0).integers(0, 8, 200)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shardset.read, numbers)) == [expected[number] for number in numbers]


@pytest.mark.parametrize("failures", [[503, 503], [429], [RESET], [CUT], [SILENT], [RESET, 500, CUT]], ids=str)
def test_what_passes_is_tried_again(server, expected, failures):
    shardset = ShardSet.open(server.url)
    server.fail("tar", failures)
    server.requests.clear()
    assert shardset.read(0) == expected[0]
    assert len(server.requests) == len(failures) + 1


def test_the_manifest_and_the_index_are_tried_again_too(server, expected, tmp_path):
    for settings in (StoreSettings(), cached(tmp_path)):
        server.fail("manifest|index", [503, None, RESET, None, CUT])
        assert all_of(ShardSet.open(server.url, settings)) == expected


def test_waits_are_said_and_double_and_differ(server, monkeypatch, caplog):
    shardset = ShardSet.open(server.url)
    waits = []
    monkeypatch.setattr(store.time, "sleep", waits.append)
    server.fail("tar", itertools.repeat(503))
    for _ in range(2):
        with pytest.raises(UserError):
            shardset.read(0)
    first, second = waits[:7], waits[7:]
    assert len(first) == len(second) == store.ATTEMPTS - 1
    assert all(0.5 <= wait / (0.001 * 2**i) <= 1.5 for wait_list in (first, second) for i, wait in enumerate(wait_list))
    assert first != second
    assert caplog.text.count(f"{server.url}/shard-00000.tar: ClientResponseError: 503") == len(waits)


def test_what_does_not_pass_is_said_in_one_line(server):
    shardset = ShardSet.open(server.url)
    server.fail("tar", itertools.repeat(503))
    with pytest.raises(UserError, match=r"shard-00000\.tar: cannot be read after 8 attempts \(.*503.*\); see") as error:
        shardset.read(0)
    assert str(error.value).startswith(server.url) and "\n" not in str(error.value)
    assert not isinstance(error.value, BadBlock)  # not to be skipped: the next try may find it whole


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"shard-00000\.tar: is missing; restore it"),
        (403, r"shard-00000\.tar: cannot be read \(.*403.*\); access is refused: check the credentials"),
        (400, r"shard-00000\.tar: cannot be read \(.*400.*\); check the URL"),
    ],
)
def test_what_would_only_come_again_is_not_tried_again(server, status, message):
    shardset = ShardSet.open(server.url)
    server.fail("tar", itertools.repeat(status))
    server.requests.clear()
    with pytest.raises(UserError, match=message):
        shardset.read(0)
    assert len(server.requests) == 1


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(store, "FIRST_WAIT", 0.001)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/set/manifest\.json: cannot be read after 8 attempts"):
        ShardSet.open("http://127.0.0.1:9/set")


def test_a_server_that_ignores_ranges_is_found_out_at_once(server):
    server.ranges = False
    with pytest.raises(UserError, match=r"ignores byte ranges .*; serve the set from one that answers them, or copy"):
        ShardSet.open(server.url)
    assert not [name for name, _ in server.requests if name.endswith(".tar")]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://set", r"nosuch://set: cannot be opened \(.*nosuch"),
        ("pipe:cat /set/{file}", r"allow_pipe=true"),
    ],
)
def test_urls_that_nothing_reads(url, message):
    with pytest.raises(UserError, match=message) as error:
        ShardSet.open(url)
    assert "\n" not in str(error.value)


def test_a_cut_shard_behind_http_is_a_bad_block(qm9, server, tmp_path):
    """Where no listing says how long a file is."""
    folder = shutil.copytree(qm9, tmp_path / "set")
    server.folder = folder
    shardset = ShardSet.open(server.url)
    shard, middle = folder / "shard-00000.tar", int(shardset.offset[1] + 50)
    shard.write_bytes(shard.read_bytes()[:middle])
    for number, reason in ((1, f"50 bytes of {shardset.size[1]}"), (2, f"0 bytes of {shardset.size[2]}")):
        with pytest.raises(BadBlock, match=rf"shard-00000\.tar: block {number} is damaged \({reason}\)"):
            shardset.read(number)


def test_missing_and_cut_shards_are_found_in_a_listing(in_memory):
    system = fsspec.filesystem("memory")
    data = system.cat_file("/store-test/shard-00001.tar")
    system.pipe_file("/store-test/shard-00001.tar", data[:-512])
    with pytest.raises(UserError, match=r"memory://store-test/shard-00001\.tar: \d+ bytes where the manifest says"):
        ShardSet.open(in_memory)
    system.rm_file("/store-test/shard-00001.tar")
    with pytest.raises(UserError, match=r"shard-00001\.tar: the manifest asks for it, but it is missing"):
        ShardSet.open(in_memory)


@pytest.mark.parametrize("settings", [False, True])
def test_missing_and_damaged_index_and_manifest(in_memory, tmp_path, settings):
    settings = cached(tmp_path) if settings else StoreSettings()
    system = fsspec.filesystem("memory")
    data = system.cat_file(f"/store-test/{INDEX}")
    system.pipe_file(f"/store-test/{INDEX}", data[:-1] + b"\x99")
    with pytest.raises(UserError, match=r"index\.safetensors: is damaged \(sha256\); copy it again"):
        ShardSet.open(in_memory, settings)
    system.rm_file(f"/store-test/{MANIFEST}")
    with pytest.raises(UserError, match=r"manifest\.json: not there, so memory://store-test is no shard set"):
        ShardSet.open(in_memory, settings)


# The cache.


def test_the_bound_is_kept_and_what_was_used_last_stays(server, expected, tmp_path):
    bound = sum(map(len, expected[:4]))
    shardset = ShardSet.open(server.url, cached(tmp_path, cache_bytes=bound))
    for number in (0, 1, 0, 2, 0, 3, 0, 4, 0, 5):
        assert shardset.read(number) == expected[number]
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= bound
    server.requests.clear()
    assert shardset.read(0) == expected[0] and shardset.read(5) == expected[5]
    assert server.requests == []
    assert shardset.read(1) == expected[1]
    assert len(server.requests) == 1


def test_other_files_of_the_folder_are_left_alone(server, tmp_path):
    own = tmp_path / "thesis.tex"
    own.write_bytes(b"x" * 500_000)
    os.utime(own, (0, 0))
    all_of(ShardSet.open(server.url, cached(tmp_path, cache_bytes=100_000)))
    assert own.exists() and 0 < len(entries(tmp_path)) < 8


def test_a_second_run_and_other_sets_share_it(server, expected, tmp_path):
    assert all_of(ShardSet.open(server.url, cached(tmp_path))) == expected
    server.requests.clear()
    assert all_of(ShardSet.open(server.url, cached(tmp_path))) == expected
    assert {name for name, _ in server.requests} == {MANIFEST}


@pytest.mark.parametrize("pipe", [False, True])
def test_damaged_entries_are_thrown_away(qm9, server, expected, tmp_path, pipe):
    url = f"pipe:cat {qm9}/{{file}}" if pipe else server.url
    settings = cached(tmp_path, allow_pipe=True)
    assert all_of(ShardSet.open(url, settings)) == expected
    for damage in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-9], lambda data: b""):
        for path in entries(tmp_path):
            path.write_bytes(damage(path.read_bytes()))
        assert all_of(ShardSet.open(url, settings)) == expected
    server.requests.clear()
    assert all_of(ShardSet.open(url, settings)) == expected  # whole again
    assert not [name for name, _ in server.requests if name != MANIFEST]


def test_a_bad_block_is_never_kept(server, qm9, tmp_path):
    server.folder = shutil.copytree(qm9, tmp_path / "set")
    shardset = ShardSet.open(server.url, cached(tmp_path / "cache"))
    path = server.folder / "shard-00000.tar"
    content = bytearray(path.read_bytes())
    content[int(shardset.offset[0]) + 99] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(BadBlock):
            shardset.read(0)
    shutil.copy(qm9 / path.name, path)
    shardset.read(0)


def test_a_full_disk_turns_the_cache_off_with_one_warning(server, expected, tmp_path, monkeypatch, caplog):
    shardset = ShardSet.open(server.url, cached(tmp_path))

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        assert all_of(shardset) == expected
    (said,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert str(tmp_path) in said.getMessage() and "No space left on device" in said.getMessage()
    assert len(entries(tmp_path)) == 1 and not list(tmp_path.glob(f".*{caches.PARTIAL}"))


def test_a_disk_that_is_full_for_the_index(server, expected, tmp_path, monkeypatch):
    def full(self, file, to):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Remote, "save", full)
    assert all_of(ShardSet.open(server.url, cached(tmp_path))) == expected


def test_a_folder_that_cannot_be_a_cache(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be used as a cache \(.*\); set data\.store\.cache to"):
        ShardSet.open(server.url, cached(tmp_path / "file"))


def test_parts_of_killed_processes_go(tmp_path):
    old, new = (tmp_path / f".{name}{caches.PARTIAL}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    Cache(tmp_path, 100).add("entry", lambda path: path.write_bytes(b"whole"))
    assert not old.exists() and new.exists() and Cache(tmp_path, 100).read("entry") == b"whole"


def _read_all(shardset, expected, seed):
    """In a process of its own; a difference or an error is its exit status."""
    rng = np.random.default_rng(seed)
    for _ in range(12):
        for number in rng.permutation(len(expected)):
            assert shardset.read(number) == expected[number]


def test_many_processes_on_one_small_cache(server, expected, tmp_path):
    """Entries come and go all the time under their readers; nobody fails and the bound holds."""
    bound = sum(map(len, expected[:3]))
    shardset = ShardSet.open(server.url, cached(tmp_path, cache_bytes=bound))
    shardset.read(0)  # the parent's filesystem is in use when it forks
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_read_all, args=(shardset, expected, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 0 < sum(path.stat().st_size for path in entries(tmp_path)) <= bound
    assert not list(tmp_path.glob(f".*{caches.PARTIAL}"))


class Blocks(Dataset):
    def __init__(self, *shardsets):
        self.shardsets = shardsets

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return [shardset.read(number) for shardset in self.shardsets]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(qm9, server, expected, tmp_path, method):
    shardsets = [
        ShardSet.open(qm9),
        ShardSet.open(server.url),
        ShardSet.open(server.url, cached(tmp_path)),
        ShardSet.open(f"pipe:cat {qm9}/{{file}}", cached(tmp_path / "pipe", allow_pipe=True)),
    ]
    for shardset in shardsets:
        shardset.read(3)
    workers = {"fork": 2, "spawn": 1}[method]
    loader = DataLoader(Blocks(*shardsets), batch_size=None, num_workers=workers, multiprocessing_context=method)
    assert list(loader) == [[block] * 4 for block in expected]


def test_a_set_that_was_built_anew_is_not_mixed_with_the_old(qm9, tmp_path):
    folder = shutil.copytree(qm9, tmp_path / "set")
    make, state = ShardSet.open(folder).__reduce__()
    write_set(folder, ShardSet.open(qm9).records(range(59)), block=8, blocks_per_shard=3)
    with pytest.raises(UserError, match=r"manifest\.json: has changed since the set was opened; start again"):
        make(*state)


# Pipes.


def test_a_command_runs_once_a_shard(qm9, expected, tmp_path):
    log = tmp_path / "log"
    url = f"pipe:echo {{file}} >> {log}; cat {qm9}/{{file}}"
    shardset = ShardSet.open(url, cached(tmp_path / "cache", allow_pipe=True))
    for number in (4, 0, 7, 3, 5, 1, 2, 6):
        assert shardset.read(number) == expected[number]
    ran = log.read_text().split()
    assert sorted(ran) == [INDEX, MANIFEST, "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("cat {file}", {"cache": None}, r"set data\.store\.cache to a folder"),
        ("cat file", {}, r"put \{file\} where"),
        ("exit 3 {file}", {}, r"pipe:exit 3 manifest\.json: exit status 3; run this command by hand"),
    ],
)
def test_pipes_that_do_not_work(tmp_path, command, changes, message):
    settings = StoreSettings(**({"cache": str(tmp_path), "allow_pipe": True} | changes))
    with pytest.raises(UserError, match=message):
        ShardSet.open(f"pipe:{command}", settings)


def test_a_command_that_fails_or_stops_half_way(qm9, tmp_path):
    """The exit status counts even where all bytes came; fewer bytes are a bad block."""
    mode = tmp_path / "mode"
    mode.write_text("cat")
    url = f"pipe:$(cat {mode}) {qm9}/{{file}}"
    shardset = ShardSet.open(url, cached(tmp_path / "cache", allow_pipe=True))
    mode.write_text("head -c 3000")
    with pytest.raises(BadBlock, match=r"shard-00000\.tar: block 2 is damaged"):
        shardset.read(2)
    mode.write_text(f"eval cat {qm9}/shard-00001.tar; false")
    with pytest.raises(UserError, match="exit status 1"):
        shardset.read(3)


def test_a_command_that_the_cache_has_no_room_for(qm9, expected, tmp_path):
    shardset = ShardSet.open(f"pipe:cat {qm9}/{{file}}", cached(tmp_path, allow_pipe=True, cache_bytes=10))
    assert all_of(shardset) == expected
