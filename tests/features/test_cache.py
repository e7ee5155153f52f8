import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from foveal.core.errors import FovealError
from foveal.features import cache
from foveal.features.cache import KEY, RowStore, cache_root


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()[:KEY]


def row(name: object, width: int = 5) -> np.ndarray:
    """A row that says which key it belongs to."""
    return np.frombuffer(hashlib.sha512(str(name).encode()).digest(), np.uint8)[:width].astype(np.float32)


def filled(folder: Path, names: list, width: int = 5) -> RowStore:
    store = RowStore(folder, np.float32, (width,))
    store.append([key(name) for name in names], np.stack([row(name, width) for name in names]))
    return store


def holds(store: RowStore, names: list) -> bool:
    found, where = store.get([key(name) for name in names])
    return bool(found.all()) and bool((store.read(where) == np.stack([row(name) for name in names])).all())


def test_rows_come_back_in_any_order_and_absent_ones_are_named(tmp_path: Path):
    filled(tmp_path, list(range(10)))
    store = RowStore(tmp_path, np.float32, (5,))
    found, where = store.get([key(9), key("absent"), key(0), key(9)])
    assert found.tolist() == [True, False, True, True]
    assert where[1] == -1
    assert (store.read(where[found]) == np.stack([row(9), row(0), row(9)])).all()
    assert len(store) == 10
    with pytest.raises(IndexError, match="rows are 0 to 9"):
        store.read(where)


def test_structured_rows_and_several_shards(tmp_path: Path):
    dtype = np.dtype([("ok", "u1"), ("width", "u4"), ("mean", "f4")])
    rows = np.zeros(40, dtype)
    rows["width"] = np.arange(40)
    store = RowStore(tmp_path, dtype)
    for at in range(0, 40, 8):
        store.append([key(i) for i in range(at, at + 8)], rows[at : at + 8])
    order = np.random.default_rng(0).permutation(40)
    again = RowStore(tmp_path, dtype)
    assert again.read(again.get([key(i) for i in order])[1])["width"].tolist() == order.tolist()
    assert store.read(store.get([key(i) for i in order])[1])["width"].tolist() == order.tolist()


def test_keys_may_be_an_array_and_nothing_is_not_an_error(tmp_path: Path):
    store = filled(tmp_path, [1, 2])
    keys = np.frombuffer(key(2) + key(3), np.uint8).reshape(2, KEY)
    assert store.get(keys)[0].tolist() == [True, False]
    found, where = store.get([])
    assert len(found) == len(where) == 0
    assert store.read(where).shape == (0, 5)
    store.append([], np.empty((0, 5), np.float32))
    assert len(list(tmp_path.glob("*.rows"))) == 1


def test_wrong_shapes_are_refused(tmp_path: Path):
    store = RowStore(tmp_path, np.float32, (5,))
    with pytest.raises(ValueError, match=r"rows have shape \(1, 4\), expected \(1, 5\)"):
        store.append([key(1)], np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="keys are 16 bytes"):
        store.get([b"short"])


def test_keys_that_share_half_their_bytes_are_told_apart(tmp_path: Path):
    store = RowStore(tmp_path, np.float32, (1,))
    first, second = b"12345678" + b"a" * 8, b"12345678" + b"b" * 8
    store.append([first], np.array([[1.0]]))
    assert store.get([second])[0].tolist() == [False]


def test_another_process_is_seen_after_refresh(tmp_path: Path):
    early = RowStore(tmp_path, np.float32, (5,))
    filled(tmp_path, [1])
    assert not early.get([key(1)])[0].any()
    early.refresh()
    assert holds(early, [1])
    early.refresh()
    assert len(early) == 1


@pytest.mark.parametrize("kept", [0, 10, 39, 50, -1])
def test_truncated_shard_is_removed_and_written_again(tmp_path: Path, kept: int):
    filled(tmp_path, [1, 2])
    filled(tmp_path, [3])
    damaged = max(tmp_path.glob("*.rows"), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:kept])
    store = RowStore(tmp_path, np.float32, (5,))
    assert store.get([key(1), key(2), key(3)])[0].tolist() == [False, False, True]
    assert not damaged.exists()
    store.append([key(1)], row(1)[None])
    assert holds(RowStore(tmp_path, np.float32, (5,)), [1, 3])


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    filled(tmp_path, [1, 2])
    (file,) = tmp_path.glob("*.rows")
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        if 28 <= place < 32:
            continue  # padding of the header
        file.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        store = RowStore(tmp_path, np.float32, (5,))
        assert not store.get([key(1), key(2)])[0].any(), place


