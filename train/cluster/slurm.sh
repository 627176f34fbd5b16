#!/bin/bash
# A recipe on a cluster that Slurm runs:
#   sbatch --nodes 12 train/cluster/slurm.sh phi2 --out /shared/runs/phi2
# --out, and the environment, lie where every node sees them. Before the time is over the state is saved, and the job
# queued again; give the same command to go on with a job that ended, on any number of nodes.
#SBATCH --job-name=phi-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

phi_train=${PHI_TRAIN:-.venv/bin/phi-train}
# Where the nodes meet: the first one's name, or an address of its fast network.
meet=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
processes=${SLURM_GPUS_PER_NODE##*:} # of "h100:8" the 8
[ "${processes:-0}" = 0 ] && processes=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or one restart in three hangs (torch 2.13)

# Five minutes before the end every process saves the state and leaves.
trap 'ending=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun "$(dirname "$phi_train")/torchrun" \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$meet:29500" --rdzv-id "$SLURM_JOB_ID" \
    --no-python "$phi_train" "$@" &
step=$!
wait $step
code=$?
if [ "$ending" ]; then
    wait $step
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
