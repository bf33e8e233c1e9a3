"""Media of a raw download to what a shard holds of them: FLAC, JPEG and PNG, never decoded arrays.

What comes out is a function of the file and of what `data/raw.py` asks for. Whatever is wrong with a file becomes a
`MediaError` with a word of `data/raw.py` and a detail; what went wrong around it (no access, no network) does not.
Decoders are programs for hostile input with bugs of their own: `read_row` is meant to run in a process that may
crash, hang or be killed (`data/ingest.py` sees to that).
"""

from __future__ import annotations

import io
import math
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, ResourceError
from counterpoise.data import raw
from counterpoise.data.decode import LFS_POINTER, MAX_PIXELS, RATES, DecodeError, check_wav, resampled
from counterpoise.data.raw import Flow, Media, Pictures, Sound, Video

JPEG_QUALITY = 95  # what OpenCV writes by default, and so what the frames of the published pipelines are
# TV-L1, the other usual one, is not part of OpenCV's main modules.
FLOW_METHOD = "DIS, preset medium (OpenCV), from each chosen frame to the next frame of the video"
_FIELD_OF_VIEW = 512  # bytes that are looked at to tell a pointer or a page from media
_HTML = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html|head|body|script)", re.I | re.S)
# The containers that are opened. Others (playlists, image sequences, ...) can make FFmpeg read further files.
_CONTAINERS = "flv,live_flv,mov,mp4,avi,mpeg,mpegts,mpegvideo,matroska,webm,mp3,aac,ogg,wav,flac,asf"
_PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
_FRAME_S = 0.04  # how long a frame without a time of its own is taken to last
_EARLY_S, _EARLY_PART = 1.0, 0.2  # a stream that ends earlier than announced by more than both is cut short


@dataclass(frozen=True)
class Limits:
    """What is read at most of one file, and how long one row may take. Far above any of the corpora here.

    file_bytes: a 10 s clip has 1 to 30 MB; files in object storage are held in memory.
    pixels: of a picture or frame, before scaling. frames: decoded on the way to those wanted: an hour and more.
    seconds: of sound that is stored. row_s: a damaged file can keep a decoder busy for ever.
    memory_bytes: of a reading process, its libraries included.
    """

    file_bytes: int = 2**30
    pixels: int = MAX_PIXELS
    frames: int = 100_000
    seconds: float = 600.0
    row_s: float = 120.0
    memory_bytes: int = 4 * 2**30


LIMITS = Limits()