def test_shards_of_another_version_or_row_size_are_left_alone(tmp_path: Path):
    filled(tmp_path, [1])
    (file,) = tmp_path.glob("*.rows")
    newer = tmp_path / "newer.rows"
    newer.write_bytes(b"foveal\x00\x02" + file.read_bytes()[8:])
    store = RowStore(tmp_path, np.float32, (5,))
    assert len(store) == 1
    assert newer.exists()
    wide = RowStore(tmp_path, np.float32, (6,))
    assert len(wide) == 0
    assert file.exists()


def test_merging_keeps_every_row_for_old_and_new_readers(tmp_path: Path):
    names = list(range(3 * cache.MERGE_ABOVE))
    for name in names:
        filled(tmp_path, [name])
    filled(tmp_path, [0, 1])  # repeated keys
    reader, store = (RowStore(tmp_path, np.float32, (5,)) for _ in range(2))
    where = reader.get([key(name) for name in names])[1]
    store.compact()
    assert len(list(tmp_path.glob("*.rows"))) == 1
    assert (reader.read(where) == np.stack([row(name) for name in names])).all()
    reader.refresh()
    assert holds(reader, names)
    assert holds(store, names)
    fresh = RowStore(tmp_path, np.float32, (5,))
    assert holds(fresh, names)
    assert len(fresh) == len(names)


def test_few_shards_are_not_merged(tmp_path: Path):
    store = filled(tmp_path, [1])
    filled(tmp_path, [2])
    store.refresh()
    store.compact()
    assert len(list(tmp_path.glob("*.rows"))) == 2


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_cache import filled
from foveal.features.cache import RowStore
import numpy as np
who, folder = sys.argv[2], Path(sys.argv[1])
print("ready", flush=True)
for turn in range(int(sys.argv[4])):
    filled(folder, [f"{who}-{turn}-{i}" for i in range(20)] + [f"shared-{turn}"])
    if turn % 10 == 9:
        RowStore(folder, np.float32, (5,)).compact()
"""


def writer(folder: Path, who: str, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), who, str(Path(__file__).parent), str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_write_and_merge_at_once(tmp_path: Path):
    processes = [writer(tmp_path, str(who), 20) for who in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    store = RowStore(tmp_path, np.float32, (5,))
    names = [f"{who}-{turn}-{i}" for who in range(4) for turn in range(20) for i in range(20)]
    assert holds(store, [*names, *(f"shared-{turn}" for turn in range(20))])
    assert not list(tmp_path.glob("*.tmp"))


def test_killed_writers_leave_only_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    for who in range(4):
        process = writer(tmp_path, str(who), 100_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.2 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / ".x.rows.abc.tmp").write_bytes(b"half a shard")
    store = RowStore(tmp_path, np.float32, (5,))
    assert len(store) > 100
    for who in range(4):
        turn = 0
        while store.get([key(f"{who}-{turn}-0")])[0].all():
            assert holds(store, [f"{who}-{turn}-{i}" for i in range(20)])
            turn += 1
        assert turn > 0
    assert list(tmp_path.glob("*.tmp"))  # another process may still be writing it
    monkeypatch.setattr(cache, "STALE", 0.0)
    RowStore(tmp_path, np.float32, (5,))
    assert not list(tmp_path.glob("*.tmp"))


def test_no_space_is_one_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    store = filled(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FovealError, match=r"no space left on the device.*free some space"):
            store.append([key(2)], row(2)[None])
    assert len(list(tmp_path.iterdir())) == 1
    assert holds(store, [1])
    store.append([key(2)], row(2)[None])
    assert holds(store, [1, 2])


def test_cache_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.delenv("FOVEAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_root() == tmp_path / "foveal"
