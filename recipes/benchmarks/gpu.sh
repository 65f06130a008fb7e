#!/usr/bin/env bash
# What we want to know about a GPU, within nine minutes: tests, speed, one short job. Each part has its own limit and log.
#
#   bash recipes/benchmarks/gpu.sh OUT              # DEVICE=cpu: the same at small sizes, to try the script
#
# After each part OUT has its exit status and seconds in parts.txt, the measured speeds as JSON and the logs in logs.tgz;
# in the end the job's files in job.tgz. The script fails if a part did. Wheels in ./.whl are installed first, for a machine without a registry; else the environment is
# taken as it is. PYTHON names another interpreter than python3.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:?usage: gpu.sh OUT}")
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
mkdir -p "$out"
work=$(mktemp -d)
export PYTHONPATH=$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
benchmark="$python recipes/benchmark.py device=$device load_steps=0 stage_steps=0 env=null"
job="$python recipes/spar_d4rl.py device=$device out=$work/job"
if [ "$device" = cpu ]; then
  slack=4 many="[2]" several="[2]"
  benchmark+=" rounds=1 window=0.05 hidden=[8] batch_size=8"
  job+=" seeds=[0,1] preset=smoke"
else
  slack=1 many="[8,32]" several="[8]"
  benchmark+=" rounds=5 window=0.5"
  # Pre-training has no graph and takes one seed after the other, so it is short here.
  job+=" seeds=[0,1,2,3,4,5,6,7] spar.members=1 spar.updates=6000 anchor.steps=500 vae.steps=500 critics.steps=300 eval.interval=3000"
fi

keep() { # after each part, as nobody asks a killed script
  cp "$work"/*.json "$out" 2>/dev/null
  tar -czf "$out/logs.tgz" -C "$work" --exclude=site --exclude=job .
}
leave() {
  keep
  [ -d "$work/job" ] && tar -czf "$out/job.tgz" -C "$work" --exclude=checkpoints job
  rm -rf "$work"
}
trap leave EXIT
: > "$out/parts.txt"

part() { # NAME SECONDS COMMAND: goes on to the next part whatever becomes of this one
  local start=$SECONDS left=$((540 * slack - SECONDS)) limit=$((slack * $2)) status=skipped
  limit=$((limit < left ? limit : left))
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=5 "$limit" bash -c "$3" > "$work/$1.log" 2>&1
    status=$?
  fi
  echo "$1: exit $status, $((SECONDS - start)) of $limit s" | tee -a "$out/parts.txt"
  keep
}

# Without dependencies: what .whl lacks, the machine has, and its torch stays.
[ -d .whl ] && part install 60 "$python -m pip install --no-index --no-deps --no-compile --target $work/site .whl/*.whl"
part machine 15 "nvidia-smi; $python -m pip list"
part tests 90 "$python -m pytest -m cuda tests/package/test_cuda.py -p no:cacheprovider -rs"
part speed 130 "$benchmark seeds=$many peers=false out=$work/speed.json"
part jax 70 "$benchmark seeds=null out=$work/jax.json"
part job 75 "$job"
part compiled 100 "$benchmark seeds=$several compile=true peers=false out=$work/compiled.json"
tail -n 40 "$work"/*.log
! grep -v "exit 0," "$out/parts.txt"
