#!/bin/bash
# One process on each host, by ssh, which needs no password. From the project's folder, with the
# same path on every host; the first is the coordinator:
#   docs/clusters/by_hand.sh "first second third" --config configs/model5.yaml
# To stop, on any host: pkill -TERM -f '^[^ ]*python.* -m jax_model5.train'; all save and end.

python=${PYTHON:-.venv/bin/python}
read -ra hosts <<< "$1"
shift

address=${hosts[0]##*@}:${PORT:-9911}
for index in "${!hosts[@]}"; do
    ssh "${hosts[index]}" "cd $(printf %q "$PWD") && \
        exec env JAX_COORDINATOR_ADDRESS=$address JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$index \
        $(printf '%q ' "$python" -m jax_model5.train "$@")" &
    processes+=($!)
done

code=0
for process in "${processes[@]}"; do
    wait "$process" || code=$?
done
exit $code
