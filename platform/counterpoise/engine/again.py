"""Looking at a finished run again: its best epoch on any split, or on another corpus."""

from __future__ import annotations

from typing import Any

import torch

from counterpoise.config import parse_yaml, resolve
from counterpoise.contracts import DataError
from counterpoise.engine import checkpoint
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.evaluate import predict, prediction_columns
from counterpoise.engine.job import chosen_device, open_data
from counterpoise.engine.loop import load_model, make_method, make_network
from counterpoise.engine.probe import probe_logits, with_probes
from counterpoise.engine.run import RunFolder
from counterpoise.storage import join


def _selected(folder: RunFolder) -> checkpoint.Checkpoint:
    """The weights of the epoch that the run selected, as its last checkpoint has it.

    The newest folder in best/ may be another one: of an epoch that a crash undid and the resumed run did not select.
    """
    last = checkpoint.latest(folder.checkpoints)
    name = last.state["progress"]["best_name"] if last else ""
    best = checkpoint.load(join(folder.best, name)) if name else checkpoint.latest(folder.best)
    if best is None:
        raise DataError(f"run {folder.name} has no finished epoch yet")
    return best


def evaluate_run(
    run: str, split: str = "test", corpus: str | None = None, device: str = "auto", probe: bool = False
) -> dict[str, Any]:
    """Metrics of the selected epoch of a run on a split; predictions go to evaluation-<split>.parquet.

    corpus: another corpus that has the run's modalities and classes; default: the run's own.
    probe: also fit a linear probe to the frozen encoder of every modality, on the train split of the run's corpus.
    """
    folder = RunFolder.open(run)
    own, _ = resolve(parse_yaml(folder.experiment_text, folder.at("experiment.yaml")))
    experiment = own if corpus is None else own.model_copy(update={"corpus": corpus})
    best = _selected(folder)
    place = torch.device(chosen_device(device))
    comm = SingleComm()
    learned = folder.manifest.get("preprocessing")
    opened = [data := open_data(experiment, state=learned)]
    try:
        if not data.num_samples(split):
            raise DataError(f"corpus {experiment.corpus} has no {split} split")
        method = make_method(experiment, data, comm)
        net = make_network(experiment, data, method, pretrained=False)
        state = load_model(net, best)
        net.to(place)
        found = predict(net, method, data, split, comm, place)
        if probe or method.probe:
            if corpus is not None:
                opened.append(open_data(own, state=learned))
            probes = probe_logits(net, opened[-1], data, split, comm, place, own.seed)
            found = with_probes(found, probes, replace=method.probe)
        columns = prediction_columns(found, data, split)
        metrics = found.metrics(tuple(data.modalities))
        skipped = data.num_samples(split) - len(found.rows)
    finally:
        for source in opened:
            source.close()
    name = f"evaluation-{split}" + (f"-{data.fingerprint[:8]}" if corpus is not None else "")
    folder.write_predictions(columns, f"{name}.parquet")
    result = {
        "run": folder.name,
        "corpus": experiment.corpus,
        "split": split,
        "epoch": state["epoch"],
        "samples": len(found.rows),
        "skipped": skipped,
        **metrics,
        "data_fingerprint": data.fingerprint,
        "predictions": folder.at(f"{name}.parquet"),
    }
    folder.write_json(f"{name}.json", result)
    return result
