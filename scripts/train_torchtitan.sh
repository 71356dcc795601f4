#!/usr/bin/env bash
# Train with torchtitan on this machine. Flags go to torchtitan:
#     scripts/train_torchtitan.sh                  # the debug config, 2 processes
#     NGPU=8 CONFIG=gpt_160m scripts/train_torchtitan.sh --parallelism.data_parallel_replicate_degree 2
#     NGPU=64 COMM_MODE=fake_backend scripts/train_torchtitan.sh \
#         --parallelism.data_parallel_replicate_degree 8    # a dry run: one process
# NGPU, MODULE, CONFIG, LOG_RANK and COMM_MODE are those of torchtitan's run_train.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
end_with_help "$@"
ensure_venv torchtitan

NGPU="${NGPU:-2}" MODULE="${MODULE:-curvadion_configs}" CONFIG="${CONFIG:-debug}"
LOG_RANK="${LOG_RANK:-0}" COMM_MODE="${COMM_MODE:-}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
train=(-m curvadion.titan --module "$MODULE" --config "$CONFIG")

if [[ "$MODULE/$CONFIG" == curvadion_configs/debug* && ! -f assets/text/data.jsonl ]]; then
  python scripts/prepare_assets.py
fi
if [[ -n "$COMM_MODE" ]]; then
  export NGPU RANK=0 LOCAL_RANK=0 WORLD_SIZE="$NGPU"
  exec python "${train[@]}" --comm.mode "$COMM_MODE" --training.steps 1 "$@"
fi
exec torchrun --nproc-per-node "$NGPU" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
  --local-ranks-filter "$LOG_RANK" --role rank --tee 3 "${train[@]}" "$@"
