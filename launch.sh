#!/usr/bin/env bash
# Makes the environment once, then trains, evaluates, chats or tests in it:
#
#   ./launch.sh train|eval|chat|test [options]
#
# PRAGNOSIA_VENV=/path/to/environment uses an environment that exists, and installs nothing.
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}

usage="usage: ./launch.sh train|eval|chat|test [options]     (./launch.sh train --help lists the options)"
root="$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P)"
verb="${1:-}"
case "$verb" in
    train | eval | chat | test) shift ;;
    -h | --help) echo "$usage" && exit ;;
    "") die "no command. $usage" ;;
    *) die "unknown command $verb: use train, eval, chat or test" ;;
esac

# Another active environment, conda or virtualenv, must not leak into ours.
unset PYTHONHOME PYTHONPATH PYTHONUSERBASE VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER
export PYTHONNOUSERSITE=1

need_gb=6
venv="$(realpath -m -s -- "${PRAGNOSIA_VENV:-$root/.venv}")"
python="$venv/bin/python"
new_enough="import sys; sys.exit(sys.version_info < (3, 11))"
headers="import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))"

find_python() { # prints the first usable Python, 3.11 or later; else dies saying why none is
    local name reason="no Python found"
    for name in python3.13 python3.12 python3.11 python3; do
        command -v "$name" >/dev/null && "$name" -c "" 2>/dev/null || continue
        if ! "$name" -c "$new_enough"; then
            reason="$("$name" -V) is too old"
        elif ! "$name" -c "import ensurepip, venv" 2>/dev/null; then
            reason="$name lacks the venv module: install ${name}-venv"
        elif ! "$name" -c "$headers"; then
            reason="$name lacks the headers that DeepSpeed's ops compile with: install ${name}-dev"
        else
            command -v "$name"
            return
        fi
    done
    die "Python 3.11 or later, with venv and headers, is needed: $reason"
}

make_environment() { # leaves no stamp unless all is installed
    local base free_kb log="$venv/install.log" temporary="$venv/temporary"
    free_kb="$(df -Pk -- "$root" | awk 'NR == 2 { print $4 }')"
    ((free_kb >= need_gb * 1024 * 1024)) ||
        die "the environment needs $need_gb GB in $root, and $((free_kb / 1024)) MB are free"
    base="$(find_python)"
    if [[ -e "$venv/unfinished" ]] || ! "$python" -c "$new_enough" 2>/dev/null; then
        "$base" -m venv --clear "$venv" || die "$base -m venv failed, see above"
    fi
    touch "$venv/unfinished"
    rm -f -- "$venv/stamp"
    mkdir -p -- "$temporary" # beside the environment: /tmp is often too small for the wheels
    echo "installing requirements.txt into $venv (some minutes; log: $log)" >&2
    # Modules are compiled when they are first imported: all of them, now, would take another minute.
    if ! TMPDIR="$temporary" "$python" -m pip install --disable-pip-version-check --no-compile \
        -r "$root/requirements.txt" >"$log" 2>&1; then
        die "pip failed: $(grep -m 1 '^ERROR' "$log" || tail -n 1 "$log") (log: $log)"
    fi
    rm -rf -- "$temporary" "$venv/unfinished"
}

command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
    die "no C++ compiler (c++ or g++), which DeepSpeed compiles its ops with: install g++"
if [[ -n "${PRAGNOSIA_VENV:-}" ]]; then
    "$python" -c "$new_enough" 2>/dev/null ||
        die "PRAGNOSIA_VENV=$venv holds no Python 3.11 or later in bin/python"
    "$python" -c "from importlib.util import find_spec as f; exit(not (f('torch') and f('deepspeed')))" ||
        die "PRAGNOSIA_VENV=$venv lacks torch or deepspeed: pip install -r requirements.txt there"
else
    [[ -w "$root" || -x "$python" ]] || die "$root is not writable: the environment goes into $root/.venv"
    stamp() { echo "$(cksum <"$root/requirements.txt") $("$python" -V 2>/dev/null)"; }
    if [[ "$(cat -- "$venv/stamp" 2>/dev/null)" != "$(stamp)" ]]; then
        make_environment
        stamp >"$venv/stamp"
    fi
fi
if [[ "$venv" == *[!A-Za-z0-9/._+@%=:,-]* ]]; then
    # PyTorch cannot link DeepSpeed's ops against a path with spaces, so the environment gets a plain second name.
    home=~
    plain="${XDG_CACHE_HOME:-$home/.cache}/pragnosia/environment-$(cksum <<<"$venv" | cut -d ' ' -f 1)"
    [[ "$plain" != *[!A-Za-z0-9/._+@%=:,-]* ]] ||
        die "neither $venv nor $plain can be built in: set XDG_CACHE_HOME to a path without spaces"
    mkdir -p -- "$(dirname -- "$plain")"
    ln -sfn -- "$venv" "$plain"
    venv="$plain"
    python="$venv/bin/python"
fi
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" # DeepSpeed calls ninja by name
# Compiled ops belong to one environment: two that share a folder rebuild them under each other's feet.
cache=~
cache="${XDG_CACHE_HOME:-$cache/.cache}/pragnosia"
TORCH_EXTENSIONS_DIR="$cache/ops-$(cksum <<<"$venv" | cut -d ' ' -f 1)"
export TORCH_EXTENSIONS_DIR

if [[ "$verb" == train && $# == 0 ]]; then
    set -- --config "$root/examples/quickstart.yaml"
fi
case "$verb" in
    train | eval) exec "$python" "$root/training/launch.py" "$root/${verb}_ds.py" "$@" ;;
    chat) exec "$python" "$root/chat_ds.py" "$@" ;; # starts its own ranks: the terminal stays with rank 0
esac
cd -- "$root"
style=0
"$python" -m ruff check . && "$python" -m ruff format --check . || style=1
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || exit
exit "$style"
