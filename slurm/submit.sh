#!/bin/bash
# slurm/submit.sh RECIPE RUN_DIR SHARDS SOURCE...
#
# All three, one after the other: prepare -> pretrain -> evaluate. The recipe is checked first; what
# follows a job that fails is not started. Options of the jobs are in site.sh. Paths are as seen from
# where you stand, which is where the jobs write their logs.
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
recipe=$1 run_dir=$2 shards=$3
shift 3
export STACKING_DS_HOME=${STACKING_DS_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
here=$STACKING_DS_HOME/slurm
source "$here/site.sh"

# without the shards, which need not be there yet, and whose rows no login node should lay out
check=(train --dry-run --without-data --recipe "$recipe" --run-dir "$run_dir" --resume
    --set "data.path=$shards")
if ! "${CONTAINER[@]}" "$STACKING_DS" "${check[@]}" >/dev/null; then
    echo "nothing is submitted, since this failed: $STACKING_DS ${check[*]}" >&2
    exit 2
fi

# all three or none
jobs=()
trap '[ ${#jobs[@]} = 3 ] || [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"' EXIT

submit() { sbatch --parsable --kill-on-invalid-dep=yes "${SITE_OPTIONS[@]}" "$@"; }

prepare=$(submit "${PREPARE_OPTIONS[@]}" "$here/prepare.sbatch" "$@" --out "$shards")
jobs+=("$prepare")
pretrain=$(submit "${TRAIN_OPTIONS[@]}" --dependency="afterok:$prepare" \
    "$here/pretrain.sbatch" "$recipe" "$run_dir" --set "data.path=$shards")
jobs+=("$pretrain")
evaluate=$(submit "${TRAIN_OPTIONS[@]}" --nodes=1 --dependency="afterok:$pretrain" \
    "$here/evaluate.sbatch" "$run_dir")
jobs+=("$evaluate")
echo "prepare $prepare, pretrain $pretrain, evaluate $evaluate"
