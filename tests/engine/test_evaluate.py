from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Done, new_folder, settings, write_corpus

from counterpoise.contracts import ConfigError, DataError, RefusedError
from counterpoise.engine import checkpoint
from counterpoise.engine.again import evaluate_run
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.evaluate import Accumulator, Predictions, at_missing_rate, predict, split_stats
from counterpoise.engine.job import open_data
from counterpoise.engine.loop import make_method, make_network
from counterpoise.engine.metrics import classification_metrics
from counterpoise.engine.probe import fit_linear

SCORES = np.array([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.2, 0.7, 0.1], [0.5, 0.1, 0.4]])
LABELS = np.array([0, 0, 1, 2])


def test_metrics_of_four_samples_by_hand() -> None:
    """Average precision of the classes 0.8333, 1 and 1; two of four right."""
    found = classification_metrics(np.log(SCORES), LABELS)
    assert found == pytest.approx({"accuracy": 0.5, "map": 0.944444, "macro_f1": 0.388889}, abs=1e-6)


def test_classes_without_samples_are_left_out_of_the_mean() -> None:
    wider = np.log(np.concatenate([SCORES, np.full((4, 1), 1e-9)], axis=1))
    assert classification_metrics(wider, LABELS)["map"] == pytest.approx(0.944444, abs=1e-6)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 30))
