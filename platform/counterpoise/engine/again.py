"""Looking at a finished run again: its best epoch on any split, or on another corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from counterpoise.config import parse_yaml, resolve
from counterpoise.contracts import ConfigError, DataError
from counterpoise.data.card import load_card
from counterpoise.engine import checkpoint
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.evaluate import at_missing_rate, predict, predict_without, prediction_columns
from counterpoise.engine.job import chosen_device, open_data
from counterpoise.engine.loop import load_model, make_method, make_network
from counterpoise.engine.memory import reuse_memory
from counterpoise.engine.metrics import classification_metrics
from counterpoise.engine.probe import probe_logits, with_probes
from counterpoise.engine.run import RunFolder
from counterpoise.storage import join
from counterpoise.wording import did_you_mean


def selected(folder: RunFolder) -> checkpoint.Checkpoint:
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
    run: str,
    split: str = "test",
    corpus: str | None = None,
    device: str = "auto",
    probe: bool = False,
    missing: Sequence[str] = (),
    missing_rates: Sequence[float] = (),
) -> dict[str, Any]:
    """Metrics of the selected epoch of a run on a split; predictions go to evaluation-<split>.parquet.

    corpus: another corpus that has the run's modalities and classes, as its card has the run's protocol, or as it is;
    default: the run's own.
    probe: also fit a linear probe to the frozen encoder of every modality, on the train split of the run's corpus.
    missing: modalities to be missing, one case each: `audio`, several at once as `audio+visual`, or `each` in turn.
    missing_rates: shares of samples that lack one modality, see `at_missing_rate`.
    """
    folder = RunFolder.open(run)
    own, _ = resolve(parse_yaml(folder.experiment_text, folder.at("experiment.yaml")))
    experiment = own
    if corpus is not None:
        protocol = own.protocol if own.protocol in load_card(corpus).protocols else None
        experiment = own.model_copy(update={"corpus": corpus, "protocol": protocol})
    best = selected(folder)
    place = torch.device(chosen_device(device))
    reuse_memory(place.type)
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
        cases = missing_cases(missing, data.modalities)
        singles = [(m,) for m in data.modalities] if missing_rates else []
        if missing_rates and len(singles) < 2:
            raise ConfigError(f"run {folder.name} has one modality, which cannot be missing")
        wanted = list(dict.fromkeys([*cases, *singles]))
        without = predict_without(net, method, data, split, comm, place, wanted) if wanted else {}
        ids = columns["sample_id"]
        metrics = found.metrics(tuple(data.modalities))
        if cases:
            tables = {name: without[name] for name in map("+".join, cases)}
            metrics["missing"] = {name: classification_metrics(z, found.labels) for name, z in tables.items()}
            columns |= {f"logits_without_{name}": z for name, z in tables.items()}
        if missing_rates:
            lacking = {m: without[m] for (m,) in singles}
            metrics["missing_rates"] = {
                f"{rate:g}": classification_metrics(
                    at_missing_rate(found.logits["fused"], lacking, ids, rate), found.labels
                )
                for rate in missing_rates
            }
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
    folder.seal_also(f"{name}.parquet", f"{name}.json")
    return result


def missing_cases(asked: Sequence[str], modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The sets of modalities that words like `audio`, `audio+visual` and `each` mean."""
    cases: list[tuple[str, ...]] = []
    for text in asked:
        if text == "each" and "each" not in modalities:
            cases += [(m,) for m in modalities]
            continue
        names = text.split("+")
        for name in names:
            if name not in modalities:
                raise ConfigError(
                    f"--missing {text}: there is no modality {name!r}{did_you_mean(name, modalities)}; "
                    f"modalities: {', '.join(modalities)}, or each"
                )
        cases.append(tuple(m for m in modalities if m in names))
    for case in cases:
        if len(case) == len(modalities):
            raise ConfigError(f"--missing {'+'.join(case)}: nothing would be left; at least one modality must be there")
    return list(dict.fromkeys(cases))
