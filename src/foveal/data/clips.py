"""Clips: video files, or folders of frames. Which frames are looked at is one thing, how they are decoded another.

A batch of clips is one tensor [B, T, C, H, W]; what works on images sees it as [B * T, C, H, W] (`fold`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from foveal.core.errors import DataError, MissingExtra, UsageError
from foveal.data.dataset import encode_labels, printable, read_file, unique
from foveal.data.folder import SPLIT_NAMES, is_image
from foveal.data.images import MAX_PIXELS, decode

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

VIDEOS = frozenset(
    f".{name}" for names in ("mp4 m4v mov mkv webm avi mpg mpeg", "ts mts 3gp ogv wmv flv") for name in names.split()
)
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,asf,flv"
"""What ffmpeg may take a file for: no playlist (HLS, concat), which would name other files and addresses."""
MAX_FRAMES = 1_000_000


def fold(clips: Tensor) -> Tensor:
    """Clips [B, T, ...] -> their frames as one batch [B * T, ...], a clip's frames side by side.

    Raises:
        UsageError: fewer than two dimensions.
    """
    if clips.ndim < 2:
        raise UsageError(f"clips of shape {tuple(clips.shape)}: expected [B, T, ...]")
    return clips.flatten(0, 1)


def unfold(frames: Tensor, length: int) -> Tensor:
    """A batch of frames [B * T, ...] -> clips [B, T, ...] of `length` T frames; undoes `fold`.

    Raises:
        UsageError: the batch is not a multiple of T.
    """
    if length < 1 or frames.shape[0] % length:
        raise UsageError(
            f"a batch of {frames.shape[0]} frames is no whole number of clips of {length}: give T frames of each clip"
        )
    return frames.unflatten(0, (-1, length))


Moment = float | np.random.Generator
"""Where in its share of a clip a frame is taken: 0 to 1, or drawn at random."""


def segments(count: int, frames: int, at: Moment = 0.5) -> np.ndarray:
    """Frame numbers [frames], in order: one from each of `frames` equal parts of a clip of `count` frames.

    With a generator each part has a moment of its own (temporal segment networks, Wang et al. 2016). A clip shorter
    than `frames` repeats frames.
    """
    moment = at.random(frames) if isinstance(at, np.random.Generator) else at
    return np.minimum(((np.arange(frames) + moment) * count / frames).astype(np.int64), count - 1)


def dense(count: int, frames: int, stride: int, at: Moment = 0.5) -> np.ndarray:
    """Frame numbers [frames]: every `stride`-th frame of one run, whose place in the clip is `at`.

    Where the run is longer than the clip, the last frame stands for those that are missing.
    """
    room = max(0, count - 1 - (frames - 1) * stride)
    moment = float(at.random()) if isinstance(at, np.random.Generator) else at
    return np.minimum(round(moment * room) + stride * np.arange(frames), count - 1)


class Clip(Protocol):
    """One clip, as it lies on disk. Safe to read from several threads. All raise DataError for what is damaged."""

    def count(self) -> int:
        """How many frames it has."""
        ...

    def frames(self) -> Iterator[Image.Image]:
        """All frames in order, upright RGB."""
        ...

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        """The frames of these numbers, in their order; a number may come more than once."""
        ...


@dataclass(frozen=True)
class FrameFolder:
    """A folder of images, one a frame, in the order of the numbers in their names."""

    path: str
    files: tuple[str, ...]

    def count(self) -> int:
        return len(self.files)

    def frames(self) -> Iterator[Image.Image]:
        return (self.frame(number) for number in range(len(self.files)))

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        decoded = {number: self.frame(number) for number in set(map(int, numbers))}
        return [decoded[int(number)] for number in numbers]

    def frame(self, number: int) -> Image.Image:
        name = self.files[number]
        try:
            return decode(read_file(os.path.join(self.path, name)))
        except DataError as error:
            raise DataError(f"frame {printable(name)}: {error}") from None


@dataclass(frozen=True)
class VideoFile:
    """A video file, decoded by PyAV from its start to the last frame asked for."""

    path: str

    def count(self) -> int:
        return sum(1 for _ in self.frames())

    def frames(self) -> Iterator[Image.Image]:
        """
        Raises:
            DataError: missing, no video, damaged, or of more pixels than images may have.
            MissingExtra: PyAV is not installed.
        """
        try:
            import av
            from av.error import FFmpegError
        except ImportError:
            raise MissingExtra("av", "video", "reading video files") from None
        try:
            with (
                open(self.path, "rb", opener=without_waiting) as file,
                av.open(file, options={"format_whitelist": CONTAINERS}) as container,
            ):
                if not container.streams.video:
                    raise DataError("no video in the file")
                reader: Any = container
                stream: Any = container.streams.video[0]
                if stream.width * stream.height > MAX_PIXELS:
                    raise DataError(f"{stream.width} x {stream.height} pixels: frames of up to 100 megapixels are read")
                for number, frame in enumerate(reader.decode(stream)):
                    if number >= MAX_FRAMES:
                        raise DataError(f"more than {MAX_FRAMES:,} frames: cut it into clips")
                    image = frame.to_image()
                    yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
        except FFmpegError as error:
            raise DataError(f"not a video, or truncated or damaged ({error.strerror or error})") from None
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from None

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        wanted, last = set(map(int, numbers)), max(map(int, numbers))
        kept: dict[int, Image.Image] = {}
        for number, image in enumerate(self.frames()):
            if number in wanted:
                kept[number] = image
            if number == last:
                return [kept[int(each)] for each in numbers]
        raise DataError(f"the video ends before frame {last}: it has changed since it was opened")


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open` that does not wait for the writer of a named pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


@dataclass(frozen=True, eq=False)
class MemoryClip:
    """A clip held as pixels uint8 [F, H, W, 3]; for small samples only."""

    pixels: np.ndarray

    def count(self) -> int:
        return len(self.pixels)

    def frames(self) -> Iterator[Image.Image]:
        return iter(self.read(range(len(self.pixels))))

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        from PIL import Image

        return [Image.fromarray(self.pixels[number]) for number in numbers]


@dataclass(frozen=True, eq=False)
class Clips:
    """Labelled clips, every frame of which was decoded once when they were opened.

    Attributes:
        counts: frames of each clip, int64 [n].
        digests: 32 hex digits per clip, equal for the same frames in whatever order.
        labels: int64 [n] indices into `classes`; -1 for clips without a label.
        splits: 'train', 'val' or 'test' per clip where the folders say so, else None.
        set_aside: (id, reason) of clips that cannot be used.
    """

    name: str
    ids: Sequence[str]
    clips: Sequence[Clip]
    counts: np.ndarray
    digests: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    splits: np.ndarray | None = None
    set_aside: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Clips:
        """The clips at `indices`, in that order."""
        rows = np.asarray(indices, np.int64)
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            clips=[self.clips[row] for row in rows],
            counts=self.counts[rows],
            digests=[self.digests[row] for row in rows],
            labels=self.labels[rows],
            splits=None if self.splits is None else self.splits[rows],
        )

    @property
    def groups(self) -> np.ndarray:
        """A number for each clip [n], equal for copies and for a clip played backwards."""
        return np.unique(np.array(self.digests), return_inverse=True)[1].astype(np.int64)


def found_clips(root: str) -> list[tuple[str, Clip]]:
    """Every clip below a folder, by its path within it, sorted: each video file, and each folder that holds images.

    Hidden files and folders are skipped; links to folders are not followed.
    """
    found: list[tuple[str, Clip]] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
        files = [name for name in files if not name.startswith(".")]
        here = os.path.relpath(folder, root)
        images = sorted(filter(is_image, files), key=natural)
        if images:
            found.append((here, FrameFolder(folder, tuple(images))))
        for name in files:
            if os.path.splitext(name)[1].lower() in VIDEOS:
                found.append((os.path.normpath(os.path.join(here, name)), VideoFile(os.path.join(folder, name))))
    return sorted(found, key=lambda each: natural(each[0]))


def natural(name: str) -> list[Any]:
    """Sort key by which frame_2 comes before frame_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def open_clips(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> Clips:
    """A folder of class folders of clips, or of train/ val/ test/ folders that hold such class folders.

    Every clip is decoded once: what cannot be is set aside with its reason.

    Raises:
        DataError: no clips, none in a class folder, or none that can be decoded.
    """
    name = printable(str(folder))
    if not Path(folder).is_dir():
        raise DataError(f"{name} is no folder: expected one folder of clips (video files, folders of frames) per class")
    found = found_clips(os.fspath(folder))
    parts = [path.split(os.sep) for path, _ in found]
    split = {part[0]: SPLIT_NAMES.get(part[0].lower(), "") for part in parts}
    depth = 1 if len(split) > 1 and "train" in split.values() and all(split.values()) else 0
    labelled = [row for row, part in enumerate(parts) if len(part) > depth + 1]
    if not labelled:
        frames = sum(isinstance(clip, FrameFolder) for _, clip in found)
        seen = f"{frames} folders of images right below it" if frames else "no video file and no folder of frames"
        raise DataError(f"{name} holds {seen}: expected CLASS/clip.mp4 or CLASS/clip/frame.png, a clip in each")
    stray = [
        (printable(path), "not in a class folder") for path, _ in (found[row] for row in except_for(labelled, found))
    ]
    labels, classes = encode_labels([[printable(parts[row][depth])] for row in labelled], "single-label")
    return surveyed(
        Clips(
            name=printable(Path(folder).resolve().name),
            ids=unique([printable(found[row][0].replace(os.sep, "/")) for row in labelled]),
            clips=[found[row][1] for row in labelled],
            counts=np.zeros(len(labelled), np.int64),
            digests=[""] * len(labelled),
            labels=labels,
            classes=classes,
            splits=np.array([split[parts[row][0]] for row in labelled]) if depth else None,
            set_aside=tuple(stray),
        ),
        progress,
    )


def except_for(rows: Sequence[int], everything: Sequence[Any]) -> list[int]:
    return sorted(set(range(len(everything))) - set(rows))


def unlabelled_clips(paths: Sequence[str | Path]) -> list[tuple[str, Clip]]:
    """(name, clip) of video files, folders of frames, and folders that hold such.

    Raises:
        DataError: a path that is missing, or a folder without a clip.
    """
    clips: list[tuple[str, Clip]] = []
    for path in [os.fspath(each) for each in paths]:
        if os.path.isdir(path):
            inside = found_clips(path)
            if not inside:
                raise DataError(f"{printable(path)} holds no clip: expected a folder of frames, or of video files")
            clips += [(printable(os.path.normpath(os.path.join(path, name))), clip) for name, clip in inside]
        elif os.path.exists(path):
            clips.append((printable(path), VideoFile(path)))
        else:
            raise DataError(f"no clip {printable(path)}: expected a video file or a folder of frames")
    return clips


def surveyed(clips: Clips, progress: Callable[[int, int], None] | None = None) -> Clips:
    """The same with frame counts and digests, without the clips that cannot be decoded.

    Raises:
        DataError: none can be.
    """
    counts, digests = np.zeros(len(clips), np.int64), list(clips.digests)
    reasons: dict[int, str] = {}

    def survey(row: int) -> tuple[int, str] | str:
        try:
            return counted(clips.clips[row])
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for row, answer in enumerate(pool.map(survey, range(len(clips)))):
            if isinstance(answer, str):
                reasons[row] = answer
            else:
                counts[row], digests[row] = answer
            if progress:
                progress(row + 1, len(clips))
    if len(reasons) == len(clips):
        raise DataError(f"none of the {len(clips)} clips of {clips.name} can be decoded ({clips.ids[0]}: {reasons[0]})")
    aside = tuple((clips.ids[row], reason) for row, reason in reasons.items())
    whole = replace(clips, counts=counts, digests=digests, set_aside=clips.set_aside + aside)
    return whole.subset([row for row in range(len(clips)) if row not in reasons])


def counted(clip: Clip) -> tuple[int, str]:
    """How many frames a clip has, and a digest of all of them that does not tell their order.

    Raises:
        DataError: a frame cannot be decoded, or there is none.
    """
    hashes = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in clip.frames()]
    if not hashes:
        raise DataError("no frames in it")
    return len(hashes), hashlib.blake2b(b"".join(sorted(hashes)), digest_size=16).hexdigest()