class MediaError(Exception):
    """A row that is left out. reason: a word of `data/raw.py`; detail: more about it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass
class ReadRow:
    """values: by column, what the shard holds. remarks: oddities of files that were taken all the same."""

    values: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read_row(raw_uri: str, media: Mapping[str, Media], limits: Limits = LIMITS) -> ReadRow:
    """All media of one row. Raises MediaError if one of them cannot be had, with the column in its detail."""
    result = ReadRow()
    files = _Files(raw_uri, limits)
    for column, wanted in media.items():
        try:
            result.values[column] = _read(wanted, files, limits, result.remarks)
        except MediaError as error:
            raise MediaError(error.reason, f"{column}: {error.detail}" if error.detail else column) from None
        except (MemoryError, OverflowError) as error:
            raise MediaError(raw.TOO_LARGE, f"{column}: {type(error).__name__} while it was decoded") from None
    return result


def _read(wanted: Media, files: _Files, limits: Limits, remarks: list[str]) -> Any:
    match wanted:
        case Sound():
            return sound(wanted, files, limits, remarks)
        case Video():
            return [_jpeg(frame) for frame in video(wanted, files, limits, remarks)]
        case Pictures():
            return pictures(wanted, files, limits)
        case Flow():
            return flow(wanted, files, limits, remarks)


# Files


class _Files:
    """The files of a row. Those in object storage are fetched once, even if sound and frames come out of one."""

    def __init__(self, raw_uri: str, limits: Limits) -> None:
        self._raw = raw_uri
        self._limits = limits
        self._fetched: dict[str, bytes] = {}

    def open(self, path: str) -> BinaryIO:
        """A seekable file whose content is neither missing nor something else in its place."""
        check_path(path)
        place = storage.join(self._raw, path)
        try:
            file = self._local(place) if storage.is_local(place) else self._remote(place)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, DataError):
            raise MediaError(raw.MISSING, path) from None
        except OSError as error:
            raise ResourceError(f"{storage.show(place)}: {error.strerror or error}") from None
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_FIELD_OF_VIEW)
        file.seek(0)
        if size == 0:
            reason, detail = raw.ZERO_BYTES, path
        elif head.startswith(LFS_POINTER):
            reason, detail = raw.LFS_POINTER, f"{path} (run git lfs pull in the raw folder)"
        elif _HTML.match(head):
            reason, detail = raw.HTML, f"{path} (the download answered with a page)"
        elif size > self._limits.file_bytes:
            reason, detail = raw.TOO_LARGE, f"{path}: {size:,} bytes; at most {self._limits.file_bytes:,} are read"
        else:
            return file
        file.close()
        raise MediaError(reason, detail)

    def _local(self, place: str) -> BinaryIO:
        return open(storage.local_path(place), "rb")

    def _remote(self, place: str) -> BinaryIO:
        if place not in self._fetched:
            if storage.size(place) > self._limits.file_bytes:
                return storage.open_input(place)  # only to be told so
            self._fetched[place] = storage.read_bytes(place)
        return io.BytesIO(self._fetched[place])


def check_path(path: str) -> None:
    """Raise if a path out of a list could leave the raw folder."""
    if (
        not path
        or path.startswith("/")
        or any(c in path for c in "\\\0:")
        or ".." in path.split("/")
        or posixpath.normpath(path) == "."
    ):
        raise MediaError(raw.BAD_PATH, repr(path))


def _line(error: BaseException) -> str:
    """What a decoder says, without the path that FFmpeg adds."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


# Sound


def sound(wanted: Sound, files: _Files, limits: Limits, remarks: list[str]) -> bytes:
    """The wanted part of a file's sound, channels averaged, as 16-bit FLAC."""
    import soundfile

    if wanted.seconds is not None and wanted.seconds > limits.seconds:
        raise ConfigError(f"{wanted.seconds:g} s of sound are asked for; at most {limits.seconds:g} s are stored")
    with files.open(wanted.path) as file:
        head = file.read(12)
        file.seek(0)
        if head[:4] in (b"fLaC", b"OggS") or (head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE"):
            wave, rate = _sound_of_soundfile(wanted, file, limits)
        else:
            try:
                wave, rate = _sound_of_container(wanted, file, limits, remarks)
            except MediaError as error:
                if error.reason != raw.NO_STREAM or not wanted.silence:
                    raise
                remarks.append(f"{wanted.path} has no audio; silence is stored")
                wave, rate = np.zeros(round((wanted.seconds or 0) * wanted.rate), np.float32), wanted.rate
    if not len(wave):
        raise MediaError(raw.TOO_SHORT, f"{wanted.path}: no sound after {wanted.start_s:g} s")
    if not np.isfinite(wave).all():
        raise MediaError(raw.UNDECODABLE, f"{wanted.path}: NaN or infinite samples")
    wave = resampled(wave, rate, wanted.rate)
    if wanted.seconds is not None:
        wave = wave[: max(1, round(wanted.seconds * wanted.rate))]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1.0, 1.0), wanted.rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _check_sound(path: str, rate: int, seconds: float, limits: Limits) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(raw.UNDECODABLE, f"{path}: a sample rate of {rate} Hz")
    if seconds > limits.seconds:
        raise MediaError(raw.TOO_LARGE, f"{path}: {seconds:.0f} s of sound; at most {limits.seconds:.0f} s are stored")


