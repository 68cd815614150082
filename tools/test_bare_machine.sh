#!/usr/bin/env bash
# Tries out what README promises on machines with nothing on them: Debian roots made by debootstrap
# from the mirror that this machine's apt uses.
#   tools/test_bare_machine.sh [STEP ...]   without arguments: bookworm trixie wheel
# bookworm, trixie: `make generate` (as a user with sudo; as root), `cmake --install`, the C++ example;
#   where this machine has a CUDA toolkit, a part of the CUDA code.
# wheel: what is said where packages are missing; `make wheel` on Debian 12; the wheel, the program in
#   it and README's Python example on Debian 12 and 13 with nothing but Python.
# test_bookworm, test_trixie: `make test` from zero; half an hour each, so not without being named.
# Needs root. Where no root can be made it says so and ends well: then nothing was tested. The roots
# are in build/bare_machine; CLUSTERFUSION_KEEP_ROOTS=1 leaves them there.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(bookworm trixie wheel)

folder=$PWD/build/bare_machine
home=home/user/clusterfusion  # the project in a root

heading() { printf '\n==== bare machine: %s\n' "$*"; }

skip() {
  printf '\n######## SKIPPED, NOTHING TESTED ON A BARE MACHINE: %s ########\n\n' "$*"
  exit 0
}

# All mounts are made in a namespace of their own: they end with the script, however it ends.
if [ -z "${CLUSTERFUSION_IN_NAMESPACE:-}" ]; then
  [ "$(id -u)" = 0 ] || skip "not root"
  command -v apt-get >/dev/null || skip "no apt-get here"
  command -v debootstrap >/dev/null || apt-get install -y -q debootstrap >/dev/null ||
    { apt-get update -q && apt-get install -y -q debootstrap; } >/dev/null || skip "no debootstrap"
  unshare --mount --propagation private true || skip "mounting is not allowed here"
  CLUSTERFUSION_IN_NAMESPACE=1 exec unshare --mount --propagation private bash "$0" "$@"
fi

mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -1)
[ -n "$mirror" ] || skip "apt has no mirror of Debian"

# What reaches the mirrors from here must reach them from the roots: certificates, proxies, indices.
environment=(HOME=/home/user TERM=dumb "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
while IFS= read -r -d '' variable; do
  case $variable in PIP_* | *_proxy=* | *_PROXY=*) environment+=("$variable") ;; esac
done < <(env -0)

remove_root() {
  [ -e "$folder/$1" ] || return 0
  # In this namespace nothing is mounted there: run_in mounts in one of its own.
  if grep -qF " $folder/$1/" /proc/self/mountinfo; then
    echo "something is mounted in $folder/$1: left as it is" >&2
    return 1
  fi
  rm -rf --one-file-system "${folder:?}/$1"
}

# make_root NAME SUITE: a minimal Debian with git, make, sudo and this project in /home/user.
make_root() {
  local root=$folder/$1 suite=$2 base=$folder/$2.tar
  remove_root "$1"
  if [ -z "$(find "$base" -mtime -7 2>/dev/null)" ]; then
    heading "debootstrap $suite"
    mkdir -p "$folder"
    debootstrap --variant=minbase --include=git,make,ca-certificates,sudo "$suite" "$root" "$mirror" \
      >"$folder/debootstrap.log" || { tail -20 "$folder/debootstrap.log"; return 1; }
    apt-config dump | grep '^Acquire::' >"$root/etc/apt/apt.conf.d/99host"
    tar -cf "$base" -C "$root" .
  else
    mkdir -p "$root"
    tar -xf "$base" -C "$root"
  fi
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$root/etc/"
  chroot "$root" useradd --create-home --shell /bin/bash user
  echo 'user ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/user"
  mkdir "$root/$home"
  # As from an archive: what git knows or would take, and no repository.
  git ls-files -z --cached --others --exclude-standard |
    tar --null --files-from=- --ignore-failed-read -c | tar -x -C "$root/$home"
  chroot "$root" chown -R user: /home/user
}

