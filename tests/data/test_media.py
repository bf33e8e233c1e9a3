"""Raw media become what a shard holds, or a word that says why not."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import soundfile
from PIL import Image

from counterpoise.contracts import ResourceError
from counterpoise.data import raw
from counterpoise.data.media import Limits, MediaError, described, quantised, read_row
from counterpoise.data.raw import Flow, Pictures, Sound, Video

from .media_files import (
    LFS,
    PAGE,
    moving,
    number_of,
    numbered,
    tone,
    write_picture,
    write_video,
    write_wav,
)


def value(folder, wanted, **more):
    return read_row(str(folder), {"x": wanted}, **more).values["x"]


def reason(folder, wanted, **more):
    with pytest.raises(MediaError) as error:
        value(folder, wanted, **more)
    return error.value.reason, error.value.detail


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The same 30 numbered frames and 3 s of tone in every container, at 10 frames a second (mpg: 25)."""
    folder = tmp_path_factory.mktemp("clips")
    for name, fps in (("a.flv", 10), ("a.mp4", 10), ("a.avi", 10), ("a.mpg", 25)):
        write_video(folder / name, numbered(3 * fps), fps, tone(3.0, rate=44100))
    return folder


@pytest.mark.parametrize("name", ["a.flv", "a.mp4", "a.avi"])
def test_frames_are_taken_by_time_and_by_number_from_every_container(clips, name):
    assert list(map(number_of, value(clips, Video(name, per_second=1)))) == [0, 10, 20]
    assert list(map(number_of, value(clips, Video(name, per_second=2, start_s=1.0, seconds=1.0)))) == [10, 15]
    assert list(map(number_of, value(clips, Video(name, first_frame=5, end_frame=12)))) == list(range(5, 12))
    assert list(map(number_of, value(clips, Video(name, per_second=5, most=3)))) == [0, 2, 4]
    assert len(value(clips, Video(name))) == 30


@pytest.mark.parametrize("name", ["a.flv", "a.mp4", "a.avi", "a.mpg"])
def test_sound_of_a_video_becomes_mono_flac_of_the_wanted_rate(clips, name):
    data, rate = soundfile.read(io.BytesIO(value(clips, Sound(name, 16000, start_s=1.0, seconds=0.5))))
    assert rate == 16000 and data.shape == (8000,)
    spectrum = np.abs(np.fft.rfft(data))
    assert abs(spectrum.argmax() * rate / len(data) - 440) < 3
    assert 0.35 < np.abs(data[1000:-1000]).max() < 0.45
    assert len(soundfile.read(io.BytesIO(value(clips, Sound(name, 16000))))[0]) == pytest.approx(48000, abs=1000)


def test_wav_is_cut_averaged_and_resampled(tmp_path):
    both = np.stack([tone(2.0), -0.5 * tone(2.0)], axis=1)
    write_wav(tmp_path / "s.wav", both)
    data, rate = soundfile.read(io.BytesIO(value(tmp_path, Sound("s.wav", 16000, 0.5, 1.0))))
    assert rate == 16000 and np.allclose(data, 0.25 * tone(1.5)[8000:], atol=1e-4)
    data, rate = soundfile.read(io.BytesIO(value(tmp_path, Sound("s.wav", 22050))))
    assert rate == 22050 and len(data) == 44100


def test_a_size_scales_frames_and_one_channel_is_grey(clips):
    def shape(**more):
        return Image.open(io.BytesIO(value(clips, Video("a.mp4", per_second=1, **more))[0]))

    assert shape().size == (64, 48) and shape().mode == "RGB"
    assert shape(size=(20, 30)).size == (30, 20)
    assert shape(size=24).size == (32, 24)
    assert shape(size=100).size == (64, 48), "nothing is gained by enlarging"
    assert shape(channels=1).mode == "L"