def _sound_of_soundfile(wanted: Sound, file: BinaryIO, limits: Limits) -> tuple[np.ndarray, int]:
    import soundfile

    if file.read(4) == b"RIFF":
        file.seek(0)
        try:
            check_wav(file.read())
        except DecodeError as error:
            text = str(error)
            reason = raw.CUT_SHORT if text.startswith("cut short") else raw.TOO_SHORT
            raise MediaError(reason, f"{wanted.path}: {text.removeprefix('cut short: ')}") from None
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as opened:
            rate = opened.samplerate
            start = min(round(wanted.start_s * rate), opened.frames)
            count = opened.frames - start
            if wanted.seconds is not None:
                count = min(count, math.ceil(wanted.seconds * rate))
            _check_sound(wanted.path, rate, count / max(rate, 1), limits)
            opened.seek(start)
            wave = opened.read(count, dtype="float32", always_2d=True).mean(axis=1, dtype=np.float32)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        raise MediaError(raw.UNDECODABLE, f"{wanted.path}: {_line(error)}") from None
    if len(wave) < count:
        raise MediaError(raw.CUT_SHORT, f"{wanted.path}: {len(wave)} of {count} samples")
    return wave, rate


def _sound_of_container(wanted: Sound, file: BinaryIO, limits: Limits, remarks: list[str]) -> tuple[np.ndarray, int]:
    """Decoded from the beginning: seeking is not exact in every container."""
    pieces: list[np.ndarray] = []
    rate = 0
    at: float | None = None  # seconds at the end of what was decoded
    end = math.inf if wanted.seconds is None else wanted.start_s + wanted.seconds
    with _Container(file, wanted.path, "audio", remarks) as container:
        for frame in container.frames():
            if rate and frame.sample_rate != rate:
                raise MediaError(raw.UNDECODABLE, f"{wanted.path}: the sample rate changes within the file")
            rate = frame.sample_rate
            _check_sound(wanted.path, rate, sum(map(len, pieces)) / max(rate, 1), limits)
            begin = container.time(frame) if at is None else at
            wave = _mono(frame)
            at = begin + len(wave) / rate
            if at > wanted.start_s:
                pieces.append(wave[max(0, round((wanted.start_s - begin) * rate)) :])
            if at >= end:
                break
        else:
            container.check_end(at)
    wave = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return wave if end == math.inf else wave[: math.ceil((end - wanted.start_s) * rate)], rate


