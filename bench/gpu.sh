#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one command that needs no network.
#
#   bench/gpu.sh OUTDIR                          all sections that OUTDIR does not hold yet
#   bench/gpu.sh --seconds 300 OUTDIR tests      these sections, done before or not
#   bench/gpu.sh --dry-run OUTDIR                every section's code, on a machine without a GPU
#
# Sections, in the order in which they run; each writes OUTDIR/<section>.log, and OUTDIR/<section>.ok
# when it has succeeded, so that a window that closes too soon is not wasted:
#
#   build      the extensions, CUDA for this GPU's architecture alone
#   doctor     what is active and why; registers and shared memory of every kernel
#   tests      the whole suite but `slow`, in parallel; tests.xml
#   sanitizer  compute-sanitizer, memcheck and racecheck, over the CUDA ops
#   bench      the benchmarks, the most important first, while time is left; bench/<GPU>/*.json
#   ppo        PPO-ptx iterations of a 124M-parameter GPT-2; ppo.json
#   sweep      the kernels' constants; sweep.json
#   demo       InstructGPT in miniature, resumed where it stopped; demo/report.html
#
# Wanted: Python 3.10 or later with torch, triton, transformers, pytest, pytest-benchmark, pybind11
# and ninja; nvcc for the CUDA part; for `tests` and `demo` what pyproject.toml lists under `train`
# and `test`. PYTHON names the interpreter, default python3. Exit code 1 if a section failed, 2 for
# wrong arguments.
set -uo pipefail

SECTIONS=(build doctor tests sanitizer bench ppo sweep demo)
# No section runs longer than this many seconds, nor past the end of the whole.
declare -A LIMIT=([build]=150 [doctor]=60 [tests]=240 [sanitizer]=90 [bench]=240 [ppo]=90 [sweep]=90
  [demo]=500)
PYTHON=${PYTHON:-python3}
SECONDS_LEFT=520
DRY_RUN=0

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
}

wrong() {
  echo "bench/gpu.sh: $1 (see bench/gpu.sh --help)" >&2
  exit 2
}

arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --seconds)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || wrong "--seconds wants a number of seconds, got '${2:-}'"
      SECONDS_LEFT=$2
      shift
      ;;
    -*) wrong "unknown option $1" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[ ${#arguments[@]} -gt 0 ] || wrong "OUTDIR is missing"
mkdir -p "${arguments[0]}" || wrong "cannot write to ${arguments[0]}"
OUT=$(cd "${arguments[0]}" && pwd)
wanted=("${arguments[@]:1}")
for name in "${wanted[@]}"; do
  [[ -n ${LIMIT[$name]:-} ]] || wrong "no section '$name'; there are: ${SECTIONS[*]}"
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
command -v "$PYTHON" >/dev/null || wrong "no $PYTHON; name an interpreter by PYTHON=..."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $DRY_RUN = 0 ] && ! "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  wrong "$PYTHON finds no GPU; --dry-run goes through the sections without one"
fi
SECONDS=0 # bash counts it up

run_tests() { # run_tests ARGUMENT... : pytest without its cache, which a read-only checkout lacks
  "$PYTHON" -m pytest -p no:cacheprovider "$@"
}

section_build() {
  local archs=80-real
  if [ $DRY_RUN = 0 ]; then
    archs=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability()
print(f"{a}{b}a-real" if a == 9 else f"{a}{b}-real")') || return 1
  fi
  echo "CUDA architectures: $archs"
  if [ $DRY_RUN = 1 ]; then
    FASTRLHF_CUDA_ARCHS=$archs "$PYTHON" setup.py -q build_ext --inplace
  else
    FASTRLHF_CUDA_ARCHS=$archs "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e .
    cat kernels/fastrlhf_kernels/_build_info.json
  fi
}

section_doctor() {
  local kernels=(--kernels)
  [ $DRY_RUN = 0 ] || kernels=()
  nvidia-smi || [ $DRY_RUN = 1 ] || return 1
  "$PYTHON" -m fastrlhf doctor "${kernels[@]}"
}

section_tests() {
  local what=(tests -m "not slow" -n "$(nproc)" --dist worksteal)
  [ $DRY_RUN = 0 ] || what=(tests/test_gae_varlen.py -x)
  OMP_NUM_THREADS=1 run_tests -q --tb=short --junitxml="$OUT/tests.xml" "${what[@]}"
}

section_sanitizer() {
  # What the CUDA ops read and write, at the sizes of the accuracy tests; the allocator's cache
  # would hide a read past a tensor's end.
  local what=(-x -q --hypothesis-profile=few -k "cuda and not compile and not opcheck" tests/test_gae.py
    tests/test_ranking_loss.py tests/test_rollout_advantages.py tests/test_gae_varlen.py)
  local failed=0
  if [ $DRY_RUN = 1 ]; then
    run_tests --collect-only "${what[@]}"
    return
  fi
  command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is not on PATH"
    return 1
  }
  for tool in memcheck racecheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 $((ALLOWED / 2)) \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=fastrlhf \
      "$PYTHON" -m pytest -p no:cacheprovider "${what[@]}" || failed=1
  done
  return $failed
}

