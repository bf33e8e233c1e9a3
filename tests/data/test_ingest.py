"""A raw download becomes a corpus: in parts, by any number of processes, stopped and started, with every row told."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, Interrupted, ResourceError
from counterpoise.data import ingest, raw
from counterpoise.data.card import load_card
from counterpoise.data.check import check_corpus
from counterpoise.data.index import open_splits
from counterpoise.data.media import Limits
from counterpoise.data.raw import Left, Listing, RawRow, Sound, open_raw
from counterpoise.data.recipes import prepare

from . import crema
from .media_files import tone, write_wav
from .training import two_epochs

CLIPS = crema.clip_names()
TEST = [c for c in CLIPS if c[:4] in ("1011", "1012")]
TRAIN = [c for c in CLIPS if c not in TEST]
UNLISTED = "1020_IEO_ANG_XX"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A raw folder with seven faults, lists with a repeated row, and a clip that no list has."""
    place = tmp_path_factory.mktemp("crema")
    folder = crema.write_raw(place / "raw", [*CLIPS, UNLISTED])
    faults = crema.spoil(folder, TRAIN[:6] + TEST[:1])
    lists = {
        "train": crema.write_list(place / "train.csv", [*TRAIN, TRAIN[10]]),
        "test": crema.write_list(place / "test.csv", TEST),
    }
    return folder, lists, faults


@pytest.fixture(scope="module")
def made(spoilt, tmp_path_factory):
    folder, lists, _ = spoilt
    return prepare("cremad", str(tmp_path_factory.mktemp("out") / "cremad"), raw=str(folder), workers=2, **lists)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def ledger(folder):
    return [json.loads(line) for line in storage.read_text(f"{folder}/ledger.jsonl").splitlines()]


def test_every_row_is_kept_or_has_its_reason(made, spoilt):
    _, _, faults = spoilt
    dropped = {e["sample_id"]: e["reason"] for e in ledger(made) if not e["kept"]}
    assert dropped == {**faults, TRAIN[10]: "duplicate", UNLISTED: "not in split"}
    kept = [e["sample_id"] for e in ledger(made) if e["kept"]]
    assert kept == [c for c in TRAIN + TEST if c not in faults]
    assert all(str(spoilt[0]) not in e.get("detail", "") for e in ledger(made))


def test_the_counts_tell_where_rows_went(made):
    manifest = json.loads(storage.read_text(f"{made}/manifest.json"))
    assert manifest["counts"]["train"] == {
        "published": 6698,
        "card": None,
        "listed": 61,
        "kept": 54,
        "dropped": {
            "HTML page": 1,
            "cut short": 1,
            "duplicate": 1,
            "git-LFS pointer": 1,
            "missing file": 1,
            "undecodable": 1,
            "zero bytes": 1,
        },
    }
    assert manifest["counts"]["test"]["kept"] == 11
    assert manifest["counts"]["-"]["dropped"] == {"not in split": 1}
    said = "\n".join(ingest.explained(manifest))
    assert "differ from the published ones by -6637 rows (61 listed, 6698 expected)" in said
    assert "git lfs pull" in said and "in no split: 1 not in split" in said
    assert manifest["media"]["audio"]["rate"] == 22050 and "pebble" not in manifest["versions"]


def test_the_corpus_is_sound_and_has_the_papers_shapes(made):
    card = load_card(made)
    assert {s: c.expected for s, c in card.splits.items()} == {s: len(i) for s, i in open_splits(card).items()}
    report = check_corpus(card)
    assert report.ok, report.lines()
    assert report.inputs == {"audio": [1, 257, 1250], "visual": [1, 3, 224, 224]}
    assert not any(s.undecodable for s in report.splits.values())
    speakers = {s: {i.split("_")[0] for i in index.sample_ids} for s, index in open_splits(card).items()}
    assert not speakers["train"] & speakers["valid"]


def test_it_can_be_trained_on(made, tmp_path):
    sets = ["preprocess.audio.seconds=1", "preprocess.visual.size=[32, 32]", "batch_size=16"]
    summary = two_epochs("cremad", made, tmp_path, *sets)
    assert summary["test"]["samples"] == 11
    assert summary["selection"] == "valid accuracy (fused)"


def test_one_worker_and_two_make_the_same_bytes(made, spoilt, tmp_path):
    folder, lists, _ = spoilt
    one = prepare("cremad", str(tmp_path / "one"), raw=str(folder), workers=1, **lists)
    assert content(one) == content(made)