def _mono(frame: Any) -> np.ndarray:
    """Channels averaged, -1..1; float32 [samples]."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype.kind == "i":
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    return array.mean(axis=0, dtype=np.float32)


# Video


class _Container:
    """One stream of a media file, decoded in order. Frames that a decoder rejects are counted and left out."""

    def __init__(self, file: BinaryIO, path: str, kind: str, remarks: list[str]) -> None:
        self.path = path
        self.damaged = 0
        self._file = file
        self._kind = kind
        self._remarks = remarks

    def __enter__(self) -> _Container:
        import av

        av.logging.set_level(av.logging.PANIC)  # what matters is raised
        try:
            options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
            opened: Any = av.open(self._file, options=options)
        except (av.FFmpegError, ValueError, OSError, UnicodeDecodeError) as error:
            raise MediaError(raw.UNDECODABLE, f"{self.path}: {_line(error)}") from None
        self._container = opened
        streams = getattr(self._container.streams, self._kind)
        if not streams:
            self._container.close()
            raise MediaError(raw.NO_STREAM, f"{self.path} has no {self._kind}")
        self.stream = streams[0]
        if self.stream.codec_context is None:
            self._container.close()
            raise MediaError(raw.UNDECODABLE, f"{self.path}: no decoder for its {self._kind}")
        self.stream.codec_context.thread_count = 1
        # Times count from where the file begins: a stream may begin later than another.
        self._begin = (self._container.start_time or 0) / av.time_base
        self.announced = self._announced(av.time_base)
        return self

    def _announced(self, unit: int) -> float | None:
        """Seconds that the header promises of this stream; of the whole file where it is silent about streams."""
        known = []
        if self.stream.duration and self.stream.time_base:
            known.append(float(self.stream.duration * self.stream.time_base))
        rate = float(getattr(self.stream, "average_rate", None) or 0)
        if self.stream.frames and 1 <= rate <= 240:  # AVI shortens the time of a file that was cut, not this
            known.append(self.stream.frames / rate)
        if not known and self._container.duration:
            known.append(self._container.duration / unit)
        return max(known, default=None)

    def __exit__(self, *_: object) -> None:
        self._container.close()
        if self.damaged:
            self._remarks.append(f"{self.path}: {self.damaged} damaged packets were passed over")

    def frames(self) -> Iterator[Any]:
        import av

        found = False
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.FFmpegError, OSError) as error:
                if not found:
                    raise MediaError(raw.UNDECODABLE, f"{self.path}: {_line(error)}") from None
                self.damaged += 1
                break
            if packet.size == 0 and packet.dts is not None:
                continue  # an empty packet means "as before" in AVI; to the decoder it would mean the end
            try:
                decoded = packet.decode()
            except (av.FFmpegError, ValueError):
                self.damaged += 1
                continue
            for frame in decoded:
                found = True
                yield frame
        if not found:
            raise MediaError(raw.UNDECODABLE, f"{self.path}: not one {self._kind} frame can be decoded")

    def time(self, frame: Any, before: float | None = None) -> float:
        """Seconds from the file's beginning; for a frame that does not tell, or goes back, the one before and a bit."""
        if frame.pts is not None and frame.time_base is not None:
            at = float(frame.pts * frame.time_base) - self._begin
            if before is None or at > before:
                return at
        return 0.0 if before is None else before + _FRAME_S

    def check_end(self, end: float | None) -> None:
        """Raise if the stream ended much earlier than the file's header announces."""
        if self.announced is None or end is None:
            return
        lacking = self.announced - end
        if lacking > _EARLY_S and lacking > _EARLY_PART * self.announced:
            text = f"{self.path}: its {self._kind} ends at {end:.1f} s, the header says {self.announced:.1f} s"
            raise MediaError(raw.CUT_SHORT, text)


def video(wanted: Video, files: _Files, limits: Limits, remarks: list[str]) -> list[Any]:
    """The wanted frames as Pillow images, scaled."""
    return [image for image, _ in _chosen(wanted, files, limits, remarks, following=False)]


def _chosen(
    wanted: Video, files: _Files, limits: Limits, remarks: list[str], following: bool
) -> list[tuple[Any, Any | None]]:
    """The wanted frames, scaled, each with the frame that follows it in the file, wanted or not, if that is asked for.

    The last frame of a file has none, nor has one after which packets are damaged.
    """
    result: list[tuple[Any, Any | None]] = []
    damaged: int | None = None  # packets until the last frame, if that one was chosen and waits for the next
    counted = wanted.first_frame is not None or wanted.end_frame is not None
    first, last = wanted.first_frame or 0, wanted.end_frame
    end_s = math.inf if wanted.seconds is None else wanted.start_s + wanted.seconds
    due, step = wanted.start_s, 1 / wanted.per_second if wanted.per_second else 0.0
    at: float | None = None
    with files.open(wanted.path) as file, _Container(file, wanted.path, "video", remarks) as container:
        _check_pixels(wanted.path, container.stream.codec_context.width, container.stream.codec_context.height, limits)
        for number, frame in enumerate(container.frames()):
            if number >= limits.frames:
                raise MediaError(raw.TOO_LARGE, f"{wanted.path}: more than {limits.frames:,} frames")
            if counted and container.damaged:
                raise MediaError(
                    raw.UNDECODABLE, f"{wanted.path}: damaged before frame {number}, so frames cannot be counted"
                )
            at = container.time(frame, at)
            image = None
            if damaged is not None:
                if damaged == container.damaged:
                    image = _scaled(_image_of(frame, wanted.path, limits), wanted.size, wanted.channels)
                    result[-1] = (result[-1][0], image)
                damaged = None
            if (last is not None and number >= last) or at >= end_s:
                break
            if number < first or at < due - 1e-3:
                continue
            if len(result) == wanted.most:
                if last is None and wanted.seconds is None:
                    remarks.append(f"{wanted.path}: only the first {wanted.most} frames were taken")
                break
            if image is None:
                image = _scaled(_image_of(frame, wanted.path, limits), wanted.size, wanted.channels)
            result.append((image, None))
            damaged = container.damaged if following else None
            if step:  # a gap in the times gives no frame twice
                due = wanted.start_s + step * (math.floor((at - wanted.start_s) / step + 1e-3) + 1)
        else:
            container.check_end(None if at is None else at + _FRAME_S)
    if len(result) < wanted.least:
        raise MediaError(raw.TOO_SHORT, f"{wanted.path}: {len(result)} frames; at least {wanted.least} are needed")
    return result


