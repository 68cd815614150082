#!/usr/bin/env bash
# After `make generate` on a bare machine: README's next steps. Run by tools/test_bare_machine.sh.
set -euo pipefail
prompt='The "old" house `id` $HOME'

# Nothing is left to install or to build, and the prompt arrives as it was typed.
make generate PROMPT="$prompt" GENERATE_OPTIONS="--max-new-tokens 8 --seed 1" >/tmp/text 2>/tmp/rerun
cat /tmp/text
grep -qF "ninja: no work to do" /tmp/rerun
[[ $(cat /tmp/text) == "$prompt"?* ]]

# README's commands, as they are there.
sed -n '/^sudo cmake --install/,/^```/{/^```/!p}' README.md >/tmp/commands
grep -qF build/example/generate /tmp/commands
bash -ex /tmp/commands
/usr/local/bin/clusterfusion --version