def test_a_finished_corpus_is_kept_and_another_refused(made, spoilt):
    folder, lists, _ = spoilt
    before = content(made)
    assert prepare("cremad", made, raw=str(folder), **lists) == made
    assert prepare("cremad", made, **lists) == made
    with pytest.raises(ConfigError, match="already holds a corpus made in another way"):
        prepare("cremad", made, raw=str(folder), size=128, **lists)
    assert content(made) == before


# The engine by itself, on small sounds


CARD = {
    "name": "sounds",
    "classes": ["low", "high"],
    "sample_id": "key",
    "label": "tone",
    "splits": {"train": {"files": "train-*.parquet"}, "test": {"files": "test-*.parquet"}},
    "modalities": {
        "audio": {
            "kind": "audio",
            "column": "sound",
            "preprocess": {"sample_rate": 8000, "seconds": 0.1, "n_fft": 64, "hop_length": 32, "mel": 8},
        }
    },
}


def sounds(folder, train=10, test=4):
    rows = []
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            write_wav(folder / f"{split}{i}.wav", tone(0.1, 300 + 50 * i + len(split), 8000), 8000)
            rows.append(RawRow(f"{split}{i}", split, ("low", "high")[i % 2], {"sound": Sound(f"{split}{i}.wav", 8000)}))
    return rows


def build(folder, out, rows, **more):
    from counterpoise.data.card import parse_card

    listing = Listing(rows, more.pop("left", ()), more.pop("expected", {}), rows_per_part=more.pop("rows_per_part", 3))
    card = parse_card(yaml.safe_dump(CARD).encode(), "sounds.yaml")
    options = more.pop("options", {})
    return ingest.prepare_raw("sounds", listing, open_raw(str(folder)), card, CARD, str(out), options=options, **more)


def counting(calls):
    """local_parts that notes the parts it is asked for."""

    def run(parts, work, workers):
        calls.append([part.name for part in parts])
        yield from ingest.local_parts(parts, work, workers)

    return run


def stop_after(parts, made_by=ingest.local_parts):
    """Makes parts as they are made otherwise; `reached` as soon as so many records are there."""

    def run(todo, work, workers):
        done = 0
        for more, record in made_by(todo, work, workers):
            done += record is not None
            run.reached = done >= parts
            yield more, record

    run.reached = False
    return run


def test_an_interrupted_preparation_goes_on_and_ends_with_the_same_bytes(tmp_path):
    rows = sounds(tmp_path / "raw")
    build(tmp_path / "raw", tmp_path / "whole", rows)
    run = stop_after(2)
    with pytest.raises(Interrupted, match=r"of 6 parts are finished in .*the same command goes on"):
        build(tmp_path / "raw", tmp_path / "out", rows, run_parts=run, stop=lambda: "SIGINT" if run.reached else None)
    assert not (tmp_path / "out" / "corpus.yaml").exists()
    finished = len(list((tmp_path / "out" / "parts").glob("t*.json")))
    assert 2 <= finished < 6
    calls = []
    build(tmp_path / "raw", tmp_path / "out", rows, run_parts=counting(calls))
    assert len(calls[0]) == 6 - finished
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_damaged_shard_and_a_mended_file_are_noticed(tmp_path):
    rows = sounds(tmp_path / "raw")
    (tmp_path / "raw" / "train4.wav").write_bytes(b"")
    manifest = build(tmp_path / "raw", tmp_path / "out", rows)
    assert manifest["counts"]["train"]["dropped"] == {"zero bytes": 1}
    shard = tmp_path / "out" / "train-000000-000003.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    write_wav(tmp_path / "raw" / "train4.wav", tone(0.1, 300, 8000), 8000)
    calls = []
    manifest = build(tmp_path / "raw", tmp_path / "out", rows, run_parts=counting(calls))
    assert calls == [["train-000000-000003", "train-000003-000006"]]
    assert manifest["counts"]["train"]["dropped"] == {}
    assert check_corpus(load_card(str(tmp_path / "out"))).errors == []


def test_parts_that_are_no_longer_in_the_plan_are_removed(tmp_path):
    rows = sounds(tmp_path / "raw")
    build(tmp_path / "raw", tmp_path / "out", rows)
    build(tmp_path / "raw", tmp_path / "out", rows, rows_per_part=5)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.parquet")) == [
        "test-000000-000004.parquet", "train-000000-000005.parquet", "train-000005-000010.parquet",
    ]  # fmt: skip
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 4


def test_the_columns_have_the_names_of_the_card(tmp_path):
    import pyarrow.parquet as pq

    build(tmp_path / "raw", tmp_path / "out", sounds(tmp_path / "raw"))
    table = pq.read_table(tmp_path / "out" / "test-000000-000003.parquet")
    assert table.column_names == ["key", "tone", "sound"]
    assert table["sound"][0].as_py()[:4] == b"fLaC"


