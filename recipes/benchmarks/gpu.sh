#!/usr/bin/env bash
# What is to be known of a GPU, in nine minutes: tests, speed, one short job. Each part has its own limit and log.
#
#   bash recipes/benchmarks/gpu.sh OUT              # DEVICE=cpu: the same at small sizes, to try the script
#
# Wheels in ./.whl are installed first, for a machine without a registry; else the environment is taken as it is.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:?usage: gpu.sh OUT}")
device=${DEVICE:-cuda}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
benchmark="python recipes/benchmark.py device=$device load_steps=0 stage_steps=0 env=null"
job="python recipes/spar_d4rl.py device=$device seeds=[0,1,2,3,4,5,6,7] cache=null"
if [ "$device" = cpu ]; then
  benchmark+=" rounds=1 window=0.05 hidden=[8] batch_size=8" many="[2]" pairs="[2]"
  job="python recipes/spar_d4rl.py device=cpu seeds=[0,1] cache=null preset=smoke"
else
  benchmark+=" rounds=5 window=0.5" many="[8,32]" pairs="[8]"
  job+=" spar.updates=6000 anchor.steps=2000 vae.steps=2000 critics.steps=1000 eval.interval=3000"
fi

part() { # NAME SECONDS COMMAND: goes on to the next part whatever becomes of this one
  local start=$SECONDS
  timeout --kill-after=5 "$2" bash -c "$3" > "$out/$1.log" 2>&1
  echo "$1: exit $?, $((SECONDS - start)) s" | tee -a "$out/parts.txt"
}

# Without dependencies: what .whl lacks, the machine has, and its torch stays.
[ -d .whl ] && part install 60 "pip install --no-index --find-links .whl --no-deps .whl/*.whl"
part machine 20 "nvidia-smi; pip list"
part tests 120 "python -m pytest -m cuda tests/package/test_cuda.py -p no:cacheprovider -rs"
part speed 100 "$benchmark seeds=$many peers=false out=$out/speed.json"
part jax 60 "$benchmark seeds=null out=$out/jax.json"
part job 80 "$job out=$out/job"
part compiled 100 "$benchmark seeds=$pairs compile=true peers=false out=$out/compiled.json"
cat "$out/parts.txt" "$out"/{tests,speed,jax,compiled}.log
