# What this site has, in one place: every script here reads it, on the node where it runs. Change
# the values, or set the variables before sbatch, which carries them along.

# The command, on a path that all nodes see.
: "${STACKING_DS:=${SLURM_SUBMIT_DIR:-$PWD}/.venv/bin/stacking-ds}"

# What has to be loaded first.
# module load cuda/13

# A container, if the command lives in one; it has to pass SLURM_* and MASTER_* on.
CONTAINER=()
# CONTAINER=(apptainer exec --nv --bind /shared /shared/stacking_ds.sif)

# The interface that joins the nodes, where a node's name leads elsewhere.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Ranks of a node that trains: the number of its GPUs. A job asks for nodes, and srun for tasks on
# them: a job that has once had a number of tasks is not started again on fewer nodes.
: "${RANKS_PER_NODE:=1}"

if [ -n "${SLURM_JOB_ID:-}" ]; then  # not where submit.sh reads this: sbatch would carry it along
    cpus=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
    RANKS=(--ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task=$((cpus ? cpus : 1)))

    # Threads of a rank on the CPU: its cores.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus ? cpus : 1))}

    # What kernels are compiled to stays on the node: a thousand ranks must not meet in one home
    # directory.
    scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/stacking-ds-$(id -u)
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
fi

# For submit.sh: what every job asks for, and what a job that trains does.
SITE_OPTIONS=()     # (--account=lab --qos=normal)
TRAIN_OPTIONS=()    # (--partition=gpu --gpus-per-node=8)
PREPARE_OPTIONS=()  # (--partition=cpu --cpus-per-task=32)