def test_metrics_lie_between_0_and_1_and_are_1_for_perfect_predictions(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    for logits in (rng.normal(size=(rows, 3)), 20 * np.eye(3)[labels]):
        found = classification_metrics(logits.astype(np.float32), labels)
        assert all(0 <= value <= 1 for value in found.values())
    assert found == {"accuracy": 1, "map": 1, "macro_f1": 1}


def test_table_of_metrics_has_the_gap_and_the_parts() -> None:
    logits = {"fused": np.eye(3)[LABELS], "a": np.log(SCORES), "b": np.eye(3)[[0, 0, 0, 0]], "a/first": np.log(SCORES)}
    found = Predictions(np.arange(4), LABELS, {k: v.astype(np.float32) for k, v in logits.items()}).metrics(("a", "b"))
    assert found["accuracy"] == {"fused": 1.0, "a": 0.5, "b": 0.5}
    assert found["gap"] == 0 and found["accuracy_of_part"] == {"a/first": 0.5}


def test_sums_survive_a_checkpoint_exactly() -> None:
    sums = Accumulator(torch.device("cpu"))
    logits, labels = torch.randn(7, 3), torch.randint(3, (7,))
    for _ in range(3):
        sums.add("samples", 7)
        sums.add("loss/fused", 0.1)
        sums.add_predictions({"fused": logits, "a": logits}, labels)
    again = Accumulator(torch.device("cpu"))
    again.load(sums.state())
    assert again.reduce(SingleComm()) == sums.reduce(SingleComm())
    stats = split_stats(sums.reduce(SingleComm()))
    assert stats.samples == 21 and stats.loss == pytest.approx(0.3 / 21)
    assert stats.correct["a"] == 3 * int((logits.argmax(1) == labels).sum())
    assert set(stats.scores) == {"a"} and stats.accuracy["fused"] == stats.accuracy["a"]
    assert Accumulator(torch.device("cpu")).reduce(SingleComm()) == {}


@pytest.fixture(scope="module")
def trained(run_experiment: Callable[..., Done], corpus: str) -> Done:
    return run_experiment(settings(corpus, method={"name": "aug", "hidden": 8, "check_every": 1}))


def test_a_finished_run_evaluated_again_gives_its_own_numbers(trained: Done) -> None:
    found = evaluate_run(trained.folder.uri, "test", device="cpu")
    for metric in ("accuracy", "map", "macro_f1", "gap"):
        assert found[metric] == trained.summary["test"][metric]
    assert found["epoch"] == trained.summary["selected_epoch"] and found["samples"] == 60
    valid = evaluate_run(trained.folder.uri, "valid", device="cpu")
    assert valid["accuracy"] == pytest.approx(trained.summary["valid"]["accuracy"])
    saved = trained.folder.read_predictions("evaluation-valid.parquet")
    assert len(saved["label"]) == 60 and saved["logits_fused"].shape == (60, 4)


def test_a_run_is_evaluated_on_another_corpus(trained: Done, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", rows={"train": 40, "valid": 8, "test": 20})
    found = evaluate_run(trained.folder.uri, "test", other, device="cpu")
    assert found["samples"] == 20 and found["corpus"] == other


def test_a_corpus_with_other_modalities_is_refused(trained: Done, corpus_with_media: str) -> None:
    with pytest.raises((DataError, RefusedError, ValueError), match="no modality 'weak'"):
        evaluate_run(trained.folder.uri, "test", corpus_with_media, device="cpu")


def test_an_epoch_that_a_crash_undid_is_not_evaluated(trained: Done) -> None:
    """It may still lie in best/, and be the newest there."""
    lost = {"format": 1, "epoch": 9, "architecture": trained.last.state["architecture"], "classifiers": {}}
    weights = {name: torch.zeros_like(value) for name, value in trained.weights.items()}
    checkpoint.save(trained.folder.best, "epoch-00009", {"model": weights}, lost, keep=9)
    found = evaluate_run(trained.folder.uri, "test", device="cpu")
    assert found["epoch"] == trained.summary["selected_epoch"]
    assert found["accuracy"] == trained.summary["test"]["accuracy"]


def test_a_run_without_an_epoch_cannot_be_evaluated(trained: Done, tmp_path: Path) -> None:
    folder = new_folder(tmp_path, trained.experiment, {})
    with pytest.raises(DataError, match="has no finished epoch yet"):
        evaluate_run(folder.uri, "test", device="cpu")


def test_evaluating_changes_nothing(trained: Done) -> None:
    data = open_data(trained.experiment)
    method = make_method(trained.experiment, data, SingleComm())
    net = make_network(trained.experiment, data, method)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = (predict(net, method, data, "test", SingleComm(), torch.device("cpu")) for _ in range(2))
    assert all(net.state_dict()[name].equal(value) for name, value in before.items())
    assert all((first.logits[name] == logits).all() for name, logits in second.logits.items())
    assert first.rows.tolist() == list(range(60))
    data.close()


# --- linear probes


def test_a_probe_separates_what_a_line_can_separate_and_repeats_itself() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = 3 * torch.eye(3)[labels] + 0.3 * torch.randn(90, 3, generator=rng)
    probe, again, other = (fit_linear(features, labels, 3, seed) for seed in (1, 1, 2))
    assert (probe(features).argmax(dim=1) == labels).all()
    assert probe.weight.equal(again.weight) and not probe.weight.equal(other.weight)


def test_probes_of_a_finished_run_are_parts_beside_its_own_numbers(trained: Done, tmp_path: Path) -> None:
    before = trained.weights
    result = evaluate_run(trained.folder.uri, probe=True)
    parts = result["accuracy_of_part"]
    assert {name for name in parts if name.endswith("/probe")} == {"strong/probe", "weak/probe"}
    assert parts["strong/probe"] > parts["weak/probe"] > 0.25
    assert result["accuracy"] == trained.summary["test"]["accuracy"]
    assert all(before[name].equal(value) for name, value in trained.weights.items())
    copy = write_corpus(tmp_path / "copy")
    elsewhere = evaluate_run(trained.folder.uri, corpus=copy, probe=True)
    assert elsewhere["accuracy_of_part"] == parts, "probes are fitted to the run's own train split"


def test_an_evaluation_without_a_modality_is_the_other_one_s_logits(trained: Done) -> None:
    """AUG's weights 1/2 and 1/2 are scaled up to 1: what is left is the modality's own prediction."""
    found = evaluate_run(trained.folder.uri, missing=["each"], missing_rates=[0.0, 0.5, 1.0], device="cpu")
    accuracy = found["accuracy"]
    assert found["missing"]["weak"]["accuracy"] == accuracy["strong"]
    assert found["missing"]["strong"]["accuracy"] == accuracy["weak"]
    assert found["missing_rates"]["0"]["accuracy"] == accuracy["fused"]
    columns = trained.folder.read_predictions("evaluation-test.parquet")
    np.testing.assert_allclose(columns["logits_without_weak"], columns["logits_strong"], rtol=1e-6)
    assert trained.folder.read_json("evaluation-test.json")["missing"] == found["missing"]
    again = evaluate_run(trained.folder.uri, missing_rates=[0.5], device="cpu")
    assert again["missing_rates"]["0.5"] == found["missing_rates"]["0.5"] and "missing" not in again


def test_who_lacks_a_modality_depends_on_the_sample_alone_and_grows_with_the_rate() -> None:
    ids = [f"clip-{i}" for i in range(2000)]
    complete = np.zeros((2000, 1), np.float32)
    without = {"a": np.full((2000, 1), 1, np.float32), "b": np.full((2000, 1), 2, np.float32)}
    low, high = (at_missing_rate(complete, without, ids, rate)[:, 0] for rate in (0.2, 0.5))
    assert (high[low > 0] == low[low > 0]).all()
    assert np.mean(low > 0) == pytest.approx(0.2, abs=0.03) and np.mean(high > 0) == pytest.approx(0.5, abs=0.03)
    assert np.mean(high == 1) == pytest.approx(0.25, abs=0.03)
    assert (at_missing_rate(complete[::-1], without, ids[::-1], 0.5)[::-1, 0] == high).all()
    assert not complete.any(), "what was given stays as it was"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["srong"], r"no modality 'srong', did you mean 'strong'\?; modalities: strong, weak, or each"),
        (["strong+weak"], "nothing would be left"),
    ],
)
def test_a_wrong_wish_for_missing_modalities_is_explained(trained: Done, asked: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_run(trained.folder.uri, missing=asked, device="cpu")
