"""Predictions for files: the same numbers as the run's, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.cases import SMALL
from tests.conftest import Done, make_rows, settings

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, Interrupted, RefusedError
from counterpoise.data.shards import write_shards
from counterpoise.engine import bulk
from counterpoise.engine.bulk import predict_files
from counterpoise.engine.export import export_run


@pytest.fixture(scope="module")
def run(run_experiment: Callable[..., Done], corpus: str) -> Done:
    return run_experiment(settings(corpus, method=SMALL["aug"]))


@pytest.fixture(scope="module")
def model(run: Done, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("models") / "aug")
    export_run(run.folder.uri, place)
    return place


@pytest.fixture
def parts_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PART_ROWS", 16)


def table(out: Path | str) -> dict[str, Any]:
    return pq.read_table(f"{out}/predictions").to_pydict()


def write_files(folder: Path, rows: list[dict[str, Any]], shards: int = 2) -> str:
    write_shards(rows, str(folder), "some", num_shards=shards, row_group_size=8)
    return str(folder)


def test_a_corpus_gets_the_run_s_own_predictions(run: Done, model: str, corpus: str, tmp_path: Path) -> None:
    found = predict_files(model, corpus, str(tmp_path / "out"), device="cpu")
    written, said = run.folder.read_predictions(), table(tmp_path / "out")
    assert said["sample_id"] == written["sample_id"].tolist() and said["prediction"] == written["prediction"].tolist()
    for name in ("fused", "strong", "weak"):
        expected = torch.softmax(torch.tensor(written[f"logits_{name}"]), dim=1).numpy()
        np.testing.assert_allclose(said[f"probabilities_{name}"], expected, atol=2e-6)
    assert found["accuracy"] == run.summary["test"]["accuracy"] and found["bad"] == 0
    assert said["class"][0] == ("flute", "oboe", "horn", "harp")[said["prediction"][0]]


def test_everything_written_has_a_checksum(model: str, corpus: str, tmp_path: Path, parts_of_16: None) -> None:
    predict_files(model, corpus, str(tmp_path), device="cpu")
    lines = dict(reversed(line.split("  ")) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "predictions").iterdir()}
    assert len(files) == 4 and set(lines) == files | {"ledger.jsonl", "summary.json"}
    for name, digest in lines.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_plain_files_without_labels_or_ids_will_do(model: str, tmp_path: Path) -> None:
    rows = [{m: row[m] for m in ("strong", "weak")} for row in make_rows("test", 20, ["strong", "weak"])]
    folder = write_files(tmp_path / "files", rows)
    found = predict_files(model, folder, str(tmp_path / "out"), device="cpu")
    said = table(tmp_path / "out")
    assert found["predicted"] == 20 and found["accuracy"] is None and "label" not in said
    assert said["sample_id"][:2] == ["some-00000-of-00002/0", "some-00000-of-00002/1"]
    one = predict_files(model, f"{folder}/some-00001-of-00002.parquet", str(tmp_path / "one"), device="cpu")
    assert one["predicted"] == 10 and table(tmp_path / "one")["prediction"] == said["prediction"][10:]


def test_labels_count_where_they_are_classes_of_the_model(model: str, tmp_path: Path) -> None:
    rows = make_rows("test", 20, ["strong", "weak"])
    whole = predict_files(model, write_files(tmp_path / "a", rows), str(tmp_path / "out-a"), device="cpu")
    right = [p == row["label"] for p, row in zip(table(tmp_path / "out-a")["prediction"], rows, strict=True)]
    assert whole["labelled"] == 20 and whole["accuracy"]["fused"] == pytest.approx(np.mean(right))
    for row in rows[:5]:
        row["label"] = 77
    part = predict_files(model, write_files(tmp_path / "b", rows), str(tmp_path / "out-b"), device="cpu")
    assert part["labelled"] == 15 and part["accuracy"]["fused"] == pytest.approx(np.mean(right[5:]))
    assert "5 rows have a label that is no class" in part["note"]
    assert table(tmp_path / "out-b")["label"][:6] == [None] * 5 + [rows[5]["label"]]


def test_a_row_that_cannot_be_decoded_is_in_the_ledger(model: str, tmp_path: Path) -> None:
    rows = make_rows("test", 20, ["strong", "weak"])
    rows[7]["weak"] = [1.0, 2.0]
    rows[9]["strong"] = [float("nan")] * 12
    found = predict_files(model, write_files(tmp_path / "files", rows), str(tmp_path / "out"), device="cpu")
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [(row["sample_id"], row["modality"]) for row in ledger] == [("test-0007", "weak"), ("test-0009", "strong")]
    assert ledger[0]["reason"] == "2 numbers instead of 12" and ledger[0]["row"] == 7
    assert found["predicted"] == 18 and found["bad"] == 2 and len(table(tmp_path / "out")["label"]) == 18


def test_a_part_without_a_single_good_row_is_written_all_the_same(
    model: str, tmp_path: Path, parts_of_16: None
) -> None:
    rows = make_rows("test", 20, ["strong", "weak"])
    for row in rows[:16]:
        row["weak"] = [1.0]
    found = predict_files(model, write_files(tmp_path / "files", rows), str(tmp_path / "out"), device="cpu")
    assert found["bad"] == 16 and len(table(tmp_path / "out")["prediction"]) == 4


def test_a_missing_modality_needs_no_column(model: str, corpus: str, tmp_path: Path) -> None:
    rows = [{m: row[m] for m in ("key", "label", "strong")} for row in make_rows("test", 60, ["strong", "weak"])]
    folder = write_files(tmp_path / "files", rows)
    with pytest.raises(DataError, match="has no column 'weak'"):
        predict_files(model, folder, str(tmp_path / "refused"), device="cpu")
    found = predict_files(model, folder, str(tmp_path / "out"), missing=["weak"], device="cpu")
    said = table(tmp_path / "out")
    assert "probabilities_weak" not in said and said["probabilities_fused"] == said["probabilities_strong"]
    both = predict_files(model, corpus, str(tmp_path / "both"), device="cpu")
    assert found["accuracy"]["strong"] == both["accuracy"]["strong"]
    with pytest.raises(ConfigError, match="nothing would be left"):
        predict_files(model, folder, str(tmp_path / "none"), missing=["weak", "strong"], device="cpu")


def test_after_a_stop_the_same_command_goes_on_to_the_same_bytes(
    model: str, corpus: str, tmp_path: Path, parts_of_16: None
) -> None:
    predict_files(model, corpus, str(tmp_path / "whole"), device="cpu")
    asked = iter([None] * 3 + ["SIGINT"] * 99)
    with pytest.raises(Interrupted, match=r"stopped \(SIGINT\) after . of 4 parts; the same command goes on"):
        predict_files(model, corpus, str(tmp_path / "out"), device="cpu", stop=lambda: next(asked))
    kept = sorted(p.name for p in (tmp_path / "out" / "parts").iterdir())
    assert 0 < len(kept) < 4 and not (tmp_path / "out" / "SHA256SUMS").exists()
    found = predict_files(model, corpus, str(tmp_path / "out"), device="cpu")
    assert found["computed"] == 60 - 16 * len(kept)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()
    again = predict_files(model, corpus, str(tmp_path / "out"), device="cpu")
    assert again["computed"] == 0 and again["accuracy"] == found["accuracy"]


def test_a_damaged_part_is_made_again(model: str, corpus: str, tmp_path: Path, parts_of_16: None) -> None:
    predict_files(model, corpus, str(tmp_path), device="cpu")
    place = tmp_path / "predictions" / "part-00002.parquet"
    before = place.read_bytes()
    place.write_bytes(before[:-9])
    assert predict_files(model, corpus, str(tmp_path), device="cpu")["computed"] == 16
    assert place.read_bytes() == before


def test_other_requests_and_other_folders_are_refused(
    model: str, corpus: str, tmp_path: Path, parts_of_16: None
) -> None:
    predict_files(model, corpus, str(tmp_path / "out"), device="cpu")
    with pytest.raises(RefusedError, match=r"another request \(batch_size differ\)"):
        predict_files(model, corpus, str(tmp_path / "out"), batch_size=7, device="cpu")
    with pytest.raises(RefusedError, match="another request"):
        predict_files(model, corpus, str(tmp_path / "out"), split="valid", device="cpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(RefusedError, match="holds no predictions"):
        predict_files(model, corpus, str(tmp_path / "mine"), device="cpu")


def test_data_that_does_not_fit_is_explained(model: str, corpus_with_media: str, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus instruments has no modality weak, .* say --missing weak"):
        predict_files(model, corpus_with_media, str(tmp_path / "out"), device="cpu")
    with pytest.raises(DataError, match=r"no corpus .* and no .parquet file"):
        predict_files(model, str(tmp_path), str(tmp_path / "out"), device="cpu")
    other = Path(shutil.copytree(corpus, tmp_path / "other"))
    card = (other / "corpus.yaml").read_text().replace("- flute", "- flauto")
    (other / "corpus.yaml").write_text(card)
    found = predict_files(model, str(other), str(tmp_path / "out"), device="cpu")
    assert found["accuracy"] is None and "has other classes than the model" in found["note"]


@pytest.mark.s3
def test_model_data_and_predictions_may_lie_on_s3(bucket: str, model: str, corpus: str, tmp_path: Path) -> None:
    for folder, place in ((model, "model"), (corpus, "corpus")):
        for name in storage.list_files(folder):
            storage.write_bytes(f"{bucket}/{place}/{name}", storage.read_bytes(f"{folder}/{name}"))
    found = predict_files(f"{bucket}/model", f"{bucket}/corpus", f"{bucket}/out", device="cpu")
    predict_files(model, corpus, str(tmp_path), device="cpu")
    there = storage.read_bytes(f"{bucket}/out/predictions/part-00000.parquet")
    assert there == (tmp_path / "predictions" / "part-00000.parquet").read_bytes() and found["predicted"] == 60
    plain = predict_files(model, f"{bucket}/corpus/test-*.parquet", f"{bucket}/plain", device="cpu")
    assert plain["accuracy"] == found["accuracy"]
