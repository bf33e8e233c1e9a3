"""Counterpoise from Python: train, look at runs as tables, load models. What `import counterpoise` offers.

from counterpoise import load_runs, train
run = train("trainables/experiments/av_digits.yaml", sets=["method.name=aug", "epochs=5"])
run.summary["test"]["accuracy"], run.records(), load_runs("runs")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from counterpoise import storage
from counterpoise.config import Experiment, known_method, read_yaml, resolve
from counterpoise.contracts import ConfigError, DataError
from counterpoise.methods import METHODS
from counterpoise.methods.describe import describe
from counterpoise.reports.records import RunData, read_run

if TYPE_CHECKING:
    import pandas as pd

    from counterpoise.engine.inference import Model

Source = Mapping[str, Any] | Experiment | str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """A run folder, of whatever state. `read` looks again; everything else is as of then."""

    uri: str

    def __post_init__(self) -> None:
        read_run(self.uri)  # an error now rather than at first use

    @property
    def name(self) -> str:
        return self.read().name

    def read(self) -> RunData:
        """All that the folder says."""
        return read_run(self.uri)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json: results at the selected epoch. None for a run that is not finished."""
        return self.read().summary

    @property
    def state(self) -> str:
        """created, running, interrupted, failed or finished."""
        from counterpoise.engine.run import RunFolder

        return RunFolder.open(self.uri).state()

    def records(self) -> pd.DataFrame:
        """One row per epoch, see `load_records`."""
        return load_records(self.uri)

    def predictions(self) -> pd.DataFrame:
        """One row per tested sample: sample_id, label, prediction, and logits (arrays [K]) of all and each modality."""
        import pandas as pd

        from counterpoise.engine.run import RunFolder

        columns = RunFolder.open(self.uri).read_predictions()
        return pd.DataFrame({key: list(column) for key, column in columns.items()})

    def export(self, out: str, epoch: Literal["best", "last"] | None = None) -> str:
        """Write the model, as `counterpoise export` does; `out`."""
        from counterpoise.engine.export import export_run

        export_run(self.uri, out, epoch)
        return out


def experiment(source: Source, sets: Sequence[str] = ()) -> Experiment:
    """The resolved experiment of a file, a mapping or an experiment, with `sets` (`"a.b=value"`) applied.

    ConfigError says all that is wrong with it, with the nearest known key.
    """
    return _resolved(source, sets)[0]


def _resolved(source: Source, sets: Sequence[str]) -> tuple[Experiment, dict[str, dict[str, Any]]]:
    if isinstance(source, Experiment):
        return resolve(source.to_json(), sets, "experiment")
    if isinstance(source, Mapping):
        return resolve(copy.deepcopy(dict(source)), sets, "experiment")
    return resolve(read_yaml(os.fspath(source)), sets, os.fspath(source))


def train(
    source: Source,
    sets: Sequence[str] = (),
    *,
    runs: str = "runs",
    name: str | None = None,
    resume: bool = False,
    device: str = "auto",
    threads: int | None = None,
    track: Sequence[str] = (),
    show: bool = False,
) -> Run:
    """Train and test in this process; the finished run.

    resume: go on with the run `name` from its last checkpoint; `source` is then compared with its own experiment, and
    a difference is refused. show: print epochs and decisions to standard error, as the command does.

    Ctrl-C (or the stop button of a notebook) writes a checkpoint and raises Interrupted: the same call with
    resume=True goes on, to the same bits. Errors are those of the command line, and all are CounterpoiseError.
    """
    from counterpoise.start import Settings, check_same_data, make_job, new_run, preview, reopen, run_jobs
    from counterpoise.telemetry.track import chosen

    # A process that is not ours is not ended, whatever hangs in it.
    settings = Settings(device=device, threads=threads, track=chosen(track), hang_s=None)
    resolved, provenance = _resolved(source, sets)
    if resume:
        if name is None:
            raise ConfigError("resume=True needs the name of the run to continue")
        folder, resolved, _ = reopen(runs, name, resolved.to_json(), name, [], [])
        seen = preview(resolved, settings)
        check_same_data(folder, seen)
    else:
        seen = preview(resolved, settings)
        folder = new_run(seen, provenance, runs, name, ["counterpoise.train"])
    run_jobs([make_job(seen, folder, resume)], seen.settings, show=show)
    return Run(folder.uri)


def load_run(place: str | os.PathLike[str]) -> Run:
    """A run by its folder, local or s3://; DataError if it is none."""
    return Run(os.fspath(place))


