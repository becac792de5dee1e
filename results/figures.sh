#!/bin/sh
# The learning curves of README and docs, and table.md, from the curves in results/: ./results/figures.sh
set -e
cd "$(dirname "$0")/.."
plot() { python tools/plot.py "$@"; }

plot table results/Pendulum-v1/*.csv results/HalfCheetah-v4/*.csv results/Humanoid-v4/*.csv > results/table.md
plot figure results/Pendulum-v1/*sac*.csv results/Pendulum-v1/*wpo*.csv results/Pendulum-v1/dime*.csv --to docs/images/pendulum_off_policy.png
plot figure results/Pendulum-v1/*ppo*.csv results/HalfCheetah-v4/*ppo*.csv --to docs/images/ppo_diffppo.png
plot figure results/HalfCheetah-v4/*sac*.csv results/HalfCheetah-v4/*wpo*.csv results/HalfCheetah-v4/dime*.csv --to docs/images/halfcheetah_off_policy.png
plot figure results/Humanoid-v4/*.csv --to docs/images/humanoid_diffsac.png
