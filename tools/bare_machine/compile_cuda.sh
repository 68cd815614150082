#!/usr/bin/env bash
# With a CUDA toolkit in /usr/local/cuda and no GPU: `make generate` leaves the CUDA code out, and a
# build that asks for it finds the toolkit. A part is compiled; all takes five CPU minutes. Run by
# tools/test_bare_machine.sh.
set -euo pipefail
make generate GENERATE_OPTIONS="--max-new-tokens 8 --seed 1" >/tmp/text 2>/tmp/log
grep -F "CUDA: off" /tmp/log
grep -qF "ninja: no work to do" /tmp/log
cmake --preset program -B /tmp/cuda -DCLUSTERFUSION_CUDA=ON >/tmp/log
grep -F "CUDA: on" /tmp/log
ninja -C /tmp/cuda src/backend/cuda/CMakeFiles/cf_backend_cuda.dir/{read_ceiling.cu,tensor_map.cpp}.o
