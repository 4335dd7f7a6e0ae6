#!/usr/bin/env bash
# 4 nodes x 8 GPUs under SLURM: sbatch scripts/launch/slurm.sh --model MODEL.pth --task gsm8k --run RUN ...
# When a process dies, all are started anew; when a node is lost or the time is up, the job is queued again.
# Either way the run continues after its last whole step, with the same bits. A mistake (code 2) ends the job.
#SBATCH --job-name=rwkv-es
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -uo pipefail

# As submitted: SLURM runs a copy of this script, so paths are taken from the folder where sbatch was called.
folder=${RWKV_ES_LAUNCH:-$SLURM_SUBMIT_DIR/scripts/launch}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again() {
  echo "time is up: queued again"
  kill -TERM "$job" # `again`: it ends after the srun that scancel ends
  scancel --signal=TERM "$SLURM_JOB_ID"
  wait "$job"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap again TERM

# SLURM_NODEID is each node's own, so the inner shell expands it.
export folder first
"$folder/again" srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$folder/nodes4x8.yaml" \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$first" -m rwkv_es train "$@"' rwkv-es "$@" &
job=$!
wait "$job"
code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