def test_pictures_that_need_no_change_keep_their_bytes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    for name, kind in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.jpg", "GIF")):
        write_picture(tmp_path / name, pixels, kind)
    a, b, c = value(tmp_path, Pictures(("a.jpg", "b.png", "c.jpg")))
    assert a == (tmp_path / "a.jpg").read_bytes() and b == (tmp_path / "b.png").read_bytes()
    assert Image.open(io.BytesIO(c)).format == "JPEG"
    small = value(tmp_path, Pictures(("a.jpg",), size=15, channels=1, one=True))
    assert Image.open(io.BytesIO(small)).size == (20, 15) and Image.open(io.BytesIO(small)).mode == "L"


def fields_of(maps, bound=20):
    """Displacements in pixels, [2, H, W] each."""
    arrays = [np.asarray(Image.open(io.BytesIO(data))).astype(float).transpose(2, 0, 1) for data in maps]
    assert all((array[2] == 128).all() for array in arrays)
    return [(array[:2] - 128) * bound / 127 for array in arrays]


def test_flow_of_a_moving_texture_is_its_movement(tmp_path):
    write_video(tmp_path / "m.avi", moving(5), 10)
    maps = fields_of(value(tmp_path, Flow(video=Video("m.avi"), bound=20)))
    assert len(maps) == 4
    for u, v in maps:
        assert np.median(u) == pytest.approx(2, abs=0.3)
        assert np.median(v) == pytest.approx(0, abs=0.3)
    assert quantised(np.array([0.0, 20, -20, 99, -99]), 20).tolist() == [128, 255, 1, 255, 0]


def moving_square(count, right, down, side=40, height=120, width=160):
    """A square with a texture that moves over a still one, from (30, 60) on."""
    texture = moving(1, height, width)[0]
    square = 255 - moving(1, side, side)[0]
    frames = []
    for i in range(count):
        frame = texture.copy()
        top, left = 30 + i * down, 60 + i * right
        frame[top : top + side, left : left + side] = square
        frames.append(frame)
    return frames


@pytest.mark.parametrize(("right", "down"), [(3, 1), (-2, 0)])
def test_flow_is_the_movement_to_the_next_frame_however_far_apart_frames_are_chosen(tmp_path, right, down):
    write_video(tmp_path / "s.mp4", moving_square(15, right, down), 5)
    fields = fields_of(value(tmp_path, Flow(video=Video("s.mp4", per_second=1))))
    pictures = value(tmp_path, Video("s.mp4", per_second=1))
    assert len(fields) == len(pictures) == 3, "a field for each picture: frames 0, 5 and 10"
    for number, field in zip((0, 5, 10), fields, strict=True):
        top, left = 30 + number * down, 60 + number * right
        inside = field[:, top + 8 : top + 32, left + 8 : left + 32]
        assert np.median(inside[0]) == pytest.approx(right, abs=0.3)
        assert np.median(inside[1]) == pytest.approx(down, abs=0.3)
        assert np.abs(np.median(field[:, 90:], axis=(1, 2))).max() < 0.2, "below the square all is still"


def test_every_frame_of_a_window_has_its_flow_but_the_last_of_the_video(tmp_path):
    write_video(tmp_path / "s.mp4", moving_square(8, 3, 0), 5)

    def count(first, end):
        return len(value(tmp_path, Flow(video=Video("s.mp4", first_frame=first, end_frame=end))))

    assert count(2, 5) == 3
    assert count(5, 8) == 2
    assert reason(tmp_path, Flow(video=Video("s.mp4", first_frame=7, end_frame=8))) == (
        raw.TOO_SHORT,
        "x: s.mp4: no chosen frame has a frame after it, so nothing moves",
    )


def test_flow_of_smaller_pictures_is_in_their_pixels(tmp_path):
    write_video(tmp_path / "s.mp4", moving_square(3, 4, 0, side=60), 5)
    field = fields_of(value(tmp_path, Flow(video=Video("s.mp4"), size=60, bound=10)), bound=10)[0]
    assert field.shape == (2, 60, 80)
    assert np.median(field[0, 20:40, 35:55]) == pytest.approx(2, abs=0.3)


