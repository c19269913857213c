#!/bin/bash
# One process a host, which drives all of its GPUs. From the project's folder, with the same path on
# every host of the file HOSTS (a line for each):
#   docs/clusters/openmpi.sh HOSTS --config configs/model5.yaml
# A run that loses a host is started again, ten times at most, and goes on from its last checkpoint.
# SIGTERM or Ctrl-C to this script: every process saves and ends.

python=${PYTHON:-.venv/bin/python}
hosts=$1
shift

# mpirun passes SIGUSR1 on; after SIGTERM it would kill within a second. On each host it means SIGTERM.
task='(trap "" USR1; exec "$@") & task=$!
trap "kill -TERM $task" USR1
while kill -0 $task 2> /dev/null; do wait $task; code=$?; done; exit $code'

stopped=
trap 'stopped=yes; kill -USR1 $mpirun' TERM INT HUP

for attempt in {0..10}; do
    if [ "$attempt" -gt 0 ]; then
        sleep "${RETRY_SECONDS:-30}" # a host that was lost comes back
    fi
    # In a session of its own it gets the terminal's Ctrl-C from here only.
    setsid mpirun --hostfile "$hosts" --map-by "ppr:${PER_HOST:-1}:node" --bind-to none \
        ${MPI_OPTIONS-} bash -c "$task" bash "$python" -m jax_model5.train "$@" &
    mpirun=$!
    while kill -0 $mpirun 2> /dev/null; do # the trap ends a wait, not mpirun
        wait $mpirun
        code=$?
    done
    case $stopped$code in
        yes* | 0 | 2 | 3) break ;; # asked to; finished, bad input, a loss that is not finite
    esac
done
exit $code