def test_listings_that_do_not_fit_are_refused(tmp_path):
    rows = sounds(tmp_path / "raw", 2, 2)

    def message(changed):
        with pytest.raises(DataError) as error:
            build(tmp_path / "raw", tmp_path / "out", changed)
        return str(error.value)

    media = rows[0].media
    assert "name no row" in message([])
    assert "label is 'loud'; the card's classes are: low, high" in message([RawRow("a", "train", "loud", media)])
    assert "split is 'tests', did you mean 'test'" in message([RawRow("a", "tests", "low", media)])
    assert "its columns are not those" in message([rows[0], RawRow("a", "train", "low", {})])
    assert "two columns are called key" in message([RawRow("a", "train", "low", media, {"key": 1})])
    assert not (tmp_path / "out").exists()


def test_a_repeated_sample_id_is_kept_once(tmp_path):
    rows = sounds(tmp_path / "raw")
    manifest = build(tmp_path / "raw", tmp_path / "out", [*rows, rows[0]], left=[Left("x", "train", "too loud")])
    assert manifest["counts"]["train"] == {
        "published": None, "card": None, "listed": 12, "kept": 10, "dropped": {"duplicate": 1, "too loud": 1},
    }  # fmt: skip


def test_nothing_readable_is_an_error_that_says_why(tmp_path):
    rows = sounds(tmp_path / "raw")
    for path in (tmp_path / "raw").glob("test*"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        DataError, match=r"split test: not one of 4 rows could be read \(4 git-LFS pointer, for example"
    ):
        build(tmp_path / "raw", tmp_path / "out", rows)
    assert not (tmp_path / "out" / "corpus.yaml").exists()


def test_a_folder_with_something_else_is_refused(tmp_path):
    rows = sounds(tmp_path / "raw")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ConfigError, match="is not empty and holds no corpus"):
        build(tmp_path / "raw", tmp_path / "out", rows)
    build(tmp_path / "raw", tmp_path / "other", rows)
    with pytest.raises(ConfigError, match=r"made in another way \(options {} there, {'a': 1} now\)"):
        build(tmp_path / "raw", tmp_path / "other", rows, options={"a": 1})
    with pytest.raises(ConfigError, match="no such folder"):
        open_raw(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="holds no files"):
        (tmp_path / "empty").mkdir()
        open_raw(str(tmp_path / "empty"))


def test_a_decoder_that_crashes_hangs_or_eats_memory_costs_one_row(tmp_path, monkeypatch):
    rows = sounds(tmp_path / "raw")
    monkeypatch.syspath_prepend(Path(__file__).parent)  # the reading processes get this path too
    monkeypatch.setattr(ingest, "read_row", importlib.import_module("hostile").hostile)
    manifest = build(tmp_path / "raw", tmp_path / "out", rows, limits=Limits(row_s=4), rows_per_part=20, workers=2)
    found = {e["sample_id"]: e for e in ledger(tmp_path / "out") if not e["kept"]}
    assert {i: e["reason"] for i, e in found.items()} == {
        "train1": raw.CRASHED, "train3": raw.TIMED_OUT, "train5": raw.UNDECODABLE, "train7": raw.TOO_LARGE,
    }  # fmt: skip
    assert "AttributeError: a bug in a decoder" in found["train5"]["detail"]
    assert manifest["counts"]["test"]["kept"] == 4


@pytest.mark.parametrize("name", ["raw", "out"])
def test_a_machine_that_lacks_the_folders_does_not_call_files_missing(tmp_path, name):
    rows = sounds(tmp_path / "raw")

    def elsewhere(parts, work, workers):
        yield from ingest.local_parts(parts, replace(work, **{name: str(tmp_path / "elsewhere")}), workers)

    with pytest.raises(ResourceError, match="elsewhere is not there on this machine"):
        build(tmp_path / "raw", tmp_path / "out", rows, run_parts=elsewhere)
    assert build(tmp_path / "raw", tmp_path / "out", rows)["counts"]["train"]["kept"] == 10


def test_hidden_files_are_not_looked_at_and_links_are_followed(tmp_path):
    (tmp_path / "raw" / ".git").mkdir(parents=True)
    (tmp_path / "raw" / ".git" / "x").write_text("1")
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "a.wav").write_text("12")
    (tmp_path / "raw" / "media").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "deep" / "loop").symlink_to(tmp_path / "disk")
    assert open_raw(str(tmp_path / "raw")).files == {"media/deep/a.wav": 2}


# The command


def command(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "counterpoise", "corpora", "prepare", *arguments]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment, **more)


