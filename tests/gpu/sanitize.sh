#!/usr/bin/env bash
# The GPU tests' small shapes and a few tokens of the demo model under compute-sanitizer:
#   tests/gpu/sanitize.sh BUILD_DIR [LOG_DIR [TOOL ...]]
# Tools: memcheck, synccheck and initcheck unless others are named, and racecheck where RACECHECK_BUILD
# names the build of its own that it needs (docs/testing.md). SANITIZE_PROGRAMS names the programs;
# racecheck looks at fewer of them. Prints a line for each tool and program; exits with 1 if a program
# failed, did not end in time, or an error was found, with 2 for wrong arguments.
set -uo pipefail
cd "$(dirname "$0")/../.."
build=${1:?usage: tests/gpu/sanitize.sh BUILD_DIR [LOG_DIR [TOOL ...]]}
logs=${2:-$(mktemp -d)}
shift $(($# < 2 ? $# : 2))
tools=("$@")
((${#tools[@]})) || tools=(memcheck synccheck initcheck ${RACECHECK_BUILD:+racecheck})
if [[ " ${tools[*]} " == *" racecheck "* && -z ${RACECHECK_BUILD:-} ]]; then
  echo "sanitize.sh: racecheck needs a build of its own in RACECHECK_BUILD (docs/testing.md)" >&2
  exit 2
fi
seconds=${SANITIZE_SECONDS:-150} # for each program
mkdir -p "$logs"

# Each way of the kernel (both types, one layer and several, parallel and sequential residual) and of
# choosing a token, over more than one page of the KV cache; what grows with the model's size is left out.
options() { # those of the layer calls' options
  local name
  for name in odd qwen3_rows rows_5 rows_16 pages_of_16 pages_of_32_streamed_32_at_70 streamed_gaps_of_1; do
    printf ':*LayerOptionCases*/%s' "$name"
  done
}
filter_of() { # filter_of PROGRAM: which of gpu_test's tests that is, if it is some of them
  local held="*.EndOnTheSmsThatThereAre/*:*.TakeInBlocksThatStartLate/*"
  case $1 in
    gpu_test) echo "*/tiny*:*/one_layer:*/head_16:PoisonedMemory.*-*LayerShapes*:*LayerRuns*" ;;
    # Without the tests that hold SMs: the tools let one kernel run after the other.
    layer) echo "*LayerShapes*/tiny*:*LayerShapes*/head_16:*LayerShapes*/long_context:*LayerRuns*/tiny$(options)-$held" ;;
    layer_small) echo "*LayerShapes*/tiny*:*LayerShapes*/head_16" ;;
  esac
}
under() { # under TOOL PROGRAM
  local bin=$build/bin tokens=20 sampled=70
  local -a command options=()
  if [[ $1 == racecheck ]]; then
    # A step takes seconds.
    bin=$RACECHECK_BUILD/bin tokens=4 sampled=4
  fi
  case $2 in
    gpu_test | layer | layer_small)
      export CLUSTERFUSION_LAYER_REPEATS=3
      command=("$bin/gpu_test" --gtest_brief=1 "--gtest_filter=$(filter_of "$2")") ;;
    greedy) command=("$bin/clusterfusion" generate models/demo --device cuda
      --prompt "$(head -c 600 README.md)" --max-new-tokens "$tokens") ;;
    sampled) command=("$bin/clusterfusion" generate models/demo --device cuda
      --prompt It --max-new-tokens "$sampled" --temperature 0.8 --ignore-eos) ;;
  esac
  timeout "$seconds" compute-sanitizer --tool "$1" --print-limit 20 "${options[@]}" "${command[@]}"
}

programs_of() { # programs_of TOOL
  if [[ -n ${SANITIZE_PROGRAMS:-} ]]; then
    echo "$SANITIZE_PROGRAMS"
  elif [[ $1 == racecheck ]]; then
    echo layer_small greedy sampled
  else
    echo gpu_test layer greedy sampled
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
