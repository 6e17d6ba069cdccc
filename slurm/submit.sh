#!/bin/bash
# slurm/submit.sh RECIPE RUN_DIR SHARDS SOURCE...
#
# All three, one after the other: prepare -> pretrain -> evaluate. What follows a job that fails is
# not started. Options of the jobs are in site.sh.
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
recipe=$1 run_dir=$2 shards=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
source "$here/site.sh"

submit() { sbatch --parsable --kill-on-invalid-dep=yes "${SITE_OPTIONS[@]}" "$@"; }

prepare=$(submit "${PREPARE_OPTIONS[@]}" "$here/prepare.sbatch" "$@" --out "$shards")
pretrain=$(submit "${TRAIN_OPTIONS[@]}" --dependency="afterok:$prepare" \
    "$here/pretrain.sbatch" "$recipe" "$run_dir" --set "data.path=$shards")
evaluate=$(submit "${TRAIN_OPTIONS[@]}" --nodes=1 --dependency="afterok:$pretrain" \
    "$here/evaluate.sbatch" "$run_dir")
echo "prepare $prepare, pretrain $pretrain, evaluate $evaluate"
