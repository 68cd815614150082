#!/usr/bin/env bash
# After `make generate` on a bare machine: README's next steps. Run by tools/test_bare_machine.sh.
set -euo pipefail
prompt='The "old" house `id` $HOME'

# Nothing is left to install or to build, and the prompt arrives as it was typed.
make generate PROMPT="$prompt" GENERATE_OPTIONS="--max-new-tokens 8 --seed 1" >/tmp/text 2>/tmp/rerun
cat /tmp/text
grep -qF "ninja: no work to do" /tmp/rerun
[[ $(cat /tmp/text) == "$prompt"?* ]]

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
"${as_root[@]}" cmake --install build/release
"${as_root[@]}" ldconfig
/usr/local/bin/clusterfusion --version
/usr/local/bin/clusterfusion generate models/demo -p "The old house" --max-new-tokens 8 --seed 3

cmake -S examples/cpp -B /tmp/example
cmake --build /tmp/example
/tmp/example/generate models/demo "The old house"
