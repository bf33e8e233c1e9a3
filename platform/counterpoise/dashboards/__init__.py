"""Dashboards and alert rules as code: built from the catalogue of metrics, checked, pushed to Grafana, previewed."""
