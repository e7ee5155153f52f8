"""Tables of tracks: what is read, cut and refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foveal.core.errors import DataError
from foveal.data.junctions import AHEAD, LEFT, junctions
from foveal.data.tracks import framed, in_memory, open_tracks, split_tracks, unframed

GOOD = "agent,time,x,y\nb,0.5,1,0\nb,0,0,0\na,0,5,5\na,0.5,5,6\na,1,5,8\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "tracks.csv"
    path.write_text(text)
    return path


def test_rows_in_any_order_become_tracks(tmp_path: Path):
    tracks = open_tracks(written(tmp_path, GOOD))
    assert tracks.agents == ("a", "b")
    assert tracks.agent.tolist() == [0, 0, 0, 1, 1]
    assert tracks.xy.tolist() == [[5, 5], [5, 6], [5, 8], [0, 0], [1, 0]]
    assert tracks.dt == 0.5
    assert tracks.starts(1, 1).tolist() == [1]
    past, future = tracks.cut(np.array([1]), 1, 1)
    assert np.allclose(past, [[[-1, 0], [0, 0]]])
    assert np.allclose(future, [[[2, 0]]])
    columns = {"agent": ["a", "a"], "time": [0.0, 1.0], "x": [0.0, 1.0], "y": [0.0, 0.0], "split": ["train", "train"]}
    pq.write_table(pa.table(columns), tmp_path / "tracks.parquet")
    assert open_tracks(tmp_path / "tracks.parquet").splits.tolist() == ["train"]  # type: ignore[union-attr]


def test_frames_lead_back():
    rng = np.random.default_rng(0)
    xy, origin, turn = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 2)), rng.normal(size=3)
    assert np.allclose(unframed(framed(xy, origin, turn), origin, turn), xy)
    tracks = in_memory(np.array([[[0.0, 0], [0, 1], [0, 1], [1, 1]]]))
    past, future = tracks.cut(np.array([2]), 2, 1)
    assert np.allclose(past[0], [[-1, 0], [0, 0], [0, 0]]), "the heading of the last step that moved"
    assert np.allclose(future[0], [[0, -1]])


def test_a_split_keeps_agents_whole():
    tracks = in_memory(np.random.default_rng(0).normal(size=(20, 9, 2)).cumsum(1))
    rows = tracks.starts(2, 3)
    splits = split_tracks(tracks, rows, seed=0)
    assert set(splits) == {"train", "val", "test"}
    for agent in range(20):
        assert len(set(splits[tracks.agent[rows] == agent])) == 1
    with pytest.raises(DataError, match="4 agents to forecast, expected 5 at least"):
        split_tracks(tracks, rows[tracks.agent[rows] < 4], seed=0)


def test_at_junctions_only_the_map_tells():
    xy, maps, kinds = junctions(200, 4, 8, seed=0)
    again = junctions(10, 4, 8, seed=0)
    assert np.array_equal(again[0], xy[:10])
    assert np.array_equal(again[1], maps[:10])
    assert 0.1 < (kinds != AHEAD).mean() < 0.3
    tracks = in_memory(xy, 0.5, maps, observed=4)
    past, future = tracks.cut(tracks.starts(4, 8), 4, 8)
    assert np.abs(past[..., 1]).max() < 1, "straight"
    assert future[kinds == LEFT, -1, 1].min() > 2
    assert np.abs(future[kinds == AHEAD, -1, 1]).max() < 2
    assert np.array_equal(tracks.map(int(tracks.starts(4, 8)[3])), maps[3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agent,time,x\na,0,1\n", "has no column y"),
        ("agent,time,x,y\n", "has no rows"),
        ("agent,time,x,y\na,0,1,\n", "row 1: y is '', expected a finite number"),
        ("agent,time,x,y\na,0,1,nan\n", "row 1: y is 'nan', expected a finite number"),
        ("agent,time,x,y\na,0,1,inf\n", "row 1: y is 'inf', expected a finite number"),
        ("agent,time,x,y\na,0,1,1e300\n", "row 1: y is '1e300', expected a finite number"),
        ("agent,time,x,y\na,noon,1,1\n", "time is 'noon', expected a number"),
        ("agent,time,x,y\n,0,1,1\n", "row 1 names no agent"),
        ("agent,time,x,y\na,0,1,1\nb,0,1,1\n", "no agent has two rows"),
        ("agent,time,x,y\na,0,1,1\na,1,1,1\na,2,1,1\na,4,1,1\n", "agent a has rows at times 2 and 4, where others"),
        ("agent,time,x,y\na,0,1,1\na,1,1,1\na,1,1,1\na,2,1,1\n", "agent a has rows at times 1 and 1"),
        ("agent,time,x,y,split\na,0,1,1,train\na,1,1,1,other\n", "has a split 'other'"),
        ("agent,time,x,y,split\na,0,1,1,train\na,1,1,1,test\n", "agent a is in two splits"),
        ("agent,time,x,y,map\na,0,1,1,none.png\na,1,1,1,\n", "row 1: its map none.png does not exist"),
        ("agent,time,x,y,map\na,0,1,1,\na,1,1,1,\n", "the column map is empty"),
    ],
)
def test_what_is_refused(text: str, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        open_tracks(written(tmp_path, text))


def test_tracks_that_are_too_short(tmp_path: Path):
    tracks = open_tracks(written(tmp_path, GOOD))
    with pytest.raises(DataError, match=r"no agent has 4 \+ 1 \+ 12 steps .* the longest has 3"):
        tracks.starts(4, 12)
    with pytest.raises(DataError, match=r"tracks come as a .csv or .parquet table"):
        open_tracks(tmp_path)
