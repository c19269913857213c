#!/bin/bash
# One process a host, which drives all of its GPUs. From the project's folder:
#   sbatch --nodes=2 --gpus-per-node=8 docs/clusters/slurm.sh --config configs/model5.yaml
# A run that is preempted, that meets its time limit, or that loses a host is queued again and goes
# on from its last checkpoint.
#SBATCH --job-name=model5
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

python=${PYTHON:-.venv/bin/python}
log=$(readlink /proc/$$/fd/1)
before=$(stat -c %s "$log")

# Three minutes before the time limit: every task saves and ends.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=0 "$python" -m jax_model5.train "$@" &
step=$!
wait $step
code=$?
while kill -0 $step 2> /dev/null; do # the trap has ended the wait, not the step
    wait $step
    code=$?
done

if tail -c +$((before + 1)) "$log" | grep -q '^finished at step'; then
    exit 0
fi
case $code in
    2 | 3) exit $code ;; # bad input, a loss that is not finite: no second try helps
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