def test_stored_flow_is_put_together_from_u_and_v(tmp_path):
    for i in range(2):
        write_picture(tmp_path / f"u/{i}.png", np.full((8, 8), 100 + i, np.uint8), "PNG")
        write_picture(tmp_path / f"v/{i}.png", np.full((8, 8), 150 + i, np.uint8), "PNG")
    maps = value(tmp_path, Flow(u=("u/0.png", "u/1.png"), v=("v/0.png", "v/1.png")))
    assert [np.asarray(Image.open(io.BytesIO(m)))[0, 0].tolist() for m in maps] == [[100, 150, 128], [101, 151, 128]]
    assert reason(tmp_path, Flow(u=("u/0.png", "u/1.png"), v=("v/0.png",)))[0] == raw.MISSING


@pytest.mark.parametrize("wanted", [Sound("f.wav", 8000), Video("f.flv", per_second=1), Pictures(("f.jpg",))])
def test_what_is_no_media_is_told_apart_before_it_is_decoded(tmp_path, wanted):
    place = tmp_path / (wanted.paths[0] if isinstance(wanted, Pictures) else wanted.path)
    assert reason(tmp_path, wanted) == (raw.MISSING, f"x: {place.name}")
    for content, word in ((b"", raw.ZERO_BYTES), (LFS, raw.LFS_POINTER), (PAGE, raw.HTML), (b"\n<html>", raw.HTML)):
        place.write_bytes(content)
        assert reason(tmp_path, wanted)[0] == word
    place.write_bytes(b"neither sound nor picture" * 20)
    word, detail = reason(tmp_path, wanted)
    assert word == raw.UNDECODABLE and str(tmp_path) not in detail
    place.unlink()
    place.mkdir()
    assert reason(tmp_path, wanted)[0] == raw.MISSING


def test_files_that_were_cut_are_not_taken_for_short_ones(clips, tmp_path):
    for name in ("a.flv", "a.avi"):
        data = (clips / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert reason(tmp_path, Video(name, per_second=1))[0] == raw.CUT_SHORT
    data = (clips / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    assert reason(tmp_path, Video("a.mp4", per_second=1))[0] == raw.UNDECODABLE
    write_wav(tmp_path / "s.wav", tone(1.0))
    (tmp_path / "s.wav").write_bytes((tmp_path / "s.wav").read_bytes()[:20000])
    assert reason(tmp_path, Sound("s.wav", 16000))[0] == raw.CUT_SHORT
    write_picture(tmp_path / "p.jpg", np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8))
    (tmp_path / "p.jpg").write_bytes((tmp_path / "p.jpg").read_bytes()[:3000])
    assert reason(tmp_path, Pictures(("p.jpg",)))[0] == raw.CUT_SHORT


def test_too_little_is_said(clips, tmp_path):
    assert reason(clips, Video("a.flv", per_second=1, least=4)) == (
        raw.TOO_SHORT,
        "x: a.flv: 3 frames; at least 4 are needed",
    )
    assert reason(clips, Video("a.flv", first_frame=25, end_frame=40, least=15))[0] == raw.TOO_SHORT
    assert reason(clips, Sound("a.flv", 8000, start_s=9.0))[0] == raw.TOO_SHORT
    write_wav(tmp_path / "none.wav", np.zeros(0, np.float32))
    assert reason(tmp_path, Sound("none.wav", 8000))[0] == raw.TOO_SHORT
    write_video(tmp_path / "mute.flv", numbered(5))
    assert reason(tmp_path, Sound("mute.flv", 8000)) == (raw.NO_STREAM, "x: mute.flv has no audio")


def test_a_video_without_sound_gives_silence_only_where_that_is_asked_for(clips, tmp_path):
    write_video(tmp_path / "mute.mp4", numbered(5))
    row = read_row(str(tmp_path), {"x": Sound("mute.mp4", 8000, seconds=1.5, silence=True)})
    data, rate = soundfile.read(io.BytesIO(row.values["x"]))
    assert rate == 8000 and data.shape == (12000,) and not data.any()
    assert row.remarks == ["mute.mp4 has no audio; silence is stored"]
    heard = read_row(str(clips), {"x": Sound("a.mp4", 8000, seconds=1.5, silence=True)})
    assert heard == read_row(str(clips), {"x": Sound("a.mp4", 8000, seconds=1.5)})
    (tmp_path / "none.mp4").write_bytes(b"no video at all" * 50)
    assert reason(tmp_path, Sound("none.mp4", 8000, seconds=1.5, silence=True))[0] == raw.UNDECODABLE


def test_limits_hold(clips, tmp_path):
    assert reason(clips, Video("a.mp4"), limits=Limits(frames=20))[0] == raw.TOO_LARGE
    assert reason(clips, Video("a.mp4"), limits=Limits(pixels=1000))[0] == raw.TOO_LARGE
    assert reason(clips, Sound("a.mp4", 8000), limits=Limits(seconds=2))[0] == raw.TOO_LARGE
    assert reason(clips, Sound("a.mp4", 8000), limits=Limits(file_bytes=1000))[0] == raw.TOO_LARGE
    write_picture(tmp_path / "p.png", np.zeros((50, 50), np.uint8), "PNG")
    assert reason(tmp_path, Pictures(("p.png",)), limits=Limits(pixels=2000))[0] == raw.TOO_LARGE


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.wav", "a/../../x.wav", "s3://b/x.wav", "", ".", "a\0b"])
def test_a_path_out_of_a_list_cannot_leave_the_raw_folder(tmp_path, path):
    assert reason(tmp_path, Sound(path, 8000))[0] == raw.BAD_PATH


def test_a_playlist_opens_no_other_file(clips, tmp_path):
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clips / 'a.mp4'}\n")
    assert reason(tmp_path, Video("list.mp4"))[0] == raw.UNDECODABLE
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:3,\n{clips / 'a.mpg'}\n#EXT-X-ENDLIST\n")
    assert reason(tmp_path, Video("list.m3u8"))[0] == raw.UNDECODABLE


