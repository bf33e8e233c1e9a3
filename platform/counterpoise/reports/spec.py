"""What the report of a sweep is to show: the mapping under `report:` of a sweep file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from counterpoise.contracts import ConfigError
from counterpoise.reports.published import chosen_tables
from counterpoise.wording import did_you_mean

Metric = Literal["accuracy", "map", "macro_f1"]


class Spec(BaseModel):
    """What every kind of report has: the table in the papers' form."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    caption: str = Field("", description="of the table, in LaTeX and on the page")
    metrics: tuple[Metric, ...] = Field(("accuracy",), min_length=1, description="groups of columns")
    modalities: bool = Field(True, description="columns of single modalities, beside all of them together")
    rows: dict[str, str] = Field({}, description="{label of a trial: heading of its row}; others keep their label")
    baseline: str | None = Field(
        None, description="label that the others are tested against; default: joint if there, else the first"
    )
    published: tuple[str, ...] | None = Field(
        None, description="papers or tables of published.yaml to show beside ours; default: AUG's main results"
    )


class TableSpec(Spec):
    kind: Literal["table"] = "table"


class GapSpec(Spec):
    """The gap between modalities and fused accuracy over epochs, one curve per method."""

    kind: Literal["gap"]


class SensitivitySpec(Spec):
    """Accuracy over the values of settings, one panel per key; runs that agree in all others form a line."""

    kind: Literal["sensitivity"]
    keys: tuple[str, ...] = Field(min_length=1, description="dotted keys of the experiment, e.g. method.sigma")


class ClassifiersSpec(Spec):
    """Per modality the accuracy of the first classifier, of all but the newest, and of all, with their number."""

    kind: Literal["classifiers"]


class TsneSpec(Spec):
    """Features of every modality on the plane by t-SNE, coloured by class; a run of the first seed per method."""

    kind: Literal["tsne"]
    points: int = Field(600, ge=10, le=2000, description="test samples that are drawn, the same for every run")
    perplexity: float = Field(30.0, gt=1)
    seed: int = Field(0, ge=0, description="of the choice of samples and of t-SNE")


class MissingSpec(Spec):
    """Fused accuracy while modalities are missing: one from a share of the samples, and one from all of them."""

    kind: Literal["missing"]
    rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.2, 0.5), description="shares of samples that lack one"
    )


AnySpec = TableSpec | GapSpec | SensitivitySpec | ClassifiersSpec | TsneSpec | MissingSpec
_KINDS: dict[str, type[Spec]] = {get_args(t.model_fields["kind"].annotation)[0]: t for t in get_args(AnySpec)}
_adapter: TypeAdapter[AnySpec] = TypeAdapter(Annotated[AnySpec, Field(discriminator="kind")])


def parse_spec(
    content: Mapping[str, Any] | None, labels: Iterable[str] | None = None, source: str = "report"
) -> AnySpec:
    """The checked content of `report:`; without any, a plain table.

    labels: of the trials, which `rows` and `baseline` must be among; None: not checked.
    """
    content = {"kind": "table", **(content or {})}
    if content["kind"] not in _KINDS:
        kind = content["kind"]
        raise ConfigError(
            f"{source}.kind: unknown kind {kind!r}{did_you_mean(kind, _KINDS)} (known: {', '.join(_KINDS)})"
        )
    try:
        spec = _adapter.validate_python(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(problem, content["kind"], source) for problem in error.errors())) from None
    chosen_tables(spec.published)
    if labels is not None:
        known = list(labels)
        for label in [*spec.rows, *([spec.baseline] if spec.baseline else [])]:
            if label not in known:
                raise ConfigError(
                    f"{source}: {label!r} is no trial of this sweep{did_you_mean(label, known)} (known: "
                    f"{', '.join(known)})"
                )
    return spec


def _line(problem: Any, kind: str, source: str) -> str:
    where = [str(part) for part in problem["loc"][1:]]
    text = f"{problem['msg']}, got {problem['input']!r}"
    if problem["type"] == "extra_forbidden":
        known = sorted(_KINDS[kind].model_fields)
        text = f"unknown key{did_you_mean(where[-1], known)} (known: {', '.join(known)})"
    elif problem["type"] == "missing":
        text = "is missing"
    return f"{'.'.join([source, *where])}: {text}"