def _image_of(frame: Any, path: str, limits: Limits) -> Any:
    _check_pixels(path, frame.width, frame.height, limits)
    image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0)
    return image.rotate(turn, expand=True) if turn % 90 == 0 and turn else image


def _check_pixels(path: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        text = f"{path}: {width} x {height} pixels; at most {limits.pixels // 1_000_000} million are read"
        raise MediaError(raw.TOO_LARGE, text)


# Pictures


def pictures(wanted: Pictures, files: _Files, limits: Limits) -> Any:
    """A picture or a list of them. JPEG and PNG that need no change stay as they are, byte for byte."""
    result = []
    for path in wanted.paths:
        with files.open(path) as file:
            data = file.read()
        image, kind = _opened(path, data, limits)
        mode = "L" if wanted.channels == 1 else "RGB"
        if kind in ("JPEG", "PNG") and image.mode == mode and _size(image, wanted.size) == image.size:
            result.append(data)
        else:
            result.append(_jpeg(_scaled(image, wanted.size, wanted.channels)))
    if not wanted.one:
        return result
    if len(result) != 1:
        raise ConfigError(f"one picture is asked for, with {len(result)} paths")
    return result[0]


def _opened(path: str, data: bytes, limits: Limits) -> tuple[Any, str]:
    """A decoded Pillow image and the format of its file."""
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which have a limit here
            image = Image.open(io.BytesIO(data), formats=_PICTURES)
            _check_pixels(path, image.width, image.height, limits)
            image.load()
    except MediaError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise many kinds
        reason = raw.CUT_SHORT if "truncated" in str(error) else raw.UNDECODABLE
        text = "not a picture of a known kind" if type(error).__name__ == "UnidentifiedImageError" else _line(error)
        raise MediaError(reason, f"{path}: {text}") from None
    return image, str(image.format)


def _size(image: Any, wanted: tuple[int, int] | int | None) -> tuple[int, int]:
    """Width and height to be. A shorter side that is smaller than wanted stays: enlarging adds nothing."""
    if wanted is None:
        return image.width, image.height
    if isinstance(wanted, tuple):
        return wanted[1], wanted[0]
    short = min(image.width, image.height)
    if short <= wanted:
        return image.width, image.height
    return max(1, round(image.width * wanted / short)), max(1, round(image.height * wanted / short))


def _scaled(image: Any, wanted: tuple[int, int] | int | None, channels: int) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits per pixel
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    size = _size(image, wanted)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _jpeg(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


# Optical flow


def flow(wanted: Flow, files: _Files, limits: Limits, remarks: list[str]) -> list[bytes]:
    """PNG pictures of u, v and a constant: JPEG would mix the two as if they were colours."""
    if wanted.video is not None:
        return _computed_flow(wanted, wanted.video, files, limits, remarks)
    if len(wanted.u) != len(wanted.v):
        raise MediaError(raw.MISSING, f"{len(wanted.u)} pictures of u and {len(wanted.v)} of v")
    if not wanted.u:
        raise MediaError(raw.TOO_SHORT, "no flow pictures")
    result = []
    for u, v in zip(wanted.u, wanted.v, strict=True):
        parts = []
        for path in (u, v):
            with files.open(path) as file:
                parts.append(_scaled(_opened(path, file.read(), limits)[0], wanted.size, 1))
        if parts[0].size != parts[1].size:
            raise MediaError(raw.UNDECODABLE, f"{u} has {parts[0].size} pixels, {v} has {parts[1].size}")
        result.append(_flow_png(np.asarray(parts[0]), np.asarray(parts[1])))
    return result


def _computed_flow(wanted: Flow, source: Video, files: _Files, limits: Limits, remarks: list[str]) -> list[bytes]:
    """Flow from each chosen frame to the next frame of the video, in pixels of the scaled frames."""
    import cv2 as opencv

    cv2: Any = opencv  # its type stubs lack the class for flow
    cv2.setNumThreads(1)  # and the same result on any machine
    size = wanted.size if wanted.size is not None else source.size
    grey = replace(source, size=size, channels=1)
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    result = []
    for one, following in _chosen(grey, files, limits, remarks, following=True):
        if following is None:
            continue
        before, after = np.asarray(one), np.asarray(following)
        if before.shape != after.shape:
            raise MediaError(raw.UNDECODABLE, f"{source.path}: frames change their size")
        if min(before.shape) < 16:
            raise MediaError(raw.TOO_SHORT, f"{source.path}: {before.shape} pixels are too few for optical flow")
        moved = method.calc(np.ascontiguousarray(before), np.ascontiguousarray(after), None)
        result.append(_flow_png(*(quantised(moved[..., axis], wanted.bound) for axis in (0, 1))))
    if not result:
        raise MediaError(raw.TOO_SHORT, f"{source.path}: no chosen frame has a frame after it, so nothing moves")
    return result


def quantised(pixels: np.ndarray, bound: float) -> np.ndarray:
    """Displacements as 0..255: 128 is none, -bound is 0 or a little more, beyond the bound they are cut."""
    return np.clip(np.rint(pixels * (127 / bound) + 128), 0, 255).astype(np.uint8)


def _flow_png(u: np.ndarray, v: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.stack([u, v, np.full_like(u, 128)], axis=-1)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


# What the manifest says


def described(rows: Sequence[Mapping[str, Media]]) -> dict[str, dict[str, Any]]:
    """What was asked for by column, as far as it is the same in all rows; paths are left out."""
    result: dict[str, dict[str, Any]] = {}
    for media in rows:
        for column, wanted in media.items():
            said = _said(wanted)
            known = result.setdefault(column, said)
            if known is not said:
                result[column] = {k: v for k, v in known.items() if said.get(k) == v}
    return result


def _said(wanted: Media) -> dict[str, Any]:
    facts: dict[str, Any] = {"as": type(wanted).__name__.lower()}
    facts |= {k: v for k, v in wanted.__dict__.items() if k not in ("path", "paths", "u", "v", "video")}
    match wanted:
        case Sound():
            facts["stored"] = "FLAC, mono, 16 bit"
        case Video():
            facts["stored"] = f"JPEG, quality {JPEG_QUALITY}"
        case Pictures():
            facts["stored"] = f"as found, or JPEG, quality {JPEG_QUALITY}, where changed"
        case Flow():
            facts["stored"] = "PNG, u and v in the first two channels, 128 for none"
            facts["method"] = FLOW_METHOD if wanted.video is not None else "as found"
            if wanted.video is not None:
                facts["quantisation"] = "round(128 + 127 / bound * pixels), cut to 0..255; u to the right, v down"
                facts["video"] = _said(wanted.video)
    return facts


def versions() -> dict[str, str]:
    """Of the libraries that decide about bytes."""
    import importlib.metadata as metadata

    names = ("av", "numpy", "opencv-python-headless", "pillow", "pyarrow", "scipy", "soundfile")
    return {name: metadata.version(name) for name in names}
