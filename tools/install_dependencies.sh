#!/usr/bin/env bash
# Installs what building and testing need: Debian's packages, and a virtual environment in .venv with
# requirements-dev.txt. Does nothing where all is there; uses sudo if it is not run as root.
#   tools/install_dependencies.sh build   what `make generate` needs (no Python)
#   tools/install_dependencies.sh test    the rest as well
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=${1:-test}

build_packages=(g++ ccache cmake ninja-build pkg-config libhwy-dev libsimdjson-dev nlohmann-json3-dev
  libutf8proc-dev libcli11-dev libfmt-dev libspdlog-dev libdlpack-dev)
test_packages=(libgtest-dev libgmock-dev libbenchmark-dev clang libclang-rt-14-dev python3 python3-venv
  python3-dev xz-utils)

packages=("${build_packages[@]}")
[ "$purpose" = build ] || packages+=("${test_packages[@]}")

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || {
    echo "install_dependencies: this system has no apt-get; install the equivalents of: ${missing[*]}" >&2
    exit 1
  }
  echo "install_dependencies: installing ${missing[*]}" >&2
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get update -q >&2
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -q --no-install-recommends \
    "${missing[@]}" >&2
fi

[ "$purpose" = build ] && exit 0

# The environment is made anew when the list of packages changes.
stamp=.venv/requirements.sha256
if ! sha256sum --check --status "$stamp" 2>/dev/null; then
  python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet -r requirements-dev.txt
  sha256sum requirements-dev.txt >"$stamp"
fi
