#!/usr/bin/env bash
# Make the secrets of compose.yaml, each in a file of its own that only you can read: cluster/secrets.sh [FOLDER]
set -euo pipefail
umask 077
folder=${1:-$(dirname "$0")/secrets}
mkdir "$folder" || { echo "they are there already; remove the folder to make new ones" >&2; exit 6; }
word() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
key=$(word 10) secret=$(word 24)
word 32 >"$folder/ray_token"
word 16 >"$folder/grafana_password"
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$key" "$secret" >"$folder/s3_credentials"
printf '{"identities": [{"name": "ray", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin"]}]}\n' \
  "$key" "$secret" >"$folder/s3_identities.json"
echo "made $folder/{ray_token,grafana_password,s3_credentials,s3_identities.json}"
