"""A run as a folder that predicts: exported, read back, damaged, and asked about things people have."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.cases import SMALL
from tests.conftest import SECRET, Done, make_rows, new_folder, settings, wav, write_corpus

from counterpoise import storage
from counterpoise.config import resolve
from counterpoise.contracts import ConfigError, CounterpoiseError, DataError, Interrupted, RefusedError
from counterpoise.engine.export import export_run
from counterpoise.engine.inference import Model, Prediction, load_model, read_sums, sums_text

MEDIA = {"method": {"name": "joint", "head": "sum"}, "batch_size": 16}


@pytest.fixture(scope="module")
def media_run(run_experiment: Callable[..., Done], corpus_with_media: str) -> Done:
    return run_experiment(settings(corpus_with_media, **MEDIA, modalities={}))


@pytest.fixture(scope="module")
def exported(media_run: Done, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("exported") / "model")
    export_run(media_run.folder.uri, out)
    return out


@pytest.fixture(scope="module")
def model(exported: str) -> Model:
    return load_model(exported)


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    """The test split of the corpus with media."""
    return [only(row) for row in make_rows("test", 16, ["strong"], media=True)]


def only(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names or ("strong", "image", "sound")}


@pytest.mark.parametrize("name", [*SMALL, "aug-of-three-learned-weights", "maie-of-three"])
def test_a_model_of_every_method_says_what_its_run_said(
    name: str, finished: Callable[[str], Done], tmp_path: Path
) -> None:
    done = finished(name)
    content = export_run(done.folder.uri, str(tmp_path / "model"))
    found = load_model(tmp_path / "model")
    written = done.folder.read_predictions()
    modalities = content["modalities"]
    rows = make_rows("test", 60, list(modalities) if "three" in name else ["strong", "weak"])
    said = found.predict([{m: row[m] for m in modalities} for row in rows])
    assert isinstance(said, list)
    fused = torch.softmax(torch.tensor(written["logits_fused"]), dim=1).numpy()
    np.testing.assert_allclose([p.probabilities["fused"] for p in said], fused, atol=2e-6)
    assert [p.label for p in said] == written["prediction"].tolist()
    assert content["metrics"]["accuracy"] == done.summary["test"]["accuracy"]
    assert content["classifiers"] == done.summary["classifiers"]
    assert all(decision["epoch"] < content["epoch"] for decision in content["decisions"])


def test_it_needs_neither_the_run_nor_the_corpus(
    run_experiment: Callable[..., Done], tmp_path: Path, samples: list[dict[str, Any]]
) -> None:
    rows = {"train": 32, "valid": 8, "test": 8}
    corpus = write_corpus(tmp_path / "corpus", modalities=["strong"], media=True, rows=rows)
    done = run_experiment(settings(corpus, **MEDIA, modalities={}, epochs=1))
    export_run(done.folder.uri, str(tmp_path / "model"))
    said = load_model(tmp_path / "model").predict(samples[:2])
    shutil.rmtree(corpus)
    shutil.rmtree(done.folder.uri)
    shutil.move(str(tmp_path / "model"), str(tmp_path / "elsewhere"))
    again = load_model(str(tmp_path / "elsewhere")).predict(samples[:2])
    assert isinstance(said, list) and isinstance(again, list)
    assert all((a.probabilities["fused"] == b.probabilities["fused"]).all() for a, b in zip(said, again, strict=True))


def test_people_may_give_files_bytes_and_arrays(model: Model, samples: list[dict[str, Any]], tmp_path: Path) -> None:
    row = samples[3]
    (tmp_path / "clip.wav").write_bytes(row["sound"])
    (tmp_path / "picture.png").write_bytes(row["image"])
    pixels = np.asarray(Image.open(io.BytesIO(row["image"])))
    wave = np.frombuffer(row["sound"][44:], dtype="<i2").astype(np.float32) / 32768
    given = [
        row,
        row | {"sound": str(tmp_path / "clip.wav"), "image": tmp_path / "picture.png"},
        row | {"sound": wave, "image": pixels, "strong": torch.tensor(row["strong"], dtype=torch.float64)},
        row | {"sound": (wave, 2000), "image": Image.fromarray(pixels), "strong": np.array(row["strong"])},
    ]
    said = [model.predict(sample) for sample in given]
    assert all(isinstance(p, Prediction) for p in said)
    for other in said[1:]:
        for name, expected in said[0].probabilities.items():  # type: ignore[union-attr]
            np.testing.assert_allclose(other.probabilities[name], expected, atol=1e-6)  # type: ignore[union-attr]
    first = said[0]
    assert isinstance(first, Prediction)
    assert first.name == first.top(1)[0][0] == model.classes[first.label] and first.missing == ()
    assert sum(p for _, p in first.top(99)) == pytest.approx(1, abs=1e-6)
    twice = model.predict(row | {"sound": (np.repeat(wave, 2), 4000)})  # another rate is resampled
    assert (
        isinstance(twice, Prediction) and twice.probabilities["image"].argmax() == first.probabilities["image"].argmax()
    )


def test_missing_modalities_are_dropped_from_the_sum_and_may_differ_by_sample(
    model: Model, samples: list[dict[str, Any]]
) -> None:
    rows = [samples[0], only(samples[1], "strong"), samples[2] | {"strong": None}]
    mixed = model.predict(rows)
    assert isinstance(mixed, list)
    assert [p.missing for p in mixed] == [(), ("image", "sound"), ("strong",)]
    assert set(mixed[1].probabilities) == {"fused", "strong"}
    np.testing.assert_allclose(mixed[1].probabilities["fused"], mixed[1].probabilities["strong"], atol=1e-6)
    terms = np.log(mixed[2].probabilities["image"]) + np.log(mixed[2].probabilities["sound"])
    np.testing.assert_allclose(mixed[2].probabilities["fused"], np.exp(terms) / np.exp(terms).sum(), atol=1e-5)
    for row, together in zip(rows, mixed, strict=True):
        alone = model.predict(row)
        assert isinstance(alone, Prediction)
        np.testing.assert_allclose(alone.probabilities["fused"], together.probabilities["fused"], atol=1e-6)


def test_tensors_go_in_and_probabilities_come_out(model: Model, samples: list[dict[str, Any]]) -> None:
    row = samples[0]
    said = model.predict(row)
    assert isinstance(said, Prediction)
    tensors = model.tensors([model.decoder(row)])
    whole = model(tensors)
    np.testing.assert_allclose(whole["fused"][0], said.probabilities["fused"], atol=1e-6)
    assert set(model(tensors, missing=["sound"])) == {"fused", "strong", "image"}
    assert model({**tensors, "sound": None})["fused"].equal(model(tensors, missing=["sound"])["fused"])
    with pytest.raises(DataError, match=r"image: a tensor \[1, 1, 9, 9\]; the model takes \[B, 1, 8, 8\]"):
        model({**tensors, "image": torch.zeros(1, 1, 9, 9)})


@pytest.mark.parametrize(
    ("sample", "kind", "message"),
    [
        ({}, DataError, "all modalities are missing; give one of strong, image, sound"),
        ({"imgae": b""}, ConfigError, "no modality 'imgae', did you mean 'image'"),
        ({"image": b"GIF89a"}, DataError, "image: not PNG or JPEG"),
        ({"image": np.zeros((4, 4))}, DataError, "image: pixels float64"),
        ({"sound": wav(np.zeros(40))[:60]}, DataError, "sound: cut short"),
        ({"strong": [1.0, float("nan")]}, DataError, "strong: missing, NaN or infinite numbers"),
        ({"image": "/nowhere/a.png"}, DataError, "/nowhere/a.png: there is no such file"),
    ],
)
def test_what_cannot_be_predicted_is_explained(
    model: Model, sample: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.predict(sample)


def test_the_card_states_what_was_measured(exported: str, media_run: Done) -> None:
    text = Path(exported, "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert {"license", "library_name", "tags", "metrics"} <= set(head)
    results = {m["name"]: m["value"] for m in head["model-index"][0]["results"][0]["metrics"]}
    measured = media_run.summary["test"]
    assert results["accuracy (fused)"] == round(measured["accuracy"]["fused"], 4)
    row = f"| image | {measured['accuracy']['image']:.4f} | {measured['map']['image']:.4f} |"
    assert row in body and "On the test split, 16 samples" in body and f"{measured['gap']:.4f}" in body
    assert 'load_model("model")' in body and "not stated on the card" in body


def test_text_of_a_card_is_no_markup() -> None:
    from counterpoise.engine.export import _text

    assert _text("a | <b>\n`c` [d](e)") == r"a \| \<b\> \`c\` \[d\](e)"


def test_an_unfinished_run_is_exported_only_on_request(
    run_experiment: Callable[..., Done], corpus: str, tmp_path: Path
) -> None:
    content = settings(corpus, method=SMALL["aug"])
    experiment, provenance = resolve(content)
    folder = new_folder(tmp_path, experiment, provenance)
    asked = iter([None] * 6 + ["test"] * 99)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("counterpoise.engine.loop.CONTROL_INTERVAL_S", 0.0)
        run_experiment(content, folder=folder, stop=lambda: next(asked))
    with pytest.raises(RefusedError, match=r"interrupted after epoch .* --epoch best \(best so far\) or --epoch last"):
        export_run(folder.uri, str(tmp_path / "model"))
    if any(r["kind"] == "epoch" for r in folder.records()):
        best = export_run(folder.uri, str(tmp_path / "best"), "best")
        assert best["metrics"]["split"] == "valid" and "unfinished" in best["selection"]
    last = export_run(folder.uri, str(tmp_path / "last"), "last")
    assert last["epoch"] >= 1 and load_model(tmp_path / "last").classes


def test_the_last_epoch_can_be_exported_too(finished: Callable[[str], Done], tmp_path: Path) -> None:
    done = finished("aug")
    content = export_run(done.folder.uri, str(tmp_path / "last"), "last")
    assert content["epoch"] == 3 and len(content["decisions"]) == len(done.records("decision"))
    weights = load_file(tmp_path / "last" / "model.safetensors")
    assert all(weights[name].equal(value) for name, value in done.weights.items())


def test_nothing_is_overwritten(exported: str, media_run: Done, tmp_path: Path) -> None:
    before = Path(exported, "SHA256SUMS").read_bytes()
    with pytest.raises(RefusedError, match="is not empty; give another --out"):
        export_run(media_run.folder.uri, exported)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RefusedError, match="is not empty"):
        export_run(media_run.folder.uri, str(tmp_path / "file"))
    assert Path(exported, "SHA256SUMS").read_bytes() == before and (tmp_path / "file").read_text() == "mine"


def test_a_corpus_that_has_changed_is_refused(run_experiment: Callable[..., Done], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", rows={"train": 32, "valid": 8, "test": 8})
    done = run_experiment(settings(corpus, epochs=1))
    done.folder.write_json("run.json", {**done.folder.manifest, "data_fingerprint": "0" * 64})
    with pytest.raises(RefusedError, match="is not the one run"):
        export_run(done.folder.uri, str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


# --- hostile and damaged folders


@pytest.fixture
def copy(exported: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def resealed(folder: Path) -> None:
    """SHA256SUMS for the files as they are now: what somebody does who wants to be believed."""
    import hashlib

    names = read_sums((folder / "SHA256SUMS").read_text())
    (folder / "SHA256SUMS").write_text(
        sums_text({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names})
    )


def test_every_flipped_byte_is_noticed(copy: Path) -> None:
    for name in ("model.safetensors", "config.json", "README.md", "SHA256SUMS"):
        data = bytearray((copy / name).read_bytes())
        at = len(data) // 2
        data[at] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(RefusedError, match=r"SHA256SUMS"):
            load_model(copy)
        data[at] ^= 1
        (copy / name).write_bytes(data)
    assert load_model(copy).classes


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"model.safetensors is missing"):
        load_model(copy)
    with pytest.raises(DataError, match="holds no exported model"):
        load_model(copy / "nothing")


def test_a_run_folder_says_how_it_becomes_a_model(media_run: Done) -> None:
    with pytest.raises(DataError, match="is a run, not an exported model; export it: counterpoise export"):
        load_model(media_run.folder.uri)


def changed(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("model_type", to="bert"),
        changed("format", to=99),
        changed("experiment", "method", to={"name": "os.system"}),
        changed("experiment", "modalities", "image", to={"name": "torch.hub.load"}),
        changed("experiment", "modalities", "image", to={"name": "cnn", "width": 7}),
        changed("experiment", "_target_", to="os.mkdir"),
        changed("modalities", "image", "card", "kind", to="pickle"),
        changed("modalities", "image", "input", "shape", to=[1, 4, 4]),
        changed("modalities", to={}),
        changed("modalities", to=[]),
        changed("classes", to=["a"]),
    ],
)
def test_a_config_that_was_tampered_with_is_refused(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    resealed(copy)
    with pytest.raises(CounterpoiseError):
        load_model(copy)


def test_weights_that_are_a_pickle_are_refused(copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    torch.save({"weights": Evil()}, copy / "model.safetensors")
    resealed(copy)
    with pytest.raises(RefusedError, match=r"does not fit config.json"):
        load_model(copy)
    assert not canary.exists()


def test_weights_of_another_network_are_refused(copy: Path) -> None:
    save_file({"a": torch.zeros(2)}, copy / "model.safetensors")
    resealed(copy)
    with pytest.raises(RefusedError, match=r"does not fit config.json"):
        load_model(copy)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/b/c", ".hidden", "a/../b"])
def test_names_that_lead_out_of_the_folder_are_refused(copy: Path, name: str) -> None:
    text = (copy / "SHA256SUMS").read_text()
    (copy / "SHA256SUMS").write_text(text + f"{'0' * 64}  {name}\n")
    with pytest.raises(RefusedError, match="is damaged"):
        load_model(copy)


@pytest.mark.s3
def test_a_model_on_s3_is_written_and_read(bucket: str, media_run: Done, model: Model) -> None:
    export_run(media_run.folder.uri, f"{bucket}/models/one")
    again = load_model(f"{bucket}/models/one")
    assert again.classes == model.classes
    for name, value in model.net.state_dict().items():
        assert again.net.state_dict()[name].equal(value)
    files = storage.list_files(f"{bucket}/models/one")
    assert not any(SECRET.encode() in storage.read_bytes(f"{bucket}/models/one/{name}") for name in files)
    with pytest.raises(RefusedError, match="is not empty"):
        export_run(media_run.folder.uri, f"{bucket}/models/one")
