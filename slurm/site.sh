# What a job finds on its node. Every script here reads it there: change the values, or set the
# variables before sbatch, which carries them along. Account, partition and QOS are not chosen here,
# but on sbatch's command line or in SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.

# The checkout is where sbatch was called, unless STACKING_DS_HOME says where; a path all nodes see.
: "${STACKING_DS:=${STACKING_DS_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/.venv/bin/stacking-ds}"

# What has to be loaded first.
# module load cuda/13

# A container, if the command lives in one; it has to pass SLURM_* and MASTER_* on.
CONTAINER=()
# CONTAINER=(apptainer exec --nv --bind /shared /shared/stacking_ds.sif)

# The interface that joins the nodes, where a node's name leads elsewhere.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

if [ -n "${SLURM_JOB_ID:-}" ]; then  # not where submit.sh reads this: sbatch would carry it along
    # Ranks of a node that trains: the GPUs that the job has there. A job asks for nodes, and srun
    # for tasks on them: one that has had a number of tasks is not started again on fewer nodes.
    : "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
    cpus=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
    RANKS=(--ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task=$((cpus ? cpus : 1)))

    # Threads of a rank on the CPU: its cores.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus ? cpus : 1))}
fi

# For submit.sh alone, which hands them to sbatch: what every job asks for, a job that trains or
# evaluates, and one that prepares. A plain sbatch does not see them.
SITE_OPTIONS=()     # (--account=lab --qos=normal)
TRAIN_OPTIONS=()    # (--partition=gpu --gpus-per-node=8)
PREPARE_OPTIONS=()  # (--partition=cpu --cpus-per-task=32)
