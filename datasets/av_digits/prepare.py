"""Make the corpus av_digits: spoken digits paired with handwritten ones.

Speech is synthesised by eSpeak NG, or read from a folder of `{digit}_{speaker}_{n}.wav` files (the Free Spoken Digit
Dataset). Handwriting comes from scikit-learn's digits, or from a folder of MNIST's idx files. Everything is a
function of `seed`; with the same versions of the libraries the shards are equal byte for byte.
"""

from __future__ import annotations

import ctypes
import gzip
import io
import json
import re
import struct
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000  # Hz, of the stored WAV files
SECONDS = 0.64
ACCENTS = (
    "en", "en-us", "en-us-nyc", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd",
)  # fmt: skip
# Voice variants of eSpeak NG, less the whispering, slow and distorted ones.
VARIANTS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky",
    "Lee", "Mario", "Michael", "Mike", "Nguyen", "Reed", "RicishayMax", "RicishayMax2", "Storm", "Tweaky", "adam",
    "anika", "announcer", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "ed", "edward",
    "edward2", "f1", "f2", "f3", "f4", "f5", "grandma", "grandpa", "gustave", "ian", "iven", "iven2", "iven3",
    "john", "kaukovalta", "klatt", "klatt2", "klatt3", "klatt4", "linda", "m1", "m2", "m3", "m4", "m5", "m6", "m7",
    "m8", "marcelo", "max", "michel", "miguel", "mike2", "norbert", "pablo", "paul", "pedro", "quincy", "rob",
    "robert", "sandro", "shelby", "steph", "steph2", "steph3", "travis", "victor", "zac",
)  # fmt: skip
SPLIT_PARTS = {"train": 0.7, "valid": 0.12, "test": 0.18}  # of voices and of handwriting
Progress = Callable[[int, int, str], None]


