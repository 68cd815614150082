#!/usr/bin/env bash
# Runs every fuzzer for a while:  tests/fuzz/run.sh BUILD_FOLDER SECONDS
# What a fuzzer finds new goes to BUILD_FOLDER/fuzz; a crash ends the run with its exit code.
set -euo pipefail
build=$(realpath "$1")
seconds=$2
cd "$(dirname "$0")"
for folder in */; do
  target=${folder%/}
  fuzzer=$(find "$build" -type f -name "${target}_fuzzer" -print -quit)
  [ -n "$fuzzer" ] || { echo "run.sh: no ${target}_fuzzer under $build; build the asan preset" >&2; exit 1; }
  found=$build/fuzz/$target
  mkdir -p "$found"
  dictionary=()
  [ -f "$target/$target.dict" ] && dictionary=("-dict=$target/$target.dict")
  echo "$target: $seconds s"
  "$fuzzer" -max_total_time="$seconds" -max_len=4096 -rss_limit_mb=4096 -timeout=60 \
    -artifact_prefix="$found/" -verbosity=0 -print_final_stats=1 "${dictionary[@]}" \
    "$found" "$target/corpus"
done
echo "every fuzzer is clean"
