#!/usr/bin/env bash
# use_wheel.sh WHEEL: README's commands for whoever installs the wheel, in a new virtual environment.
# Run by tools/test_bare_machine.sh where no compiler and none of the libraries is.
set -euo pipefail
python3 -m venv ~/venv
~/venv/bin/pip install --quiet "$1"
PATH=$HOME/venv/bin:$PATH

clusterfusion --version
grep '^clusterfusion [a-z]* models/demo' README.md | grep -v '^clusterfusion serve' >/tmp/commands
[ "$(wc -l </tmp/commands)" -ge 6 ]
bash -ex /tmp/commands

pip install --quiet "$1[serve]"
serve=$(grep '^clusterfusion serve models/demo' README.md)
echo "+ $serve"
$serve &
server=$!
python - <<'PYTHON'
import json
import time
import urllib.error
import urllib.request

request = urllib.request.Request(
    "http://127.0.0.1:8000/v1/completions",
    json.dumps({"prompt": "The old house", "seed": 1}).encode(),
    {"Content-Type": "application/json"},
)
for attempt in range(100):
    try:
        with urllib.request.urlopen(request) as answer:
            print(json.load(answer)["choices"][0]["text"])
            break
    except urllib.error.URLError:
        time.sleep(0.2)
else:
    raise SystemExit("the server does not answer")
PYTHON
kill -TERM $server
wait $server || [ $? = 143 ] # it ends in good order, then by the signal

project=$PWD
cd /tmp # not beside the sources
text=$(python "$project/examples/python/generate.py" "$project/models/demo" "The old house")
[ -n "$text" ] && echo "$text"
PROJECT=$project python - <<'PYTHON'
import os

import clusterfusion
import numpy as np

tokenizer = clusterfusion.Tokenizer(os.environ["PROJECT"] + "/models/demo")
print(clusterfusion.__version__, tokenizer.encode("The old house"))
mlp = np.ones((1, 8), np.float16), np.ones((1, 8), np.float16), np.ones(32, np.float16)
weights = np.ones((8, 32), np.float16), np.zeros(8, np.float16)
assert (clusterfusion.ops.mlp_down(*mlp, *weights) == 34).all()  # 1 + 1 + 32
PYTHON
