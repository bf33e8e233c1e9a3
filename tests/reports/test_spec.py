from __future__ import annotations

import pytest

from counterpoise.contracts import ConfigError
from counterpoise.reports.spec import SensitivitySpec, TableSpec, TsneSpec, parse_spec


def test_without_a_specification_there_is_a_plain_table() -> None:
    assert parse_spec(None) == parse_spec({}) == TableSpec()


def test_every_kind_has_its_own_settings() -> None:
    assert isinstance(parse_spec({"kind": "sensitivity", "keys": ["method.sigma"]}), SensitivitySpec)
    assert parse_spec({"kind": "tsne", "points": 50}) == TsneSpec(kind="tsne", points=50)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "tabel"}, r"report.kind: unknown kind 'tabel', did you mean 'table'\? \(known: table, gap"),
        ({"kind": "gap", "keys": ["a"]}, r"report.keys: unknown key \(known: baseline, caption"),
        ({"kind": "sensitivity"}, r"report.keys: is missing"),
        ({"metrics": ["acuracy"]}, r"report.metrics.0: Input should be 'accuracy', .* got 'acuracy'"),
        ({"kind": "tsne", "points": 5000}, r"report.points: .* 2000, got 5000"),
        ({"published": ["aug-v3"]}, r"unknown table or paper 'aug-v3'"),
        ({"rows": {"augg": "AUG"}}, r"'augg' is no trial of this sweep, did you mean 'aug'\?"),
        ({"baseline": "naive"}, r"'naive' is no trial"),
        ({"rowz": {}}, r"report.rowz: unknown key, did you mean 'rows'\?"),
    ],
)
def test_a_wrong_specification_says_where_and_what_would_do(content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(content, ["joint", "aug"])