def test_damaged_packets_are_passed_over_and_remarked(tmp_path):
    noisy = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8) for i in range(30)]
    write_video(tmp_path / "a.mp4", noisy)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = data.index(b"mdat") + len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(data)
    row = read_row(str(tmp_path), {"x": Video("a.mp4", per_second=1)})
    assert len(row.values["x"]) == 3
    assert len(row.remarks) == 1 and "damaged packets were passed over" in row.remarks[0]
    # which frames are lost is not known, so those after them cannot be counted
    assert reason(tmp_path, Video("a.mp4", first_frame=20, end_frame=30))[0] == raw.UNDECODABLE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_no_fault_of_the_row(tmp_path):
    write_wav(tmp_path / "s.wav", tone(0.1))
    (tmp_path / "s.wav").chmod(0)
    with pytest.raises(ResourceError, match="Permission denied"):
        value(tmp_path, Sound("s.wav", 8000))


def test_the_manifest_tells_what_all_rows_have_in_common():
    rows = [{"a": Sound(f"{i}.wav", 8000, start_s=i), "v": Flow(video=Video("x.avi", size=64))} for i in range(2)]
    told = described(rows)
    assert told["a"]["rate"] == 8000 and "start_s" not in told["a"] and "path" not in told["a"]
    assert told["v"]["method"] == ("DIS, preset medium (OpenCV), from each chosen frame to the next frame of the video")
    assert told["v"]["bound"] == 20 and "127 / bound" in told["v"]["quantisation"]
    assert told["v"]["video"]["size"] == 64


@pytest.mark.s3
@pytest.mark.filterwarnings("default")
def test_media_in_object_storage_are_read_as_on_disk(clips, bucket):
    from counterpoise import storage

    storage.write_bytes(f"{bucket}/raw/a.flv", (clips / "a.flv").read_bytes())
    storage.write_bytes(f"{bucket}/raw/none.flv", b"")
    wanted = {"frames": Video("a.flv", per_second=1), "sound": Sound("a.flv", 16000)}
    assert read_row(f"{bucket}/raw", wanted) == read_row(str(clips), wanted)
    assert reason(f"{bucket}/raw", Video("none.flv"))[0] == raw.ZERO_BYTES
    assert reason(f"{bucket}/raw", Video("other.flv"))[0] == raw.MISSING
