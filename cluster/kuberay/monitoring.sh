#!/usr/bin/env bash
# Print what the Prometheus operator and Grafana's sidecar need to watch Ray in the namespace counterpoise: how to find
# the pods, our rules and our dashboards, as they lie in dashboards/.
#
#   cluster/kuberay/monitoring.sh [RELEASE] | kubectl apply --server-side -f -
#
# RELEASE: of the Helm chart kube-prometheus-stack, whose Prometheus picks up what has this label; "prometheus".
set -euo pipefail
release=${1:-prometheus}
here=$(cd "$(dirname "$0")" && pwd)
dashboards=$here/../../dashboards

sed "s/release: prometheus/release: $release/" "$here/podmonitor.yaml"
cat <<YAML
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: counterpoise
  namespace: counterpoise
  labels: {release: "$release"}
spec:
$(sed 's/^/  /' "$dashboards/prometheus/rules.yml")
YAML
for board in "$dashboards"/grafana/boards/*.json; do
  name=$(basename "$board" .json)
  cat <<YAML
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: counterpoise-$name
  namespace: counterpoise
  labels: {grafana_dashboard: "1"}
data:
  $name.json: |
$(sed 's/^/    /' "$board")
YAML
done
