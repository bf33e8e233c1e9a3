#!/usr/bin/env bash
# For a machine or pod that is going away with notice, as KubeRay's preStop hook or by what watches for spot notices:
#
#   cluster/leave.sh [SECONDS]
#
# On the head, commands that run as jobs get SIGTERM: they write a checkpoint and end with 75. On any other node Ray is
# told that it goes: runs write a checkpoint and move on without it. Waits until that is done, SECONDS (100) at most.
set -u
seconds=${1:-100}

drivers() { # commands of jobs that run here: Ray gives them this variable, and its own processes another name
  local process
  for process in /proc/[0-9]*; do
    if grep -qsz '^RAY_JOB_CONFIG_JSON_ENV_VAR=' "$process/environ" &&
      grep -qsz 'python' "$process/cmdline" && ! grep -qs '^ray::\|job_supervisor\|^/bin/sh\|^sh' "$process/cmdline"; then
      echo "${process#/proc/}"
    fi
  done
}

workers() { grep -qs 'ray::[R]ayTrainWorker' /proc/[0-9]*/cmdline; }

if grep -qs '/gcs/[g]cs_server' /proc/[0-9]*/cmdline; then
  found=$(drivers)
  # shellcheck disable=SC2086 # one word each
  [[ -z $found ]] || kill -TERM $found
  busy() { [[ -n $(drivers) ]]; }
else
  ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the node is going away" \
    --deadline-remaining-seconds "$seconds" || exit 1
  busy() { workers; }
fi
for ((i = 0; i < seconds; i++)); do
  busy || exit 0
  sleep 1
done
echo "still busy after $seconds s" >&2
exit 1
