"""`counterpoise report`: runs, comparisons and sweeps as a page, and as tables for papers.

Reports see run folders only. What needs the network again, features and missing modalities, is computed here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from counterpoise import storage
from counterpoise.cli import say
from counterpoise.contracts import ConfigError, CounterpoiseError, DataError
from counterpoise.engine.run import MANIFEST, list_runs
from counterpoise.plain import read_json
from counterpoise.reports import figures
from counterpoise.reports.curves import Picture, write_pictures
from counterpoise.reports.html import Extra, render
from counterpoise.reports.paper import (
    Groups,
    PaperTable,
    csv_form,
    grouped,
    labelled,
    latex_form,
    latex_safe,
    leaderboard,
    markdown_form,
    paper_table,
    text_form,
)
from counterpoise.reports.records import RunData, read_run
from counterpoise.reports.spec import (
    AnySpec,
    ClassifiersSpec,
    GapSpec,
    MissingSpec,
    SensitivitySpec,
    TsneSpec,
    parse_spec,
)
from counterpoise.reports.tables import markdown_safe, markdown_table, text_table
from counterpoise.storage import join
from counterpoise.wording import did_you_mean

SWEEP, COMPARISON = "sweep.json", "comparison.json"
SUFFIXES = {"html": ".html", "md": ".md", "latex": ".tex", "csv": ".csv"}


@dataclass
class Source:
    """Runs that belong together. groups: {corpus: {label: runs}}. planned: whether somebody chose the labels."""

    groups: dict[str, dict[str, list[RunData]]]
    spec: AnySpec
    title: str = ""
    planned: bool = True
    remarks: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[RunData]:
        return [run for own in self.groups.values() for group in own.values() for run in group]


# --- what there is


def read_sources(places: Sequence[str], published: Sequence[str] | None = None) -> list[Source]:
    """What the folders hold: sweeps and comparisons as they were asked for, all other runs together.

    Sweeps with the same report on other corpora become one: their tables stand beside one another.
    """
    found: list[Source] = []
    loose: list[RunData] = []
    for place in places:
        if storage.exists(join(place, SWEEP)):
            found.append(_sweep(place))
        elif storage.exists(join(place, COMPARISON)) and (source := _comparison(place)):
            found.append(source)
        elif storage.exists(join(place, MANIFEST)):
            loose.append(read_run(place))
        else:
            loose += [read_run(folder.uri) for folder in list_runs(place)] or [read_run(place)]
    if loose:
        found.append(Source(grouped(loose), parse_spec(None), planned=False))
    if published is not None:
        for source in found:
            source.spec = parse_spec(source.spec.model_dump(exclude_unset=True) | {"published": tuple(published)})
    merged: list[Source] = []
    for source in found:
        twin = next((s for s in merged if s.planned and s.spec == source.spec and not s.groups.keys() & source.groups),
                    None)  # fmt: skip
        if twin is None:
            merged.append(source)
        else:
            twin.groups |= source.groups
    return merged


def _read(place: str, name: str) -> dict[str, Any]:
    try:
        return dict(read_json(storage.read_bytes(join(place, name))))
    except (ValueError, TypeError) as error:
        raise DataError(f"{storage.show(join(place, name))} is damaged ({error}); restore it from a copy") from error


def _sweep(place: str) -> Source:
    """A sweep's runs by what they vary. Trials that have not begun are there without a result."""
    from counterpoise.sweepfile import label_of

    content = _read(place, SWEEP)
    there = set(storage.list_names(place))  # names in a file are no paths
    own: dict[str, list[RunData]] = {}
    for trial in content.get("trials") or []:
        name = str(trial.get("name"))
        begun = name in there and storage.exists(join(place, name, MANIFEST))
        run = read_run(join(place, name)) if begun else RunData(join(place, name), manifest={"run": name})
        if trial.get("state") == "stopped":  # by a scheduler, so that its numbers are of fewer epochs
            run.summary = None
        if not run.finished and trial.get("state"):
            run.status = {"error": trial.get("error"), **run.status, "state": trial["state"]}
        own.setdefault(label_of(trial.get("vary") or {}) or "all", []).append(run)
    spec = parse_spec(content.get("report"), own, f"{storage.show(join(place, SWEEP))}: report")
    return Source(_by_corpus(own), spec, str(content.get("title") or ""))


def _comparison(place: str) -> Source | None:
    """A comparison's runs by method; None before there is a result."""
    result = _read(place, COMPARISON).get("result")
    if not result:
        return None
    there = set(storage.list_names(place))
    own = {
        str(row["label"]): [
            read_run(join(place, name)) for name in [*row["runs"], *row.get("failed", {})] if name in there
        ]
        for row in result["methods"]
    }
    return Source(_by_corpus(own), parse_spec({"baseline": result.get("reference")}, own, COMPARISON))


