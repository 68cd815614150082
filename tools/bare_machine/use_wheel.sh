#!/usr/bin/env bash
# use_wheel.sh WHEEL: README's commands for whoever installs the wheel, in a new virtual environment.
# Run by tools/test_bare_machine.sh where no compiler and none of the libraries is.
set -euo pipefail
python3 -m venv ~/venv
~/venv/bin/pip install --quiet "$1"
PATH=$HOME/venv/bin:$PATH

clusterfusion --version
clusterfusion generate models/demo --echo -p "The old house" --max-new-tokens 8 --seed 3
clusterfusion info models/demo
cd /tmp  # not beside the sources
text=$(python ~/clusterfusion/examples/python/generate.py ~/clusterfusion/models/demo "The old house")
[ -n "$text" ] && echo "$text"
python - <<'PYTHON'
import clusterfusion
import numpy as np

assert clusterfusion.ops  # the layer calls are there
tokens = clusterfusion.Tokenizer(f"{__import__('os').path.expanduser('~')}/clusterfusion/models/demo")
print(clusterfusion.__version__, tokens.encode("The old house"), np.__version__)
PYTHON
