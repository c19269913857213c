#!/bin/bash
# One process a host, which drives all of its GPUs. From the project's folder, with the same path on
# every host of the file HOSTS (a line for each):
#   docs/clusters/openmpi.sh HOSTS --config configs/model5.yaml
# A run that loses a host is started again, ten times at most, and goes on from its last checkpoint.
# SIGTERM or Ctrl-C to this script: every process saves and ends.

python=${PYTHON:-.venv/bin/python}
hosts=$1
shift

stopped=
trap 'stopped=yes; kill -TERM $mpirun' TERM INT HUP

for attempt in {0..10}; do
    if [ "$attempt" -gt 0 ]; then
        sleep "${RETRY_SECONDS:-30}" # a host that was lost comes back
    fi
    # Without the long timeout mpirun kills with SIGKILL a second after SIGTERM; in a session of its
    # own it gets the signal once, from here.
    setsid mpirun --hostfile "$hosts" --map-by "ppr:${PER_HOST:-1}:node" --bind-to none \
        --mca odls_base_sigkill_timeout 300 ${MPI_OPTIONS-} \
        "$python" -m jax_model5.train "$@" &
    mpirun=$!
    wait $mpirun
    code=$?
    while kill -0 $mpirun 2> /dev/null; do # the trap has ended the wait, not mpirun
        wait $mpirun
        code=$?
    done
    case $stopped$code in
        yes* | 0 | 2 | 3) break ;; # asked to; finished, bad input, a loss that is not finite
    esac
done
exit $code
