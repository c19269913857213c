#!/bin/bash
# Every host of a TPU pod slice at once, from your own machine; the slice tells JAX the rest:
#   NAME=my-slice ZONE=us-west4-a docs/clusters/tpu_pod.sh --config configs/model5.yaml
# The project is in ~/jax_model5 on every host and installed there in .venv with "jax[tpu]"; data.source
# and workdir are on storage that all of them see.
# To stop: the same gcloud line with --worker=0 and
#   --command="pkill -TERM -f '^[^ ]*python.* -m jax_model5.train'"

gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="cd ~/jax_model5 && .venv/bin/python -m jax_model5.train $(printf '%q ' "$@")"