def _by_corpus(own: Mapping[str, Sequence[RunData]]) -> dict[str, dict[str, list[RunData]]]:
    """Groups by corpus; runs that have not begun are where the first other is."""
    runs = [run for group in own.values() for run in group]
    usual = next((run.corpus for run in runs if run.start), "?")
    found: dict[str, dict[str, list[RunData]]] = {}
    for label, group in own.items():
        for run in group:
            found.setdefault(run.corpus if run.start else usual, {}).setdefault(label, []).append(run)
    return found


# --- what is to be computed


def _split(run: RunData) -> str:
    return next((split for split in ("test", "valid", "train") if (run.summary or {}).get(split)), "test")


def add_missing(source: Source, spec: MissingSpec, device: str) -> None:
    """Put fused accuracies under missing modalities into the results of finished runs; saved ones are taken."""
    from counterpoise.engine.again import evaluate_run

    for run in source.runs:
        if not run.finished or len(run.modalities) < 2:
            continue
        split = _split(run)
        place = join(run.uri, f"evaluation-{split}.json")
        try:
            saved = read_json(storage.read_bytes(place)) if storage.exists(place) else {}
            rates, cases = set(saved.get("missing_rates", {})), set(saved.get("missing", {}))
            if not ({f"{rate:g}" for rate in spec.rates} <= rates and set(run.modalities) <= cases):
                say(f"evaluating  {run.name} with missing modalities")
                probed = any(name.endswith("/probe") for name in saved.get("accuracy_of_part", {}))
                saved = evaluate_run(
                    run.uri,
                    split,
                    device=device,
                    probe=probed,
                    missing=sorted({*run.modalities, *cases}),
                    missing_rates=sorted({*spec.rates, *map(float, rates)}),
                )
        except (CounterpoiseError, ValueError) as error:
            source.remarks.append(f"{run.name}: no numbers under missing modalities: {error}")
            continue
        assert run.summary is not None
        run.summary = run.summary | {split: run.summary[split] | {k: saved[k] for k in ("missing", "missing_rates")}}


def tsne(source: Source, groups: Mapping[str, Sequence[RunData]], spec: TsneSpec, device: str) -> Picture | None:
    """Features of one run per label on the plane: of the first seed."""
    import numpy as np

    found: list[figures.Plane] = []
    classes: tuple[str, ...] = ()
    for label, group in groups.items():
        finished = sorted((run for run in group if run.finished), key=lambda run: run.seed or 0)
        if not finished:
            continue
        say(f"encoding    {finished[0].name}: {spec.points} samples, then t-SNE")
        try:
            from counterpoise.engine.features import encode_run

            encoded = encode_run(finished[0].uri, _split(finished[0]), spec.points, spec.seed, device)
        except CounterpoiseError as error:
            source.remarks.append(f"{finished[0].name}: no picture of its features: {error}")
            continue
        classes = encoded.classes
        for name, features in encoded.features.items():
            plane = on_plane(features, spec)
            found.append(figures.Plane(spec.rows.get(label, label), name, plane, np.asarray(encoded.labels)))
    return figures.planes(found, classes)


def on_plane(features: Any, spec: TsneSpec) -> Any:
    """Features [N, D] as points [N, 2] by t-SNE, a pure function of its arguments."""
    from sklearn.manifold import TSNE

    perplexity = min(spec.perplexity, max(1.0, (len(features) - 1) / 3))
    flat = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=spec.seed)
    return flat.fit_transform(features)


def own_pictures(source: Source, device: str) -> list[Picture]:
    """The pictures that the source's report asks for, one set per corpus."""
    found: list[Picture] = []
    for corpus, groups in source.groups.items():
        spec, picture = source.spec, None
        if isinstance(spec, SensitivitySpec):
            picture = figures.sensitivity(groups, spec)
        elif isinstance(spec, ClassifiersSpec):
            picture = figures.classifiers(groups, spec)
        elif isinstance(spec, MissingSpec):
            picture = figures.missing(groups, spec)
        elif isinstance(spec, TsneSpec):
            picture = tsne(source, groups, spec, device)
        if picture is not None and len(source.groups) > 1:
            suffix = "".join(c if c.isalnum() else "-" for c in corpus)
            picture = replace(picture, name=f"{picture.name}-{suffix}", title=f"{picture.title}, {corpus}")
        if picture is not None:
            found.append(picture)
    return found


# --- the report


def check_formats(text: str | None, out: str | None) -> list[str]:
    """The formats of --format, or the one that the name of --out asks for."""
    if text is None:
        suffix = PurePosixPath(out or "").suffix.lower()
        return [next((form for form, own in SUFFIXES.items() if own == suffix), "html")]
    forms = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    known = {"tex": "latex", "markdown": "md"}
    forms = [known.get(form, form) for form in forms]
    for form in forms:
        if form not in SUFFIXES:
            raise ConfigError(f"--format {form!r}{did_you_mean(form, SUFFIXES)}; choose {', '.join(SUFFIXES)}")
    if not forms:
        raise ConfigError(f"--format: name one or more of {', '.join(SUFFIXES)}")
    return forms


