import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from counterpoise import storage
from counterpoise.contracts import RefusedError, ResourceError
from counterpoise.engine import checkpoint


def name(step: int) -> str:
    return f"step-{step:08d}"


def save(folder, step: int, keep: int = 2) -> str:
    tensors = {
        "model": {"w": torch.full((20,), float(step)), "n": torch.tensor(step)},
        "optimizer": {"m": torch.arange(step + 1)},
    }
    return checkpoint.save(str(folder), name(step), tensors, {"step": step}, keep)


def is_whole(found: checkpoint.Checkpoint) -> bool:
    """The oracle of the tests: tensors and state belong together and to the name."""
    step = found.state["step"]
    return (
        found.name.startswith(name(step))
        and torch.equal(found.tensors["model"]["w"], torch.full((20,), float(step)))
        and found.tensors["model"]["n"].item() == step
        and torch.equal(found.tensors["optimizer"]["m"], torch.arange(step + 1))
    )


def flip_bit(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------ what comes back


def test_tensors_and_state_come_back_exactly(tmp_path):
    base = torch.randn(4, 6)
    saved = {
        "model": {
            "half": torch.randn(3).bfloat16(),
            "float16": torch.randn(3).half(),
            "double": torch.randn(2, 2, dtype=torch.float64),
            "counter": torch.tensor(7),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "flags": torch.tensor([True, False]),
            "none": torch.zeros(0, 3),
            "view": base[:, 1:3],
            "transposed": base.t(),
            "tied": base,
            "parameter": torch.nn.Parameter(base),
        },
        "nothing": {},
    }
    state = {"lr": 0.1 + 0.2, "tiny": 5e-324, "big": 2**70, "deep": [{"a": None}], "text": "grün"}
    found = checkpoint.load(checkpoint.save(str(tmp_path), name(1), saved, state))
    assert found.state == state
    assert found.tensors["nothing"] == {}
    assert found.tensors["model"].keys() == saved["model"].keys()
    for key, tensor in saved["model"].items():
        back = found.tensors["model"][key]
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
        back.fill_(0)  # memory of its own: that is no warning and changes no other


def test_nan_and_infinities_survive_in_the_state(tmp_path):
    state = checkpoint.load(checkpoint.save(str(tmp_path), name(1), {}, {"x": [math.nan, math.inf]})).state
    assert math.isnan(state["x"][0])
    assert state["x"][1] == math.inf


def test_what_json_would_change_is_refused(tmp_path):
    with pytest.raises(TypeError, match="string keys"):
        checkpoint.save(str(tmp_path), name(1), {}, {"a": [{1: 2}]})
    with pytest.raises(TypeError, match="JSON values"):
        checkpoint.save(str(tmp_path), name(1), {}, {"a": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bad", ["../step-1", "step", "step-1-2", "", "a/step-1", "tmp-abc"])
def test_names_are_letters_a_dash_and_the_step(tmp_path, bad):
    with pytest.raises(ValueError, match="not like step-00000123"):
        checkpoint.save(str(tmp_path), bad, {}, {})
    with pytest.raises(ValueError, match="file name"):
        checkpoint.save(str(tmp_path), name(1), {"../a": {}}, {})


def test_sha256sum_agrees_with_the_manifest(tmp_path):
    folder = save(tmp_path, 1)
    command = ["sha256sum", "--check", "--strict", checkpoint.MANIFEST]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoint.latest(f"{tmp_path}/none") is None
    assert checkpoint.latest(str(tmp_path)) is None
    with pytest.raises(RefusedError, match="not a committed checkpoint"):
        checkpoint.load(f"{tmp_path}/none")


# ------------------------------------------------------------------------------------------------ names and pruning


def test_order_is_by_step_and_not_by_clock_or_spelling(tmp_path):
    for step in (100_000_000, 99_999_999, 3):
        checkpoint.save(str(tmp_path), f"step-{step}", {}, {"step": step}, keep=9)
    assert checkpoint.committed(str(tmp_path)) == ["step-3", "step-99999999", "step-100000000"]
    assert checkpoint.latest(str(tmp_path)).state["step"] == 100_000_000


def test_no_path_is_used_twice(tmp_path):
    places = [save(tmp_path, 5).rsplit("/")[-1] for _ in range(4)]
    assert places == [name(5), f"{name(5)}-2", f"{name(5)}-3", f"{name(5)}-4"]
    assert checkpoint.latest(str(tmp_path)).name == f"{name(5)}-4"
    assert (tmp_path / "LATEST").read_text() == f"{name(5)}-4\n"


def test_the_pointer_is_only_a_hint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "LATEST").write_text("step-00000099\n")
    assert checkpoint.latest(str(tmp_path)).name == name(1)


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path):
    for leftover in ("tmp-" + "a" * 32, name(1)):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"part")
    (tmp_path / "LATEST.tmp-01234567").write_bytes(b"")
    (tmp_path / "notes").mkdir()  # not ours: stays
    for step in range(1, 6):
        save(tmp_path, step, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "notes", name(3), name(4), name(5)]
    save(tmp_path, 6, keep=1)
    assert checkpoint.committed(str(tmp_path)) == [name(6)]


