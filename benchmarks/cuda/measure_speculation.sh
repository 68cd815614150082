#!/usr/bin/env bash
# All that docs/speculation.md says of a GPU, in one go: about four minutes on an H200.
#
#   measure_speculation.sh BIN DATA OUT [SECONDS]
#
# BIN has speculation_time and gpu_engine_test, DATA the novels (novels-train.txt.xz and
# novels-valid.txt.xz), PYTHON (python3 without it) this package, torch and transformers. A pair of
# models is trained for SECONDS (65) while the random schedules and drafted texts are tested, whose
# times do not count. OUT gets tests.txt, speculation_h200.json, which has all figures of the GPU,
# and speculation_texts_cpu.json. Pythia-6.9B's heads need CLUSTERFUSION_CUDA_HEAD_STEPS=5;8.
set -uo pipefail
bin=$1 data=$2 out=$3 seconds=${4:-65}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
pair=$(mktemp -d)
demo=$(cd "$here/../models/demo" && pwd)
began=$SECONDS
stage() { echo "== $((SECONDS - began)) s: $1" >&2; }
# By hand where there is no repository.
commit=${COMMIT:-$(git -C "$here" rev-parse HEAD)}
about="commit $commit, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader)"

stage "training, and tests beside it"
"$python" "$here/../tools/train_draft_pair.py" "$pair" --data "$data" --seconds "$seconds" \
  --draft-seconds 15 > "$out/training.txt" 2>&1 &
training=$!
tests=()
for process in 0 1 2; do
  CLUSTERFUSION_FIRST_SCHEDULE=$((167 * process)) CLUSTERFUSION_SCHEDULES=167 timeout 150 \
    "$bin/gpu_engine_test" --gtest_filter='RandomSchedules.EachTextIsTheOneAlone' \
    > "$out/schedules_$process.txt" 2>&1 &
  tests+=($!)
done
CLUSTERFUSION_DRAFTED_REQUESTS=1000 timeout 150 "$bin/gpu_engine_test" \
  --gtest_filter='DraftedTexts.*:OneText.*:RandomSchedules.Memory*' > "$out/drafted.txt" 2>&1 &
tests+=($!)
failed=0
for test in "${tests[@]}"; do wait "$test" || failed=1; done
stage "tests ended, failed: $failed"
cat "$out"/schedules_?.txt "$out/drafted.txt" > "$out/tests.txt"
rm "$out"/schedules_?.txt "$out/drafted.txt"
wait "$training" || failed=1
tail -n 4 "$out/training.txt" >&2

stage "theory, costs, acceptance"
measured=()
measure() {
  local file=$out/speculation_$1.json
  if timeout 60 "$bin/speculation_time" "${@:2}" > "$file"; then measured+=("$file"); else failed=1; fi
}
measure theory --theory pythia-2.8b --tokens 192
measure costs --costs pythia-6.9b --draft-shape pythia-70m
measure acceptance --model "$pair/target" --drafts "ngram,$pair/draft,$demo" \
  --prompts "$here/speculation_texts.json"

stage "texts on the GPU"
timeout 90 "$python" "$here/speculation_texts.py" "$pair/target" --device cuda --per-kind 6 \
  --drafts "ngram,$pair/draft,$demo" --pair "$pair/pair.json" --about "$about" \
  --output "$out/speculation_h200.json" --measured "${measured[@]}" || failed=1

stage "texts on the CPU"
timeout 60 "$python" "$here/speculation_texts.py" "$pair/target" --device cpu --per-kind 2 \
  --tokens 96 --rounds 2 --drafts "ngram,$demo,$pair/draft" --about "$about" \
  --output "$out/speculation_texts_cpu.json" || failed=1
stage "done, failed: $failed"
exit "$failed"