def write(
    places: Sequence[str],
    *,
    formats: Sequence[str] = ("html",),
    out: str | None = None,
    pictures: str | None = None,
    title: str | None = None,
    published: Sequence[str] | None = None,
    device: str = "auto",
    show: bool = True,
) -> list[str]:
    """Print the tables, unless not to show them, and write the report in every format; the paths written.

    out: of the first format; the others lie beside it under the same name. pictures: folder for pictures as files.
    """
    sources = read_sources(places, published)
    for source in sources:
        if isinstance(source.spec, MissingSpec):
            add_missing(source, source.spec, device)
    papers = [paper_table(source.groups, source.spec) for source in sources]
    if show:
        tables = [text_form(p) if s.planned else text_table(s.runs) for s, p in zip(sources, papers, strict=True)]
        print("\n\n".join(tables))
    title = title or next((source.title for source in sources if source.title), None)
    extra = Extra(
        papers,
        _curves(sources),
        [picture for source in sources for picture in own_pictures(source, device)],
        [remark for source in sources for remark in source.remarks],
        ("gap", "learning") if any(isinstance(source.spec, GapSpec) for source in sources) else (),
    )
    for remark in extra.remarks:
        say(remark)
    paths = []
    drawn = extra.all_pictures() if pictures else []
    saved = write_pictures(drawn, pictures) if pictures else []
    stem = _stem(out)
    for i, form in enumerate(formats):
        path = out if out and i == 0 else stem + SUFFIXES[form]
        if form == "html":
            runs = [run for source in sources for run in source.runs]
            text = render(runs, path, title, extra=extra)
        elif form == "md":
            text = _markdown(papers, extra, drawn, pictures, path, title)
        elif form == "latex":
            text = _latex(papers, drawn, pictures, path)
        else:
            text = "\n".join(map(csv_form, papers))
        storage.write_bytes(path, text.encode())
        say(f"report in {storage.show(path)}")
        paths.append(path)
    for path in saved:
        say(f"picture in {storage.show(path)}")
    return [*paths, *saved]


def _stem(out: str | None) -> str:
    path = out or "report"
    suffix = PurePosixPath(path).suffix
    return path.removesuffix(suffix) if suffix in SUFFIXES.values() else path


def _curves(sources: Sequence[Source]) -> dict[str, Sequence[RunData]]:
    """Runs by label over all sources; labels that two sources share are told apart by their corpus."""
    found: dict[str, Sequence[RunData]] = {}
    for source in sources:
        own: Groups = source.groups
        for name, runs in labelled(own).items():
            corpus, label = next(iter(own)), source.spec.rows.get(name, name)
            found[label if label not in found else f"{label} ({corpus}, {len(found)})"] = runs
    return found


def _beside(pictures: str, path: str, name: str) -> str:
    """The place of a picture as seen from the report, or its full place where there is no such way."""
    import os

    if storage.is_local(pictures) and storage.is_local(path):
        folder = os.path.dirname(os.path.abspath(storage.local_path(path)))
        return os.path.relpath(os.path.join(storage.local_path(pictures), name), folder)
    return join(pictures, name)


def _markdown(
    papers: Sequence[PaperTable],
    extra: Extra,
    drawn: Sequence[Picture],
    pictures: str | None,
    path: str,
    title: str | None,
) -> str:
    parts = [f"# {markdown_safe(title or papers[0].caption)}", *map(markdown_form, papers)]
    parts += ["## Leaderboard", markdown_table(leaderboard(papers))]
    for picture in drawn:
        assert pictures is not None
        place = _beside(pictures, path, f"{picture.name}.png").replace(" ", "%20")
        parts.append(f"## {picture.title}\n\n![{markdown_safe(picture.title)}]({place})\n\n{picture.caption}")
    if extra.remarks:
        parts.append("\n".join(["## Left out", "", *(f"- {markdown_safe(remark)}" for remark in extra.remarks)]))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _latex(papers: Sequence[PaperTable], drawn: Sequence[Picture], pictures: str | None, path: str) -> str:
    parts = list(map(latex_form, papers))
    for picture in drawn:
        assert pictures is not None
        place = _beside(pictures, path, f"{picture.name}.pdf")
        parts.append(
            "% needs \\usepackage{graphicx}\n\\begin{figure}[t]\n\\centering\n"
            f"\\includegraphics[width=\\linewidth]{{{place}}}\n"
            f"\\caption{{{latex_safe(f'{picture.title}. {picture.caption}')}}}\n\\label{{fig:{picture.name}}}\n"
            "\\end{figure}\n"
        )
    return "\n".join(parts)