def test_pruning_never_takes_the_last_good_one(tmp_path):
    save(tmp_path, 1)
    flip_bit(tmp_path / save(tmp_path, 2).rsplit("/")[-1] / "model.safetensors", 999)
    save(tmp_path, 3)
    assert checkpoint.committed(str(tmp_path)) == [name(1), name(2), name(3)]
    flip_bit(tmp_path / name(3) / "model.safetensors", 999)
    assert checkpoint.latest(str(tmp_path)).name == name(1)
    save(tmp_path, 4)
    save(tmp_path, 5)
    assert checkpoint.committed(str(tmp_path)) == [name(4), name(5)]


def test_a_run_that_fell_back_does_not_lose_what_it_writes_next(tmp_path):
    save(tmp_path, 4)
    flip_bit(tmp_path / save(tmp_path, 8).rsplit("/")[-1] / "state.json", 9)
    save(tmp_path, 6)  # resumed at 4, saved at 6: a lower step than the damaged one
    assert checkpoint.latest(str(tmp_path)).name == name(6)


# ------------------------------------------------------------------------------------------------ kills


class Killed(BaseException):
    """Not an Exception: like SIGKILL it runs no cleaning up."""


def kill_at(k: int, monkeypatch, torn: bool) -> list[str]:
    """Stop before the k-th file operation of `save`, torn: in the middle of it. Returns what was done."""
    done: list[str] = []

    def before(operation: str) -> None:
        if len(done) == k:
            if not torn:
                raise Killed
            monkeypatch.setattr(storage, "write_file", half)
            monkeypatch.setattr(storage, "delete", half_deleted)
        done.append(operation)

    whole = storage.write_file

    def half(path, data, durable=True):
        whole(path, data[: len(data) // 2], False)
        raise Killed

    delete = storage.delete

    def half_deleted(uri):
        if not os.path.isdir(uri):
            return delete(uri)
        os.remove(f"{uri}/state.json")
        raise Killed

    monkeypatch.setattr(checkpoint, "_before", before)
    return done


def survives_kills(tmp_path, torn: bool) -> tuple[int, list[str]]:
    """Kill a save at every operation in turn, and after each look for the newest checkpoint and save again."""
    kills, failures = 0, []
    for k in range(100):
        folder = tmp_path / f"{torn}-{k}"
        save(folder, 1)
        save(folder, 2)
        with pytest.MonkeyPatch.context() as patch:
            done = kill_at(k, patch, torn)
            try:
                save(folder, 3)
            except Killed:
                kills += 1
            else:
                if k >= len(done):
                    return kills, failures  # fewer than k operations: all were tried
        where = f"after {done}"
        try:
            fallbacks: list[tuple[str, str]] = []
            found = checkpoint.latest(str(folder), lambda *said, to=fallbacks: to.append(said))
            failures += [f"{said} {where}" for said in fallbacks]
            for there in checkpoint.committed(str(folder)):
                if said := checkpoint.verify(f"{folder}/{there}"):
                    failures.append(f"{said} {where}")
            if found is None or not is_whole(found) or found.state["step"] < 2:
                failures.append(f"{found} {where}")
            save(folder, 4)
            if not is_whole(checkpoint.latest(str(folder))):
                failures.append(f"not usable {where}")
            if any("tmp-" in n for n in os.listdir(folder)):
                failures.append(f"leftovers {where}")
        except RefusedError as error:
            failures.append(f"{error} {where}")
    raise AssertionError("the save never came to its end")


@pytest.mark.parametrize("torn", [False, True], ids=["between", "within"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, torn):
    kills, failures = survives_kills(tmp_path, torn)
    assert failures == []
    assert kills >= (12 if not torn else 6)


def test_the_kill_test_finds_a_marker_that_is_written_first(tmp_path, monkeypatch):
    """The control: a protocol that is wrong must not pass."""

    def marker_first(folder_uri, name, tensors, text):
        final = storage.join(folder_uri, name)
        files = dict(checkpoint._payloads(tensors, text))
        hashes = {f: checkpoint.hashlib.sha256(d).hexdigest() for f, d in files.items()}
        manifest = checkpoint._manifest(hashes)
        marker = checkpoint._marker(manifest, {f: len(d) for f, d in files.items()})
        for file, data in [(checkpoint.COMMITTED, marker), (checkpoint.MANIFEST, manifest), *files.items()]:
            checkpoint._before(f"write {file}")
            storage.write_bytes(storage.join(final, file), data)
        return final

    monkeypatch.setattr(checkpoint, "_save_local", marker_first)
    _, failures = survives_kills(tmp_path, torn=False)
    assert len(failures) >= 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sigkill_at_random_moments_of_a_saving_process(tmp_path):
    rng = random.Random(1)
    steps = [save(tmp_path, 1) and 1]
    landed = 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            for step in range(steps[-1] + 1, steps[-1] + 10_000):
                save(tmp_path, step)
            os._exit(0)
        time.sleep(rng.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        landed += any(checkpoint.COMMITTED not in os.listdir(p) for p in tmp_path.iterdir() if p.is_dir())
        found = checkpoint.latest(str(tmp_path), lambda *said: pytest.fail(str(said)))
        assert is_whole(found)
        assert found.state["step"] >= steps[-1]
        steps.append(found.state["step"])
    assert steps[-1] > 1
    assert landed >= 3, "the kills have to fall into the writing to prove anything"


def test_a_folder_without_marker_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / name(2) / checkpoint.COMMITTED).unlink()
    said = []
    assert checkpoint.latest(str(tmp_path), lambda *s: said.append(s)).name == name(1)
    assert said == []  # it was never one, so nothing is lost


# ------------------------------------------------------------------------------------------------ damage


def test_one_flipped_bit_anywhere_is_found_and_the_one_before_is_used(tmp_path):
    save(tmp_path, 1)
    newest = tmp_path / save(tmp_path, 2).rsplit("/")[-1]
    files = sorted(newest.iterdir())
    assert len(files) == 5
    rng = random.Random(0)
    places = [(file, bit) for file in files for bit in rng.sample(range(file.stat().st_size * 8), 40)]
    for file, bit in places:
        flip_bit(file, bit)
        said = []
        found = checkpoint.latest(str(tmp_path), lambda *s, said=said: said.append(s))
        assert found.name == name(1), (file, bit)
        assert is_whole(found)
        assert said[0][0] == name(2)
        assert "damaged" in said[0][1]
        flip_bit(file, bit)
    assert checkpoint.latest(str(tmp_path)).name == name(2)


def test_a_missing_or_cut_file_is_named(tmp_path):
    folder = save(tmp_path, 1)
    path = f"{folder}/model.safetensors"
    os.truncate(path, 50)
    with pytest.raises(RefusedError, match=r"model\.safetensors is damaged"):
        checkpoint.load(folder)
    assert "model.safetensors" in checkpoint.verify(folder)
    os.remove(path)
    with pytest.raises(RefusedError, match=r"model\.safetensors is missing"):
        checkpoint.load(folder)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path):
    for step in (1, 2):
        flip_bit(tmp_path / save(tmp_path, step).rsplit("/")[-1] / "state.json", 3)
    with pytest.raises(RefusedError, match="none of 2 committed checkpoints is intact"):
        checkpoint.latest(str(tmp_path))


def test_a_store_out_of_reach_is_not_taken_for_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def unreachable(uri):
        raise ResourceError("no answer")

    monkeypatch.setattr(storage, "read_bytes", unreachable)
    with pytest.raises(ResourceError, match="no answer"):
        checkpoint.latest(str(tmp_path))


def test_a_checkpoint_that_is_a_pickle_is_refused(tmp_path):
    folder = tmp_path / save(tmp_path, 1).rsplit("/")[-1]
    torch.save({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(RefusedError, match=r"model\.safetensors is damaged"):
        checkpoint.load(str(folder))


# ------------------------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize("k", range(6))
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_no_rubbish(tmp_path, monkeypatch, k):
    save(tmp_path, 1)
    writes = 0
    whole = storage.write_file

    def fills_up(path, data, durable=True):
        nonlocal writes
        writes += 1
        if writes > k:
            whole(path, data[: len(data) // 2], False)
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, data, durable)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_file", fills_up)
        if k == 5:  # all but the pointer: the checkpoint is safe, so that is a warning
            save(tmp_path, 2)
        else:
            with pytest.raises(ResourceError, match=r"disk full; \d+ bytes needed, [\d,]+ free") as caught:
                save(tmp_path, 2)
            assert str(tmp_path) in str(caught.value)
            assert sorted(os.listdir(tmp_path)) == ["LATEST", name(1)]
    assert is_whole(checkpoint.latest(str(tmp_path)))
    save(tmp_path, 3)
    assert checkpoint.latest(str(tmp_path)).name == name(3)


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda uri: 10)
    with pytest.raises(ResourceError, match="bytes needed, 10 free"):
        save(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_can_be_moved(tmp_path):
    shutil.copytree(save(tmp_path / "a", 1), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "state.json").read_text()) == {"step": 1}
    assert checkpoint.verify(str(tmp_path / "b")) is None
