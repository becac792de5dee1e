#!/usr/bin/env bash
# Ten minutes on a machine with a CUDA card: tests, steps per second, eight runs at once.
#
#   tools/gpu_check.sh [FOLDER]                  csv files and a table, in gpu_check/ by default
#   DEVICE=cpu STEPS=800 tools/gpu_check.sh      a dry run without a card, small sizes
#   STEPS=1200 COMPILE=0 tools/gpu_check.sh      five minutes: shorter runs, no --compile
#
# It needs pip install -r requirements-dev.txt tensordict.
# stable-baselines3 is measured too where it is installed. What fails has no figure in the table.
set -euo pipefail
out=$(realpath -m "${1:-gpu_check}")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} steps=${STEPS:-4000} copies=${COPIES:-8} env_id=${ENV_ID:-Humanoid-v4}
mkdir -p "$out"
{
    python --version
    python -c "import torch; print('torch', torch.__version__)"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo "no CUDA card"
} 2>&1 | tee "$out/versions.txt"

paper="--critic-dim 2048 --hidden-dim 256 --diffusion-steps 16 --utd 2"
[ "$device" = cuda ] || paper="--critic-dim 64 --diffusion-steps 2"
contenders=(
    sac_continuous.py
    "diffsac_continuous.py --diffusion-steps 8"
    "diffsac_continuous.py --diffusion-steps 8 --actor-gradient chain"
    "dime.py $paper"
)
speeds=()
for contender in "${contenders[@]}"; do
    speeds+=("$contender")
    if [ "$device" = cuda ]; then
        speeds+=("$contender --cuda-graph" "$contender --cuda-graph --bf16")
    fi
done
[ "$device" = cuda ] && [ "${COMPILE:-1}" = 1 ] && speeds+=("sac_continuous.py --compile")
python -c "import stable_baselines3" 2> /dev/null && speeds+=(sb3:sac)

failed=0
speed() { python tools/speed.py --env-id "$env_id" --device "$device" --rounds 1 "$@" || failed=2; }
if [ "$device" = cuda ]; then
    python -m pytest -q tests/test_fast_paths.py -k captured > "$out/tests.txt" || failed=2
    tail -n 20 "$out/tests.txt"
fi
graph=$([ "$device" = cuda ] && echo " --cuda-graph" || true)
at_once() {
    speed --steps "$steps" --copies "$copies" --to "$out/$1.csv" \
        --contenders "diffsac_continuous.py --diffusion-steps 8$graph"
}
{
    speed --steps "$steps" --to "$out/speed.csv" --contenders "${speeds[@]}"
    speed --steps $((12 * steps)) --to "$out/speed_ppo.csv" \
        --contenders ppo_continuous.py ${graph:+"ppo_continuous.py$graph"}
    at_once speed_at_once
    if [ "$device" = cuda ] && nvidia-cuda-mps-control -d; then # programs share the card
        echo "with MPS:"
        at_once speed_at_once_mps
        echo quit | nvidia-cuda-mps-control
    fi
} > "$out/speed.md"
cat "$out/speed.md"
exit $failed