def prepare(
    out: str,
    *,
    seed: int = 0,
    train: int = 2000,
    valid: int = 400,
    test: int = 600,
    audio_dir: str | None = None,
    images_dir: str | None = None,
    degrade: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Any]]:
    """Write shards and card into the folder `out`; returns the shards of every split.

    audio_dir: a folder of `{digit}_{speaker}_{n}.wav` instead of the synthesiser; speakers differ between splits if
    there are three or more. images_dir: a folder of MNIST's idx files instead of scikit-learn's digits. degrade:
    clutter and fade the images; by default only scikit-learn's, which are too easy as they are. train, valid, test:
    rows; fewer if there are fewer recordings.
    """
    import numpy as np

    from counterpoise.contracts import ConfigError
    from counterpoise.data.shards import write_shards

    sizes = {"train": train, "valid": valid, "test": test}
    for name, size in sizes.items():
        if size < len(WORDS):
            raise ConfigError(f"{name} is {size}; give at least {len(WORDS)}, one sample of every digit")
    rng = np.random.default_rng(seed)
    speech = recordings(Path(audio_dir), sizes, rng) if audio_dir else spoken(sizes, rng)
    handwriting = mnist(Path(images_dir)) if images_dir else sklearn_digits(rng)
    degrade = images_dir is None if degrade is None else degrade
    total = sum(len(items) for items in speech.values())
    done = 0
    shards = {}
    for split, items in speech.items():
        images, labels, ids = handwriting[split]
        chosen = paired(labels, [label for label, _, _ in items], split, rng)
        rows = []
        for number, ((label, voice, audio), at) in enumerate(zip(items, chosen, strict=True)):
            pixels = images[at]
            if degrade:
                pixels = degraded(pixels, images[rng.integers(len(images), size=3)], rng)
            rows.append(
                {
                    "sample_id": f"{split}-{number:05d}",
                    "label": label,
                    "voice": voice,
                    "image_id": ids[at],
                    "audio": audio,
                    "image": png(pixels),
                }
            )
            done += 1
            if progress and done % 100 == 0:
                progress(done, total, f"{split} samples")
        shards[split] = write_shards(rows, out, split, num_shards=max(1, len(rows) // 1000))
    counts = {split: sum(s.rows for s in files) for split, files in shards.items()}
    write_card(out, counts, audio_dir is not None, images_dir is not None)
    if progress:
        progress(total, total, "written")
    return shards


def parts(count: int) -> dict[str, slice]:
    """The part of `count` shuffled things that each split gets: at least one."""
    valid = max(1, round(count * SPLIT_PARTS["valid"]))
    test = max(1, round(count * SPLIT_PARTS["test"]))
    train = count - valid - test
    return {"train": slice(0, train), "valid": slice(train, train + valid), "test": slice(train + valid, count)}


def paired(labels: Any, wanted: Sequence[int], split: str, rng: Any) -> list[int]:
    """For every wanted label an image with it; all images of a label are used before one is used again."""
    import numpy as np

    from counterpoise.contracts import DataError

    result = [0] * len(wanted)
    for label in sorted(set(wanted)):
        have = np.flatnonzero(np.asarray(labels) == label)
        if not len(have):
            raise DataError(f"no image of digit {label} for split {split}; give a folder with more images")
        places = [i for i, w in enumerate(wanted) if w == label]
        rounds = [rng.permutation(have) for _ in range(-(-len(places) // len(have)))]
        for place, at in zip(places, np.concatenate(rounds), strict=False):
            result[place] = int(at)
    return result


def write_card(out: str, counts: dict[str, int], real_speech: bool, real_images: bool) -> None:
    """The card beside this file, with the counts of what was written and the sources that were used."""
    import yaml

    from counterpoise import storage

    card = yaml.safe_load((Path(__file__).parent / "corpus.yaml").read_text(encoding="utf-8"))
    for split, count in counts.items():
        card["splits"][split]["expected"] = count
    if real_speech:
        card["source"][0] = "recordings from a folder"
    if real_images:
        card["source"][1] = "MNIST idx files from a folder"
    if real_speech or real_images:
        card["licence"] = "that of the recordings and images it was made from"
        card["description"] = "Spoken and handwritten digits, paired by label."
    storage.write_bytes(storage.join(out, "corpus.yaml"), yaml.safe_dump(card, sort_keys=False).encode())


# Speech


def balanced_labels(count: int, rng: Any) -> list[int]:
    import numpy as np

    return [int(v) for v in rng.permutation(np.arange(count) % len(WORDS))]


def spoken(sizes: dict[str, int], rng: Any) -> dict[str, list[tuple[int, str, bytes]]]:
    """(label, voice, WAV) of synthesised digits; every voice variant speaks in one split only."""
    order = [VARIANTS[i] for i in rng.permutation(len(VARIANTS))]
    wishes = []
    for split, part in parts(len(order)).items():
        variants = order[part]
        for label in balanced_labels(sizes[split], rng):
            accent = ACCENTS[int(rng.integers(len(ACCENTS)))]
            voice = f"{accent}+{variants[int(rng.integers(len(variants)))]}"
            wishes.append((split, label, voice, int(rng.integers(150, 215)), int(rng.integers(25, 76))))
    waves = synthesised([(WORDS[label], voice, rate, pitch) for _, label, voice, rate, pitch in wishes])
    result: dict[str, list[tuple[int, str, bytes]]] = {split: [] for split in sizes}
    for (split, label, voice, _, _), (rate, samples) in zip(wishes, waves, strict=True):
        result[split].append((label, voice, wav(recorded(samples, rate, rng))))
    return result


def recorded(samples: Any, rate: int, rng: Any) -> Any:
    """A synthesised word as if recorded: trimmed, resampled, at some loudness and place in a noisy clip."""
    import numpy as np
    from scipy.signal import resample_poly

    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    word = resample_poly(samples[loud[0] : loud[-1] + 1], RATE, rate)
    length = int(SECONDS * RATE)
    word = word[:length] / np.abs(word).max()
    clip = np.zeros(length)
    start = int(rng.integers(0, length - len(word) + 1))
    clip[start : start + len(word)] = word * rng.uniform(0.25, 0.8)
    noise = rng.standard_normal(length) * np.sqrt(np.mean(word**2)) * 10 ** (-rng.uniform(6, 28) / 20)
    return np.clip(clip + 0.5 * noise, -1, 1)


def wav(samples: Any) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.rint(np.asarray(samples) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def synthesised(wishes: list[tuple[str, str, int, int]]) -> Iterator[tuple[int, Any]]:
    """(sample rate, samples) of every (word, voice, words per minute, pitch).

    In a process of its own: eSpeak NG keeps state from word to word, so only a fresh one says the same thing twice.
    """
    import numpy as np

    from counterpoise.contracts import ResourceError

    child = subprocess.run(
        [sys.executable, __file__, "--speak"], input=json.dumps(wishes).encode(), capture_output=True, check=False
    )
    if child.returncode:
        reason = (child.stderr.decode(errors="replace").strip().splitlines() or [f"exit {child.returncode}"])[-1]
        raise ResourceError(f"speech synthesis failed ({reason}); is the package espeakng-loader installed?")
    (rate,) = struct.unpack_from("<i", child.stdout)
    at = 4
    for _ in wishes:
        (count,) = struct.unpack_from("<i", child.stdout, at)
        yield rate, np.frombuffer(child.stdout, "<i2", count, at + 4).astype(np.float64)
        at += 4 + 2 * count


def speak(source: Any, sink: Any) -> None:
    """What the synthesising process does: wishes as JSON in, sample rate and counted 16-bit samples out."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    heard: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    synchronous, speed, pitch_parameter = 2, 1, 3
    rate = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise SystemExit(f"eSpeak NG does not start from {espeakng_loader.get_data_path()}")
    library.espeak_ng_SetRandSeed(1)
    library.espeak_SetSynthCallback(collect)
    sink.write(struct.pack("<i", rate))
    for word, voice, words_per_minute, pitch in json.load(source):
        heard.clear()
        if library.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"eSpeak NG has no voice {voice}")
        library.espeak_SetParameter(speed, words_per_minute, 0)
        library.espeak_SetParameter(pitch_parameter, pitch, 0)
        text = word.encode() + b"\0"
        if library.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None):
            raise SystemExit(f"eSpeak NG cannot say {word} as {voice}")
        samples = b"".join(heard)
        sink.write(struct.pack("<i", len(samples) // 2) + samples)
    sink.flush()


def recordings(folder: Path, sizes: dict[str, int], rng: Any) -> dict[str, list[tuple[int, str, bytes]]]:
    """(label, speaker, WAV) of a folder of `{digit}_{speaker}_{n}.wav`; three or more speakers: no one is in two
    splits, otherwise no recording is."""
    from counterpoise.contracts import ConfigError, DataError

    if not folder.is_dir():
        raise ConfigError(f"audio_dir {folder}: no such folder; give one with files such as 7_jackson_32.wav")
    files = sorted(folder.glob("*.wav"))
    if not files:
        raise DataError(f"audio_dir {folder}: no .wav files; expected names such as 7_jackson_32.wav")
    takes = []
    for file in files:
        match = re.fullmatch(r"([0-9])_(.+)_([0-9]+)", file.stem)
        if match is None:
            raise DataError(f"{file}: the name is not {{digit}}_{{speaker}}_{{number}}.wav, as in 7_jackson_32.wav")
        takes.append((int(match[1]), match[2], file))
    speakers = sorted({speaker for _, speaker, _ in takes})
    result: dict[str, list[tuple[int, str, bytes]]] = {}
    groups: dict[str, list[tuple[int, str, Path]]] = {split: [] for split in sizes}
    if len(speakers) >= 3:
        order = [speakers[i] for i in rng.permutation(len(speakers))]
        home = {speaker: split for split, part in parts(len(order)).items() for speaker in order[part]}
        for take in takes:
            groups[home[take[1]]].append(take)
    else:
        for label in range(len(WORDS)):
            same = [take for take in takes if take[0] == label]
            if len(same) < 3:
                raise DataError(f"audio_dir {folder}: {len(same)} recordings of digit {label}; give at least three")
            order_of_takes = [same[i] for i in rng.permutation(len(same))]
            for split, part in parts(len(same)).items():
                groups[split] += order_of_takes[part]
    for split, group in groups.items():
        chosen = [group[i] for i in rng.permutation(len(group))[: sizes[split]]]
        result[split] = [(label, speaker, file.read_bytes()) for label, speaker, file in chosen]
    return result


# Handwriting


def sklearn_digits(rng: Any) -> dict[str, tuple[Any, Any, list[str]]]:
    """Images [N, 8, 8] uint8, labels and ids per split; no image is in two splits."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = rng.permutation(len(images))
    return {
        split: (images[order[part]], digits.target[order[part]], [f"digits-{i}" for i in order[part]])
        for split, part in parts(len(order)).items()
    }


def mnist(folder: Path) -> dict[str, tuple[Any, Any, list[str]]]:
    """The same from MNIST's idx files: valid is the last tenth of its training images, test its test images."""
    from counterpoise.contracts import ConfigError, DataError

    if not folder.is_dir():
        raise ConfigError(f"images_dir {folder}: no such folder; give one with train-images-idx3-ubyte and the like")
    result = {}
    loaded = {}
    for part in ("train", "t10k"):
        images, labels = idx(folder, f"{part}-images-idx3-ubyte", 3), idx(folder, f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(f"images_dir {folder}: {len(images)} {part} images, but {len(labels)} labels")
        loaded[part] = (images, labels)
    images, labels = loaded["train"]
    cut = len(images) - max(1, len(images) // 10)
    for split, lo, hi in (("train", 0, cut), ("valid", cut, len(images))):
        result[split] = (images[lo:hi], labels[lo:hi], [f"mnist-train-{i}" for i in range(lo, hi)])
    images, labels = loaded["t10k"]
    result["test"] = (images, labels, [f"mnist-test-{i}" for i in range(len(images))])
    return result


def idx(folder: Path, name: str, dimensions: int) -> Any:
    """The array of an idx file, plain or gzipped."""
    import numpy as np

    from counterpoise.contracts import DataError

    for file in (folder / name, folder / f"{name}.gz", folder / name.replace("-idx", ".idx")):
        if file.is_file():
            break
    else:
        raise DataError(f"images_dir {folder}: neither {name} nor {name}.gz is there")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: not a readable gzip file ({error})") from None
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{file}: not an idx file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    count = 1
    for size in shape:
        count *= size
    if len(data) - head != count:
        raise DataError(f"{file}: {len(data) - head} bytes, its header promises {count}")
    return np.frombuffer(data, np.uint8, count, head).reshape(shape)


def degraded(pixels: Any, clutter: Any, rng: Any) -> Any:
    """A digit [H, W] on a canvas of 28 x 28: small, somewhere, turned a little, between scraps of others, faded."""
    import numpy as np
    from PIL import Image

    canvas = np.zeros((28, 28))
    for other in clutter:
        scrap = np.asarray(Image.fromarray(other).resize((14, 14), Image.Resampling.BICUBIC), dtype=float)
        h, w = (int(v) for v in rng.integers(5, 9, 2))
        y, x = (int(v) for v in rng.integers(0, 14 - 8, 2))
        top, left = int(rng.integers(0, 28 - h + 1)), int(rng.integers(0, 28 - w + 1))
        place = canvas[top : top + h, left : left + w]
        np.maximum(place, scrap[y : y + h, x : x + w] * rng.uniform(0.4, 0.9), out=place)
    size = int(rng.integers(14, 21))
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    image = image.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR)
    top, left = (int(v) for v in rng.integers(0, 28 - size + 1, 2))
    place = canvas[top : top + size, left : left + size]
    np.maximum(place, np.asarray(image, dtype=float), out=place)
    contrast = rng.uniform(0.35, 0.9)
    noisy = canvas * contrast + rng.uniform(0, 255 * (1 - contrast)) + rng.normal(0, 28, canvas.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def png(pixels: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__" and sys.argv[1:] == ["--speak"]:
    speak(sys.stdin.buffer, sys.stdout.buffer)
