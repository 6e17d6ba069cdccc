# What a job finds on its node. Every script here reads it there: change the values, or set the
# variables before sbatch, which carries them along. Account, partition and QOS are not chosen here,
# but on sbatch's command line or in SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.

# The command, unless STACKING_DS says which: the checkout's, which is where sbatch was called unless
# STACKING_DS_HOME says where (a path all nodes see); where that has none, the one in PATH, which sbatch
# carries along.
if [ -z "${STACKING_DS:-}" ]; then
    STACKING_DS=${STACKING_DS_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/.venv/bin/stacking-ds
    [ -x "$STACKING_DS" ] || STACKING_DS=$(command -v stacking-ds || echo "$STACKING_DS")
fi

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
    chosen=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    RANKS_PER_NODE=${chosen:-1}
    cpus=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
    RANKS=(--ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task=$((cpus ? cpus : 1)))

    # Threads of a rank on the CPU: its cores.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus ? cpus : 1))}

    # What a job that trains or evaluates runs on, in the first line of its log.
    tell_ranks() {
        local ranks="$RANKS_PER_NODE ranks on each of ${SLURM_JOB_NUM_NODES:-1} nodes"
        if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
            echo "$ranks, with $SLURM_GPUS_ON_NODE GPUs there"
        elif [ -z "$chosen" ] && ls /dev/nvidia[0-9]* >/dev/null 2>&1; then
            echo "$SLURMD_NODENAME has GPUs and the job has asked for none: give sbatch" \
                "--gpus-per-node=N, or set RANKS_PER_NODE where SLURM does not count GPUs" >&2
            exit 2
        else
            echo "$ranks; SLURM has given them no GPU (--gpus-per-node=N), so they use the CPU" \
                "unless they find one"
        fi
    }
fi

# For submit.sh alone, which hands them to sbatch: what every job asks for, a job that trains or
# evaluates, and one that prepares. A plain sbatch does not see them.
SITE_OPTIONS=()     # (--account=lab --qos=normal)
TRAIN_OPTIONS=()    # (--partition=gpu --gpus-per-node=8)
PREPARE_OPTIONS=()  # (--partition=cpu --cpus-per-task=32)
