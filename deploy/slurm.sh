#!/usr/bin/env bash
# One pretraining run on machines of a SLURM cluster: a Ray of its own over all of them, which ends with the job.
#
# What:     Ray's head and the run's driver on the first machine, a Ray node on each; one worker a machine trains.
# Command:  sbatch deploy/slurm.sh --config configs/demo.yaml --run-dir /shared/runs/demo
#           (from the root of the repository; all arguments are those of imp pretrain)
# Needs:    the project installed in the environment that submits, on storage that all machines mount, and a run
#           directory there
# Costs:    nothing by itself: machine hours of your cluster. To compare: a machine of 4 NVIDIA L4 is 4.60 USD an hour on
#           AWS (g6.12xlarge, list price, us-east-1, 2026-07-20).
#
# Change the lines marked EDIT. SLURM warns 120 s before it ends the job: the run saves, and the job is queued again and
# goes on. scancel --signal=TERM --batch JOB saves and ends it.

#SBATCH --job-name=imp
#SBATCH --nodes=2                  # EDIT
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=48         # EDIT: all of a machine's
#SBATCH --gpus-per-node=4          # EDIT: leave it out on CPUs
#SBATCH --time=24:00:00            # EDIT
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=imp-%j.log

set -euo pipefail

cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
gpus=${SLURM_GPUS_ON_NODE:-0}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

# USR1: the job's time is nearly over. TERM: someone ends it.
run="" stopping=no requeue=no
stop() {
  stopping=yes
  if [ -n "$run" ]; then kill -TERM "$run" 2> /dev/null || true; fi
}
trap 'requeue=yes; stop' USR1
trap stop TERM

# A Ray node on every machine: the first is the head.
srun --kill-on-bad-exit=1 bash -c '
  ulimit -n 65536 || true
  common="--num-cpus=$2 --num-gpus=$3 --disable-usage-stats --block"
  if [ "$SLURM_PROCID" = 0 ]; then
    exec ray start --head --port="$1" --dashboard-host=127.0.0.1 $common
  fi
  until ray health-check --address "$0:$1" > /dev/null 2>&1; do sleep 1; done
  exec ray start --address="$0:$1" $common
' "$head" "$port" "$cpus" "$gpus" &
cluster=$!
trap 'kill "$cluster" 2> /dev/null || true' EXIT

until ray health-check --address "$head:$port" > /dev/null 2>&1; do
  kill -0 "$cluster" || exit 1
  if [ "$stopping" = yes ]; then exit 75; fi
  sleep 1
done

settings=(--set "cluster.num_workers=$SLURM_JOB_NUM_NODES" --set "cluster.address=$head:$port")
if [ "$gpus" -gt 0 ]; then
  settings+=(--set cluster.accelerator=gpu --set "cluster.accelerators_per_worker=$gpus")
fi
python jobs/pretrain.py "${settings[@]}" "$@" &
run=$!
if [ "$stopping" = yes ]; then stop; fi

# A signal ends wait, not the run.
while kill -0 "$run" 2> /dev/null; do
  wait "$run" || true
done
code=0
wait "$run" || code=$?
if [ "$requeue" = yes ] && [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