def load_runs(place: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "runs") -> pd.DataFrame:
    """One row per run of a folder of runs (looked for two levels deep, as comparisons keep theirs), or of those given.

    Columns: run, method, corpus, protocol, seed, state, epochs, selected_epoch, split (the one tested), samples,
    accuracy/<fused or modality>, map/<..>, macro_f1/<..>, gap, valid/accuracy/<..> (at the selected epoch),
    classifiers/<modality>, parameters, wall_s, samples_per_s, digest, group (digest without the seed), folder, and
    the settings in which the runs differ. What a run does not have is NaN or None.
    """
    import pandas as pd

    places = [place] if isinstance(place, str | os.PathLike) else list(place)
    found = [read_run(uri) for root in places for uri in _run_folders(os.fspath(root))]
    settings = [run.settings for run in found]
    keys = sorted({key for tree in settings for key in tree})
    varied = [key for key in keys if len({repr(tree.get(key)) for tree in settings}) > 1]
    rows = [
        _row(run) | {key: tree.get(key) for key in varied if key not in ("corpus", "protocol")}
        for run, tree in zip(found, settings, strict=True)
    ]
    fixed = ["run", "method", "corpus", "protocol", "seed", "state"]
    return pd.DataFrame(rows, columns=list(dict.fromkeys([*fixed, *(key for row in rows for key in row)])))


def _run_folders(root: str) -> list[str]:
    from counterpoise.engine.run import list_runs

    if storage.exists(storage.join(root, "run.json")):
        return [root]
    found = [folder.uri for folder in list_runs(root)]
    for name in storage.list_names(root):
        below = storage.join(root, name)
        if not name.startswith(".") and below not in found:
            is_folder = not storage.is_local(below) or os.path.isdir(storage.local_path(below))
            found += [folder.uri for folder in list_runs(below)] if is_folder else []
    if not found:
        raise DataError(f"{storage.show(root)} holds no run; give a run folder, or the folder that --runs named")
    return found


def _row(run: RunData) -> dict[str, Any]:
    summary = run.summary or {}
    tested = next((split for split in ("test", "valid", "train") if "samples" in (summary.get(split) or {})), None)
    row: dict[str, Any] = {
        "run": run.name,
        "method": run.method,
        "corpus": run.corpus,
        "protocol": run.settings.get("protocol"),
        "seed": run.seed,
        "state": Run(run.uri).state,
        "epochs": run.num_epochs,
        "selected_epoch": summary.get("selected_epoch"),
        "split": tested,
        "samples": None,
    }
    if tested:
        numbers = summary[tested]
        row |= {"samples": numbers["samples"], "gap": numbers.get("gap")}
        for metric in ("accuracy", "map", "macro_f1"):
            row |= {f"{metric}/{name}": value for name, value in (numbers.get(metric) or {}).items()}
    valid = (summary.get("valid") or {}).get("accuracy") or {}
    row |= {f"valid/accuracy/{name}": value for name, value in valid.items()}
    row |= {f"classifiers/{name}": count for name, count in (summary.get("classifiers") or {}).items()}
    row |= {key: summary.get(key) for key in ("parameters", "wall_s", "samples_per_s", "digest", "group")}
    return row | {"folder": storage.show(run.uri)}


def load_records(run: Run | str | os.PathLike[str]) -> pd.DataFrame:
    """One row per epoch of a run, indexed by epoch.

    Columns: stage, best_epoch, every number by the name it has in trackers (valid/accuracy/audio, train/losses/fused,
    gap, lr, classifiers/visual, ...), and decision: what was decided after it, in a line.
    """
    import pandas as pd

    from counterpoise.telemetry.display import decision_line
    from counterpoise.telemetry.track import epoch_numbers

    read = read_run(run.uri if isinstance(run, Run) else os.fspath(run))
    decided = {record["epoch"]: decision_line(record) for record in read.decisions}
    rows = [
        {"epoch": record["epoch"], "stage": record.get("stage"), "best_epoch": record.get("best_epoch")}
        | epoch_numbers(record)
        | {"decision": decided.get(record["epoch"])}
        for record in read.epochs
    ]
    columns = list(dict.fromkeys(["epoch", "stage", "best_epoch", *(key for row in rows for key in row)]))
    return pd.DataFrame(rows, columns=columns).set_index("epoch")


def load_model(place: str | os.PathLike[str], device: str = "cpu") -> Model:
    """The model that `counterpoise export` or `Run.export` wrote; see `counterpoise.engine.inference.load_model`."""
    from counterpoise.engine.inference import load_model as load

    return load(place, device)


def formulas(method: str) -> str:
    """What `counterpoise methods show` prints: formula, departures from paper and code, settings and their source."""
    return describe(method, known_method(method))


def list_methods() -> pd.DataFrame:
    """The methods, indexed by name: summary, paper, and where a modality's predictions come from."""
    import pandas as pd

    rows = [
        {
            "name": name,
            "summary": (method.__doc__ or "").splitlines()[0],
            "paper": method.paper,
            "modality_predictions": method.modality_predictions,
        }
        for name, method in METHODS.items()
    ]
    return pd.DataFrame(rows).set_index("name")
