#!/bin/sh
# ./benchmark.sh SUITE [options of tools/benchmark.py], from the folder of the repository:
#
#   ./benchmark.sh quick                                       all scripts on Pendulum-v1, three seeds
#   ./benchmark.sh humanoid --workers 8                        off-policy scripts on Humanoid-v4
#   ./benchmark.sh humanoid-on-policy --workers 8              PPO and DiffPPO on it
#   ./benchmark.sh mujoco                                      each diffusion script against its twin, four tasks
#   ./benchmark.sh humanoid --workers 8 --flags "--cuda-graph"   on one GPU, with MPS: docs/performance.md
#   ./benchmark.sh humanoid --slurm --slurm-args "--time=24:00:00 --partition=gpu --gres=gpu:1"
#   ./benchmark.sh diffusion-steps                             K = 1 ... 16 on Humanoid-v4
#   ./benchmark.sh toy                                         the environments with a known optimum
#   ./benchmark.sh toy-steps                                   K = 1 ... 16 of DiffSAC on the double well
#
# Call it again to go on after an interruption. Then:
#
#   python tools/plot.py table runs/benchmark/SUITE/*/runs/*
#   python tools/plot.py figure runs/benchmark/SUITE/*/runs/* --to figures
set -e
cd "$(dirname "$0")"
suite=$1
[ $# -gt 0 ] && shift
run() { exec python tools/benchmark.py "$suite" "$@"; }  # exec: signals reach it

# of toys/: the optimum is the same for every discount factor; a small one keeps the critics' errors below the temperature
well="--env-id toys:TurningDoubleWell-v0 --alpha 0.05 --gamma 0.9"
gmm="--env-id toys:TurningGMM-v0 --alpha 1 --gamma 0.9"
off="--no-autotune --policy-lr 0.001 --learning-starts 1000 --eval-frequency 0 --checkpoint-frequency 5000"
well_off="$well $off --total-timesteps 20000 --hidden-dim 64"

case $suite in
quick)
    off="--env-id Pendulum-v1 --total-timesteps 20000 --learning-starts 1000 --eval-frequency 2000 --checkpoint-frequency 5000"
    off="$off --hidden-dim 128"
    on="--env-id Pendulum-v1 --total-timesteps 300000 --eval-frequency 25000 --gamma 0.9 --learning-rate 0.001"
    run --seeds 1 2 3 "$@" --commands \
        "sac_continuous.py $off" \
        "diffsac_continuous.py $off --diffusion-steps 4" \
        "wpo_continuous.py $off" \
        "diffwpo_continuous.py $off --diffusion-steps 4" \
        "crossq_continuous.py $off --critic-dim 128" \
        "dime.py $off --diffusion-steps 4 --critic-dim 128" \
        "ppo_continuous.py $on" \
        "diffppo_continuous.py $on --diffusion-steps 4"
    ;;
humanoid)
    # off-policy, 6 to 9 core-hours a seed (estimated)
    task="--env-id Humanoid-v4"
    run --seeds 1 2 3 4 "$@" --commands \
        "{crossq_continuous.py,dime.py} $task --total-timesteps 100000" \
        "{sac_continuous.py,diffsac_continuous.py} $task --total-timesteps 200000" \
        "{wpo_continuous.py,diffwpo_continuous.py} $task --total-timesteps 100000"
    ;;
humanoid-on-policy)
    # about 1 core-hour a seed; the learning rate: docs/ppo.md
    task="--env-id Humanoid-v4 --total-timesteps 1000000 --eval-frequency 50000 --learning-rate 1e-4"
    run --seeds 1 2 3 4 "$@" --commands "{ppo_continuous.py,diffppo_continuous.py --diffusion-steps 8} $task"
    ;;
diffusion-steps)
    # about 6 core-hours a seed (estimated)
    task="--env-id Humanoid-v4 --diffusion-steps {1,2,4,8,16}"
    run --seeds 1 2 3 "$@" --commands \
        "diffppo_continuous.py $task --total-timesteps 1000000 --eval-frequency 50000 --learning-rate 1e-4" \
        "diffsac_continuous.py $task --total-timesteps 100000"
    ;;
mujoco)
    # 14 to 18 core-hours a seed (estimated)
    tasks="--env-id {HalfCheetah-v4,Ant-v4,Walker2d-v4,Hopper-v4}"
    run --seeds 1 2 3 4 "$@" --commands \
        "{sac_continuous.py,wpo_continuous.py,crossq_continuous.py} $tasks --total-timesteps 100000" \
        "{diffsac_continuous.py,diffwpo_continuous.py,dime.py} $tasks --total-timesteps 100000" \
        "{ppo_continuous.py,diffppo_continuous.py --diffusion-steps 4} $tasks --total-timesteps 1000000 --eval-frequency 50000"
    ;;
toy)
    # annealing, batch size and DIME's ratio of updates were chosen for the GMM's narrow modes: results/toys/
    anneal="--alpha-anneal 10"
    gmm_off="$gmm $off --hidden-dim 128 $anneal"
    larger="--total-timesteps 25000 --batch-size 512"
    ratio="--no-normalize-rewards --utd 1 --policy-delay 1"
    chain="--diffusion-steps 8 --prior-std 1"
    on="--total-timesteps 400000 --eval-frequency 0"
    run --seeds 1 2 3 "$@" --commands \
        "{sac_continuous.py,wpo_continuous.py} $well_off" \
        "{diffsac_continuous.py,diffwpo_continuous.py} $well_off --diffusion-steps 8" \
        "{crossq_continuous.py,dime.py $chain} $well_off $ratio --critic-dim 64 --v-min -2 --v-max 12" \
        "{ppo_continuous.py,diffppo_continuous.py} $well $on" \
        "{sac_continuous.py,wpo_continuous.py} $gmm_off $larger" \
        "{diffsac_continuous.py,diffwpo_continuous.py} $gmm_off $larger --diffusion-steps 8" \
        "{crossq_continuous.py,dime.py $chain} $gmm_off --total-timesteps 30000 $ratio --critic-dim 128 --v-min -200 --v-max 40" \
        "{ppo_continuous.py,diffppo_continuous.py} $gmm $on $anneal"
    ;;
toy-steps)
    # 10 core-minutes a seed
    run --seeds 1 2 3 "$@" --commands "diffsac_continuous.py $well_off --diffusion-steps {1,2,4,8,16}"
    ;;
*)
    sed -n '2,19s/^# \{0,1\}//p' benchmark.sh >&2
    exit 2
    ;;
esac
