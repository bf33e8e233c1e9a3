"""Grafana's SDK, imported in one place: it warns of the classic dashboards, which every Grafana from 9 on reads."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Prefer using dashboardv2", category=DeprecationWarning)
    from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models import common as common_models
    from grafana_foundation_sdk.models import dashboard as models
    from grafana_foundation_sdk.models import prometheus as prometheus_models
    from grafana_foundation_sdk.models import units

__all__ = [
    "JSONEncoder",
    "bargauge",
    "common",
    "common_models",
    "dashboard",
    "models",
    "prometheus",
    "prometheus_models",
    "register_default_plugins",
    "stat",
    "table",
    "timeseries",
    "units",
]