def processes_of(folder):
    """Processes whose environment names the folder."""
    mark = f"COUNTERPOISE_TEST={folder}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in place.read_bytes():
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def has_read_video(process):
    """Whether a process is a reader at work; one that is only starting has its own last words for a killed parent."""
    try:
        return "libavcodec" in Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_command_that_is_stopped_leaves_no_processes_and_goes_on(made, spoilt, tmp_path, number, code, monkeypatch):
    folder, lists, _ = spoilt
    monkeypatch.setenv("COUNTERPOISE_TEST", str(tmp_path))
    arguments = ["cremad", "--raw", str(folder), "--out", str(tmp_path / "out")]
    arguments += [f"--option={k}={v}" for k, v in lists.items()]
    child = command(*arguments, start_new_session=True)
    until = time.monotonic() + 60
    while not any(map(has_read_video, processes_of(tmp_path))) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(child.pid, number) if number == signal.SIGINT else child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    assert "Traceback" not in said
    until = time.monotonic() + 20
    while processes_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_of(tmp_path)
    child = command(*arguments)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 0, said
    assert "git-LFS pointer" in said and f"corpus cremad is in {tmp_path / 'out'}" in said
    assert content(tmp_path / "out") == content(made)


def test_the_command_says_what_it_needs(tmp_path):
    for arguments, words in (
        (["cremad", "--out", str(tmp_path / "out")], "give its folder with --raw DIR or --raw s3://bucket/prefix"),
        (["av_digits", "--raw", str(tmp_path)], "is made without a download; leave --raw out"),
        (["cremad", "--raw", str(tmp_path / "none"), "--out", str(tmp_path / "out")], "no such folder"),
    ):
        child = command(*arguments)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 2 and words in said


@pytest.mark.s3
@pytest.mark.filterwarnings("default")
def test_from_a_bucket_into_a_bucket_it_is_the_same_corpus(bucket, made, spoilt):
    folder, lists, _ = spoilt
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{bucket}/raw/{path.relative_to(folder)}", path.read_bytes())
    out = prepare("cremad", f"{bucket}/out", raw=f"{bucket}/raw", **lists)
    here, there = content(made), storage.list_files(out)
    assert there.keys() == here.keys()
    for name in there:
        if name.endswith((".parquet", ".jsonl")):
            assert storage.read_bytes(f"{out}/{name}") == here[name], name
    assert check_corpus(load_card(out)).ok


# On Ray


@pytest.fixture(scope="module")
def ray_parts():
    from counterpoise.launch.cluster import cluster
    from counterpoise.launch.prepare import ray_parts

    with cluster(workers=2, tasks=1):
        yield ray_parts()


@pytest.mark.ray
def test_tasks_of_ray_make_the_same_bytes(tmp_path, ray_parts):
    rows = sounds(tmp_path / "raw")
    (tmp_path / "raw" / "train4.wav").write_bytes(b"")
    build(tmp_path / "raw", tmp_path / "here", rows)
    build(tmp_path / "raw", tmp_path / "there", rows, run_parts=ray_parts, workers=2)
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert [e["sample_id"] for e in ledger(tmp_path / "there") if not e["kept"]] == ["train4"]


@pytest.mark.ray
def test_what_ray_began_is_finished_without_it(tmp_path, ray_parts):
    rows = sounds(tmp_path / "raw")
    build(tmp_path / "raw", tmp_path / "whole", rows)
    run = stop_after(1, ray_parts)
    with pytest.raises(Interrupted, match="of 6 parts are finished"):
        build(tmp_path / "raw", tmp_path / "out", rows, run_parts=run, stop=lambda: "SIGINT" if run.reached else None)
    calls = []
    build(tmp_path / "raw", tmp_path / "out", rows, run_parts=counting(calls))
    assert len(calls[0]) < 6
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.ray
def test_an_error_in_a_task_is_told_in_one_line(tmp_path, ray_parts):
    rows = sounds(tmp_path / "raw")
    rows[0] = RawRow("long", "train", "low", {"sound": Sound("train0.wav", 8000, seconds=9999)})
    with pytest.raises(ConfigError, match="9999 s of sound are asked for; at most 600 s are stored"):
        build(tmp_path / "raw", tmp_path / "out", rows, run_parts=ray_parts, workers=2)


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_what_ray_job_submit_runs_makes_the_corpus(made, spoilt, tmp_path):
    folder, lists, _ = spoilt
    program = Path(__file__).resolve().parents[2] / "trainables" / "ingest.py"
    arguments = ["cremad", "--raw", str(folder), "--out", str(tmp_path / "out"), "--workers", "2"]
    arguments += [f"--option={k}={v}" for k, v in lists.items()]
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "git-LFS pointer" in done.stderr
    assert content(tmp_path / "out") == content(made)
