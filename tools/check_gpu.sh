#!/usr/bin/env bash
# Builds for the NVIDIA GPU of this machine, runs the GPU tests and the decode benchmark, and prints a
# report to send in. README's table says on which cards the code has never run.
#   tools/check_gpu.sh [BUILD_DIR]     default: build/check_gpu; what programs said is in its logs/
# CUDA_VISIBLE_DEVICES says which of several GPUs. Takes what `tools/install_dependencies.sh test`
# installs, CUDA 13, and half an hour, of which the compiler takes most.
# Exits with 0 if all tests passed and the benchmark ran, with 1 if not, with 2 if nothing could be run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
build=${1:-build/check_gpu}
logs=$build/logs

give_up() {
  printf 'check_gpu.sh: %s\n' "$*" >&2
  exit 2
}
say() { printf '== %s\n' "$*" >&2; }

ask_gpu() { # ask_gpu FIELD: of the GPU that CUDA takes first
  nvidia-smi --id="$gpu" --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1
}

find_gpu() {
  command -v nvidia-smi >/dev/null || give_up "nvidia-smi is not on PATH: there is no NVIDIA driver here"
  gpu=${CUDA_VISIBLE_DEVICES:-0}
  gpu=${gpu%%,*}
  # The programs take the same one: CUDA's own order begins with the quickest.
  export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=$gpu
  card=$(ask_gpu name) || card=
  [[ -n $card ]] ||
    give_up "nvidia-smi finds no GPU \"$gpu\"; it says: $(nvidia-smi 2>&1 | tail -n 1)"
  capability=$(ask_gpu compute_cap)
  driver=$(ask_gpu driver_version)
  memory_mib=$(ask_gpu memory.total)
  memory_mib=${memory_mib%% *}
  [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || give_up "nvidia-smi does not tell $card's compute capability"
  local major=${capability%.*}
  ((major >= 8)) ||
    give_up "$card has compute capability $capability; the kernels need 8.0 (Ampere) or later"
  architecture=${major}0-real
  [[ $major != 9 ]] || architecture=90a-real
}

find_nvcc() {
  local place
  if [[ -n ${CUDACXX:-} ]]; then
    nvcc=$(command -v "$CUDACXX") || give_up "CUDACXX is \"$CUDACXX\", and there is no such program"
  else
    for place in "$(command -v nvcc)" "${CUDA_PATH:-}/bin/nvcc" /usr/local/cuda/bin/nvcc; do
      [[ -z ${nvcc:-} && -x $place ]] && nvcc=$place
    done
    [[ -n ${nvcc:-} ]] || give_up "no CUDA compiler: nvcc is neither on PATH nor in CUDA_PATH or" \
      "/usr/local/cuda; install CUDA 13"
  fi
  release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
}

run_logged() { # run_logged NAME COMMAND ...: what it says goes to a log
  local log=$logs/$1.log
  shift
  "$@" >"$log" 2>&1
}

build_all() {
  say "building for $architecture in $build"
  command -v cmake >/dev/null || give_up "cmake is not on PATH; tools/install_dependencies.sh test installs it"
  run_logged configure cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCLUSTERFUSION_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$architecture" \
    -DCLUSTERFUSION_TESTS=ON -DCLUSTERFUSION_BENCHMARKS=ON ||
    { tail -n 20 "$logs/configure.log" >&2 && give_up "cmake failed; all of it is in $logs/configure.log"; }
  run_logged build cmake --build "$build" --target gpu_test decode_time ||
    { tail -n 20 "$logs/build.log" >&2 && give_up "the build failed; all of it is in $logs/build.log"; }
}

# "[  PASSED  ] 12 tests.": count_of PASSED
count_of() {
  sed -n "s/^\[  $1 *\] \([0-9]*\) tests\{0,1\}[.,].*/\1/p" "$logs/gpu_test.log" | tail -n 1
}

run_tests() {
  say "running the GPU tests (some minutes)"
  local began=$SECONDS status=0
  run_logged gpu_test "$build/bin/gpu_test" || status=$?
  local took=$((SECONDS - began)) passed failed skipped
  passed=$(count_of PASSED) failed=$(count_of FAILED) skipped=$(count_of SKIPPED)
  tests="${passed:-0} passed, ${failed:-0} failed, ${skipped:-0} skipped, in $took s"
  if [[ -z $passed && -z $failed ]]; then
    tests="ended with status $status before the last test: $(tail -n 1 "$logs/gpu_test.log")"
  elif [[ $status == 0 && ${passed:-0} == 0 ]]; then
    tests="none ran; $tests"
    status=1
  fi
  [[ $status == 0 ]] || result=1
}

# Pythia-2.8B has 5.6 GB of weights.
run_benchmark() {
  local shape=pythia-2.8b
  ((memory_mib >= 8000)) || shape=pythia-410m
  say "measuring $shape"
  "$build/bin/decode_time" "$shape" >"$logs/decode_time.json" 2>"$logs/decode_time.log" ||
    { times="failed: $(tail -n 1 "$logs/decode_time.log")" && result=1 && return; }
  times=$(sed 's/  */ /g' "$logs/decode_time.log")
}

report() {
  local commit
  commit=$(git rev-parse --short HEAD 2>/dev/null || echo "no repository")
  printf '\nSend this in, with %s/gpu_test.log if a test failed:\n\n' "$logs"
  printf '| | |\n|---|---|\n'
  printf '| card | %s, %s MiB |\n' "$card" "$memory_mib"
  printf '| compute capability | %s, code for %s |\n' "$capability" "$architecture"
  printf '| driver, CUDA | %s, %s |\n' "$driver" "$release"
  printf '| commit | %s |\n' "$commit"
  printf '| GPU tests | %s |\n' "$tests"
  sed -n 's/^\[  FAILED  \] \([^ ,]*\).*ms).*/| failed | \1 |/p' "$logs/gpu_test.log" | sort -u
  printf '%s\n' "$times" | sed 's/.*/| decode | & |/'
}

find_gpu
find_nvcc
mkdir -p "$logs" || give_up "$logs cannot be made"
result=0
build_all
run_tests
run_benchmark
report
exit "$result"