# run_in ROOT USER COMMAND ...: in the project's folder; says how long it took.
run_in() {
  local root=$folder/$1 user=$2
  shift 2
  TIMEFORMAT="---- took %R s, %U + %S s of CPU: $*"
  time env -i "${environment[@]}" unshare --mount --pid --fork --kill-child bash -c '
    root=$1 user=$2
    shift 2
    mount -t proc proc "$root/proc"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
    mount -t tmpfs tmpfs "$root/dev/shm"
    [ ! -d "$root/usr/local/cuda" ] || mount --bind -o ro /usr/local/cuda "$root/usr/local/cuda"
    exec chroot "$root" setpriv --reuid "$user" --regid "$user" --init-groups \
      bash -c "cd /'"$home"' && exec \"\$@\"" bash "$@"' bash "$root" "$user" "$@" </dev/null
}

# expect_failure LOG WORDS ... -- COMMAND ...: the command fails, and all the words are in what it says.
expect_failure() {
  local log=$1 words=() word
  shift
  while [ "$1" != -- ]; do words+=("$1") && shift; done
  shift
  if "$@" >"$log" 2>&1; then
    cat "$log" && echo "FAILED: this should not have gone well: $*" && return 1
  fi
  for word in "${words[@]}"; do
    grep -qF -- "$word" "$log" || { cat "$log" && echo "FAILED: no word of '$word': $*" && return 1; }
  done
}

test_build() {  # SUITE USER
  heading "make generate on bare $1 as $2"
  make_root "build_$1" "$1"
  run_in "build_$1" "$2" make generate
  heading "make generate again, install, C++ example on $1"
  run_in "build_$1" "$2" tools/bare_machine/install_and_use.sh
  [ -d /usr/local/cuda ] || return 0
  heading "with a CUDA toolkit on $1"
  mkdir "$folder/build_$1/usr/local/cuda"
  run_in "build_$1" "$2" tools/bare_machine/compile_cuda.sh
  rmdir "$folder/build_$1/usr/local/cuda"
}

test_messages() {  # ROOT, with Python alone
  heading "messages where packages are missing"
  run_in "$1" root rm /etc/sudoers.d/user
  expect_failure "$folder/no_sudo.log" "cmake ninja" "apt-get install g++" -- run_in "$1" user make generate
  expect_failure "$folder/no_packages.log" "C++20 compiler" fmt DLPack Highway simdjson \
    "JSON for Modern C++" utf8proc PCRE2 CLI11 "tools/install_dependencies.sh build" -- \
    run_in "$1" user /home/user/venv/bin/pip install .
  grep -A14 'needs what CMake' "$folder/no_packages.log"
}

test_wheel() {
  [ -d "$folder/build_bookworm" ] || make_root build_bookworm bookworm
  heading "make wheel on bookworm"
  run_in build_bookworm user make wheel
  local wheels=("$folder/build_bookworm/$home"/dist/*.whl) suite
  ls -l "${wheels[@]}"
  [[ ${wheels[*]} == *-py3-none-manylinux_2_34_x86_64.whl ]] ||
    { echo "FAILED: Debian 12 should give one wheel, manylinux_2_34" && return 1; }
  for suite in bookworm trixie; do
    heading "the wheel on $suite with Python alone"
    make_root "wheel_$suite" "$suite"
    mkdir "$folder/wheel_$suite/wheel"
    cp "${wheels[@]}" "$folder/wheel_$suite/wheel"
    run_in "wheel_$suite" root sh -c 'apt-get update -q && apt-get install -y -q --no-install-recommends python3-venv' >/dev/null
    run_in "wheel_$suite" user tools/bare_machine/use_wheel.sh "/wheel/${wheels[0]##*/}"
  done
  test_messages wheel_bookworm
}

test_everything() {  # SUITE
  heading "make test on bare $1"
  make_root "test_$1" "$1"
  run_in "test_$1" user make test
}

for step in "${steps[@]}"; do
  case $step in
    bookworm) test_build bookworm user ;;
    trixie) test_build trixie root ;;
    wheel) test_wheel ;;
    test_bookworm | test_trixie) test_everything "${step#test_}" ;;
    *) echo "test_bare_machine: no step $step" >&2 && exit 2 ;;
  esac
done
if [ -z "${CLUSTERFUSION_KEEP_ROOTS:-}" ]; then
  for root in {build,wheel,test}_{bookworm,trixie}; do remove_root "$root"; done
fi
heading "all went well: ${steps[*]}"
