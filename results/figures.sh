#!/bin/sh
# The learning curves of the pages, table.md and compare.md, from results/curves: ./results/figures.sh
set -e
cd "$(dirname "$0")/.."
plot() { python tools/plot.py "$@"; }
curves=results/curves
steps="$curves/Humanoid-v4/diffppo*.csv $curves/Humanoid-v4/diffsac_continuous*.csv results/ablations/diffusion_steps_humanoid/*.csv"
slopes() { plot figure $steps --against diffusion_steps "$@" | sed -n 's/^diff.*/* &/p'; }
episodes="--metric charts/episodic_return --window 50000"

plot table $curves/Pendulum-v1/*.csv $curves/HalfCheetah-v4/*.csv $curves/Humanoid-v4/*.csv > results/table.tmp
mv results/table.tmp results/table.md
{
    printf "Final evaluation:\n\n"
    plot compare $curves/HalfCheetah-v4/*.csv $curves/Humanoid-v4/*.csv
    echo
    slopes --to docs/images/diffusion_steps
    printf "\nTraining episodes, mean of the last whole 50,000 steps:\n\n"
    plot compare $curves/HalfCheetah-v4/*.csv $curves/Humanoid-v4/*.csv $episodes
    echo
    slopes --to build/figures $episodes
} > results/compare.tmp
mv results/compare.tmp results/compare.md
plot figure $curves/HalfCheetah-v4/*sac*.csv --to docs/images/off_policy
plot figure $curves/HalfCheetah-v4/*ppo*.csv --to docs/images/on_policy
plot figure $curves/Humanoid-v4/*ppo*.csv --to docs/images/on_policy --published results/published.csv
plot figure $curves/HalfCheetah-v4/*wpo*.csv --to docs/images/wasserstein
plot figure $curves/HalfCheetah-v4/crossq*.csv $curves/HalfCheetah-v4/dime*.csv --to docs/images/crossq
plot figure $curves/Humanoid-v4/sac*.csv $curves/Humanoid-v4/diffsac_continuous*.csv $curves/Humanoid-v4/crossq*.csv $curves/Humanoid-v4/dime*.csv --to docs/images/all --published results/published.csv
