from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.core.errors import DataError, UsageError
from foveal.data.clips import (
    FrameFolder,
    MemoryClip,
    VideoFile,
    counted,
    dense,
    fold,
    found_clips,
    open_clips,
    segments,
    unfold,
    unlabelled_clips,
)
from foveal.data.worlds import arrow_of_motion

GREYS = (10, 60, 110, 160, 210, 250)


def frames(count: int = 6) -> list[np.ndarray]:
    return [np.full((32, 48, 3), GREYS[number % 6], np.uint8) for number in range(count)]


def write_video(path: Path, pictures: list[np.ndarray]) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, pictures: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"frame_{number}.png")
    return folder


def grey(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


def test_the_fold_keeps_the_frames_of_a_clip_side_by_side():
    clips = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert torch.equal(fold(clips)[3:6], clips[1])
    assert torch.equal(unfold(fold(clips), 3), clips)
    with pytest.raises(UsageError, match="batch of 6 frames is no whole number of clips of 4"):
        unfold(fold(clips), 4)
    with pytest.raises(UsageError, match=r"expected \[B, T"):
        fold(torch.zeros(3))


@pytest.mark.parametrize(("count", "wanted"), [(30, 8), (8, 8), (3, 8), (1, 4)])
def test_segments_take_one_frame_of_each_part(count: int, wanted: int):
    edges = np.arange(wanted + 1) * count / wanted
    for at in (0.0, 0.5, 0.999, np.random.default_rng(0)):
        found = segments(count, wanted, at)
        assert len(found) == wanted
        assert (np.diff(found) >= 0).all()
        assert all(int(low) <= number <= high for low, number, high in zip(edges, found, edges[1:], strict=False))
        assert found.max() < count
    random = {tuple(segments(30, 8, np.random.default_rng(seed))) for seed in range(5)}
    assert len(random) == 5


def test_a_dense_run_has_its_stride_and_stays_inside():
    assert dense(20, 4, 3, 0.0).tolist() == [0, 3, 6, 9]
    assert dense(20, 4, 3, 1.0).tolist() == [10, 13, 16, 19]
    assert dense(5, 4, 3).tolist() == [0, 3, 4, 4]


def test_a_video_gives_the_frames_of_its_numbers(tmp_path: Path):
    clip = VideoFile(str(write_video(tmp_path / "a.mp4", frames())))
    assert clip.count() == 6
    found = clip.read([4, 0, 4])
    assert [image.size for image in found] == [(48, 32)] * 3
    assert [grey(image) for image in found] == pytest.approx([210, 10, 210], abs=6)
    with pytest.raises(DataError, match="ends before frame 9"):
        clip.read([9])


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path):
    folder = write_frames(tmp_path / "clip", frames(12))
    ((name, clip),) = found_clips(str(folder))
    assert name == "."
    assert isinstance(clip, FrameFolder)
    assert clip.files[:3] == ("frame_0.png", "frame_1.png", "frame_2.png")
    assert [grey(image) for image in clip.read([11, 1])] == [250, 60]


def test_folders_of_classes(tmp_path: Path):
    write_video(tmp_path / "up" / "a.mp4", frames())
    write_frames(tmp_path / "up" / "b", frames(3))
    write_frames(tmp_path / "down" / "c", frames(3)[::-1])
    write_video(tmp_path / "stray.mp4", frames())
    (tmp_path / "down" / "bad.mp4").write_bytes(b"no video" * 50)
    broken = write_frames(tmp_path / "down" / "d", frames(3))
    (broken / "frame_1.png").write_bytes(b"no image")
    clips = open_clips(tmp_path)
    assert clips.ids == ["down/c", "up/a.mp4", "up/b"]
    assert clips.classes == ("down", "up")
    assert clips.labels.tolist() == [0, 1, 1]
    assert clips.counts.tolist() == [3, 6, 3]
    assert clips.splits is None
    assert len(set(clips.groups.tolist())) == 2  # down/c is up/b played backwards
    aside = dict(clips.set_aside)
    assert set(aside) == {"down/bad.mp4", "down/d", "stray.mp4"}
    assert "not a video" in aside["down/bad.mp4"]
    assert aside["down/d"].startswith("frame frame_1.png: not an image")
    assert clips.subset([2]).ids == ["up/b"]


def test_splits_above_the_classes(tmp_path: Path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_frames(tmp_path / split / name / "x", frames(2))
    clips = open_clips(tmp_path)
    assert clips.classes == ("a", "b")
    assert clips.splits is not None
    assert clips.splits.tolist() == ["test", "test", "train", "train"]


def test_bad_folders_are_refused_in_words(tmp_path: Path):
    with pytest.raises(DataError, match="is no folder"):
        open_clips(tmp_path / "none")
    with pytest.raises(DataError, match="no video file and no folder of frames"):
        open_clips(tmp_path)
    write_frames(tmp_path / "cat", frames(2))
    with pytest.raises(DataError, match=r"1 folders of images right below it: expected CLASS/clip\.mp4"):
        open_clips(tmp_path)
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "x.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 clips .* can be decoded"):
        open_clips(tmp_path)
    with pytest.raises(DataError, match="no clip"):
        unlabelled_clips([tmp_path / "none.mp4"])


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{0}'\n"])
def test_a_playlist_is_no_video(tmp_path: Path, text: str):
    secret = write_video(tmp_path / "secret.mp4", frames())
    (tmp_path / "list.mp4").write_text(text.format(secret))
    with pytest.raises(DataError, match="not a video"):
        VideoFile(str(tmp_path / "list.mp4")).count()


def test_digests_know_frames_but_not_their_order():
    clip = np.stack(frames())
    assert counted(MemoryClip(clip)) == counted(MemoryClip(clip[::-1]))
    assert counted(MemoryClip(clip))[1] != counted(MemoryClip(clip[:-1]))[1]


def test_the_arrow_of_motion_is_in_the_order_alone():
    photos = [np.random.default_rng(k).integers(0, 256, (96, 120, 3), dtype=np.uint8) for k in range(3)]
    clips, labels = arrow_of_motion(photos, 24, 32, 6, 5, (0.5, 1.0))
    again, _ = arrow_of_motion(photos, 24, 32, 6, 5, (0.5, 1.0))
    assert np.array_equal(clips, again)
    for index in range(0, 24, 2):
        assert np.array_equal(clips[index], clips[index + 1][::-1])
        assert labels[index].tolist() == [0, index // 2 % 3]
        assert labels[index + 1].tolist() == [1, index // 2 % 3]
        moved = (clips[index] != clips[index, :1]).any((1, 2, 3))
        assert moved[-1]
    photos[0][:48] = 0  # what is outside of the band is not shown
    assert np.array_equal(arrow_of_motion(photos, 24, 32, 6, 5, (0.5, 1.0))[0], clips)
