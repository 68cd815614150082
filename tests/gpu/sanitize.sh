#!/usr/bin/env bash
# The GPU tests' small shapes and a few tokens of the demo model under compute-sanitizer:
#   tests/gpu/sanitize.sh BUILD_DIR [LOG_DIR [TOOL ...]]
# Tools: memcheck, synccheck, initcheck and racecheck unless others are named. SANITIZE_PROGRAMS names
# the programs; racecheck alone takes only the cluster tests if it is not set (docs/testing.md says
# why). Prints a line for each tool and program; exits with 1 if a program failed, did not end in time,
# or an error was found.
set -uo pipefail
cd "$(dirname "$0")/../.."
build=${1:?usage: tests/gpu/sanitize.sh BUILD_DIR [LOG_DIR [TOOL ...]]}
logs=${2:-$(mktemp -d)}
shift $(($# < 2 ? $# : 2))
tools=("$@")
((${#tools[@]})) || tools=(memcheck synccheck initcheck racecheck)
seconds=${SANITIZE_SECONDS:-150} # for each program
mkdir -p "$logs"

# Each way of the kernel (both types, one layer and several, parallel and sequential residual) and of
# choosing a token, over more than one page of the KV cache; what grows with the model's size is left out.
filter_of() { # filter_of PROGRAM: which of gpu_test's tests that is, if it is some of them
  case $1 in
    gpu_test) echo "*/tiny*:*/one_layer:*/head_16:PoisonedMemory.*-*LayerShapes*:*LayerRuns*" ;;
    cluster) echo "*/Cluster.Sums/4:*/Cluster.SoftmaxStates/2:*/Cluster.KeepsTheOrderOfRanks/8" ;;
    layer) echo "*LayerShapes*/tiny*:*LayerShapes*/head_16:*LayerShapes*/long_context:*LayerRuns*/tiny" ;;
  esac
}
under() { # under TOOL PROGRAM
  local -a command
  case $2 in
    gpu_test | cluster | layer)
      export CLUSTERFUSION_LAYER_REPEATS=3
      command=("$build/bin/gpu_test" --gtest_brief=1 "--gtest_filter=$(filter_of "$2")") ;;
    greedy) command=("$build/bin/clusterfusion" generate models/demo --device cuda
      --prompt "$(head -c 600 README.md)" --max-new-tokens 20) ;;
    sampled) command=("$build/bin/clusterfusion" generate models/demo --device cuda
      --prompt It --max-new-tokens 70 --temperature 0.8 --ignore-eos) ;;
  esac
  timeout "$seconds" compute-sanitizer --tool "$1" --print-limit 20 "${command[@]}"
}

programs_of() { # programs_of TOOL
  if [[ -n ${SANITIZE_PROGRAMS:-} ]]; then
    echo "$SANITIZE_PROGRAMS"
  elif [[ $1 == racecheck ]]; then
    echo cluster
  else
    echo gpu_test cluster layer greedy sampled
  fi
}

failed=0
line='%-10s %-10s %8s %8s  %s\n'
# shellcheck disable=SC2059  # the format is the one above
printf "$line" tool program errors seconds verdict
for tool in "${tools[@]}"; do
  for name in $(programs_of "$tool"); do
    log="$logs/sanitize_${tool}_$name.log"
    begin=$SECONDS
    under "$tool" "$name" >"$log" 2>&1
    code=$?
    errors=$(sed -n 's/^=* \(ERROR\|RACECHECK\) SUMMARY: \([0-9]*\) .*/\2/p' "$log" | tail -1)
    verdict=clean
    if ((code == 124)); then
      verdict="not done after $seconds s"
    elif [[ -z $errors ]]; then
      verdict="no summary"
    elif ((errors > 0)); then
      verdict=errors
    elif ((code != 0)); then
      verdict="exit status $code"
    fi
    [[ $verdict == clean ]] || failed=1
    # shellcheck disable=SC2059
    printf "$line" "$tool" "$name" "${errors:--}" $((SECONDS - begin)) "$verdict"
  done
done
((failed)) && echo "logs: $logs"
exit "$failed"