section_bench() {
  # The most important first; a result file a benchmark, so that those that were measured are kept.
  local what=(--seconds $((ALLOWED - 20)))
  [ $DRY_RUN = 0 ] || what=(shape_rewards)
  "$PYTHON" bench/run.py "${what[@]}" --results "$OUT/bench" || [ $? = 3 ] # 3: the time was over
}

section_ppo() {
  local size=(--width 768 --layers 12 --heads 12 --vocabulary 50257 --batch 64 --new-tokens 128)
  [ $DRY_RUN = 0 ] || size=(--width 32 --layers 1 --heads 2 --vocabulary 300 --batch 4 --new-tokens 8)
  "$PYTHON" bench/ppo_iteration.py "${size[@]}" --json "$OUT/ppo.json"
}

section_sweep() {
  local size=()
  [ $DRY_RUN = 0 ] || size=(--tiny)
  "$PYTHON" bench/sweep.py "${size[@]}" --json "$OUT/sweep.json"
}

section_demo() {
  if [ $DRY_RUN = 1 ]; then
    "$PYTHON" -m fastrlhf demo --help
    return
  fi
  local resume=()
  [ ! -d "$OUT/demo" ] || resume=(--resume)
  "$PYTHON" -m fastrlhf demo --out "$OUT/demo" --workers 2 "${resume[@]}"
}

# A section runs in a shell of its own, and timeout ends that with all that it started.
export DRY_RUN OUT PYTHON
export -f section_build section_doctor section_tests section_sanitizer section_bench section_ppo \
  section_sweep section_demo run_tests
if [ ${#wanted[@]} -eq 0 ]; then
  for name in "${SECTIONS[@]}"; do
    if [ -e "$OUT/$name.ok" ]; then echo "== $name: done before"; else wanted+=("$name"); fi
  done
fi
failed=()
for name in "${wanted[@]}"; do
  left=$((SECONDS_LEFT - SECONDS)) began=$SECONDS
  if [ $left -lt 10 ]; then
    echo "== $name: not begun, the time is over"
    failed+=("$name")
    continue
  fi
  ALLOWED=$((left < LIMIT[$name] ? left : LIMIT[$name]))
  export ALLOWED
  rm -f "$OUT/$name.ok"
  echo "== $name (at most $ALLOWED s)"
  timeout --signal=INT --kill-after=8 "$ALLOWED" bash -c "section_$name" 2>&1 | tee "$OUT/$name.log"
  status=${PIPESTATUS[0]}
  if [ "$status" = 0 ]; then
    touch "$OUT/$name.ok"
    echo "== $name: ok, $((SECONDS - began)) s"
  else
    failed+=("$name")
    echo "== $name: FAILED with $status, $((SECONDS - began)) s" | tee -a "$OUT/$name.log"
  fi
done
[ ${#failed[@]} -eq 0 ] || echo "not done: ${failed[*]}"
[ ${#failed[@]} -eq 0 ]
