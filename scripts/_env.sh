# shellcheck shell=bash
# Sourced by the other scripts: finds or makes the developer's virtual environment and exports
#
#   LLMUX_VENV    its directory, in the cache, outside the tree
#   LLMUX_PYTHON  its interpreter
#
# The directory is named after a hash of pyproject.toml's dependencies and the base interpreter, so
# that a changed list makes a new environment, and an unchanged one costs 0.1 s. Needs Python 3.11 or
# newer; with root it installs what is missing with apt, without it says which package is missing.

_llmux_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
_llmux_cache=${LLMUX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llmux}

_llmux_say() { printf 'env: %s\n' "$*" >&2; }

_llmux_apt() { # install packages as root; otherwise say which are needed and fail
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        _llmux_say "packages missing: $*; next step: sudo apt-get install --no-install-recommends $*"
        return 1
    fi
    _llmux_say "installing on this host: $*"
    local log
    log=$(mktemp)
    if ! { apt-get -q -o DPkg::Lock::Timeout=180 update &&
        DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=180 \
            install --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        rm -f "$log"
        _llmux_say "apt-get could not install $*; next step: read the lines above"
        return 1
    fi
    rm -f "$log"
}

# One start of the interpreter answers all: is it new enough, which one is it, what is the key, what
# is wanted. Prints: executable, version, key, then one requirement per line.
# shellcheck disable=SC2016 # the dollar signs are Python's
_llmux_facts='
import hashlib, os, sys
if sys.version_info < (3, 11):
    sys.exit(1)
import tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
wanted = sorted(project["project"]["dependencies"] + project["dependency-groups"]["dev"])
executable = os.path.realpath(sys.executable)
version = "%d.%d.%d" % sys.version_info[:3]
# The number at the end: raise it when this script changes what it installs.
key = hashlib.sha256(repr((wanted, executable, version, 1)).encode()).hexdigest()[:12]
print(executable, version, key, *wanted, sep="\n")
'

_llmux_find_python() {
    local candidate
    for candidate in ${LLMUX_BASE_PYTHON:+"$LLMUX_BASE_PYTHON"} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        command -v "$candidate" >/dev/null || continue
        if _llmux_answer=$("$candidate" -I -c "$_llmux_facts" "$_llmux_root/pyproject.toml" 2>/dev/null); then
            return 0
        fi
    done
    return 1
}

_llmux_make_venv() { # base interpreter, target
    local python=$1 target=$2 version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        if "$python" -m virtualenv --version >/dev/null 2>&1; then
            "$python" -m virtualenv -q "$target"
            return
        fi
        _llmux_apt "python$version-venv" || return 1
    fi
    "$python" -m venv "$target"
}

_llmux_pystemd() { # the D-Bus bindings are built against libsystemd: not everywhere possible
    local target=$1 requirement=$2 python=$3 package missing=() header
    local pip=("$target/bin/python" -m pip --disable-pip-version-check -q install --no-input)
    if "${pip[@]}" --only-binary :all: "$requirement" >/dev/null 2>&1; then
        return 0
    fi
    for package in gcc pkg-config; do
        command -v "$package" >/dev/null || missing+=("$package")
    done
    pkg-config --exists libsystemd 2>/dev/null || missing+=(libsystemd-dev)
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
    if [ ! -e "$header" ]; then
        missing+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev")
    fi
    if [ ${#missing[@]} != 0 ] && ! _llmux_apt "${missing[@]}"; then
        _llmux_say "left out: pystemd (see above); tests that need it are skipped"
        return 0
    fi
    if ! "${pip[@]}" "$requirement" >"$target/pystemd.log" 2>&1; then
        tail -n 8 "$target/pystemd.log" >&2
        _llmux_say "left out: pystemd does not build here; tests that need it are skipped"
    fi
}

_llmux_build() { # base interpreter, target, requirements…
    local python=$1 target=$2 began=$SECONDS requirement pystemd="" plain=()
    shift 2
    for requirement in "$@"; do
        case $requirement in
        pystemd*) pystemd=$requirement ;;
        *) plain+=("$requirement") ;;
        esac
    done
    _llmux_say "making the environment in $target (a minute, once)"
    # An interrupted build has no marker; a virtual environment is not worth repairing.
    rm -rf -- "$target"
    mkdir -p -- "$target" || return 1
    _llmux_make_venv "$python" "$target" || return 1
    if ! "$target/bin/python" -m pip --disable-pip-version-check -q install --no-input \
        "${plain[@]}" >"$target/pip.log" 2>&1; then
        tail -n 15 "$target/pip.log" >&2
        _llmux_say "pip could not install what pyproject.toml names; next step: read the lines above"
        return 1
    fi
    if [ -n "$pystemd" ]; then
        _llmux_pystemd "$target" "$pystemd" "$python"
    fi
    : >"$target/complete"
    _llmux_say "made the environment in $((SECONDS - began)) s"
}

_llmux_environment() {
    local answer=() python key target
    if ! _llmux_find_python && ! { _llmux_apt python3 python3-venv && _llmux_find_python; }; then
        _llmux_say "no Python 3.11 or newer; next step: install one, or name it in LLMUX_BASE_PYTHON"
        return 1
    fi
    mapfile -t answer <<<"$_llmux_answer"
    python=${answer[0]} key=${answer[2]}
    target=$_llmux_cache/venv-$key
    if [ ! -e "$target/complete" ]; then
        mkdir -p -- "$_llmux_cache" || return 1
        # Two scripts at once build it once.
        (
            exec 9>"$target.lock"
            flock 9
            [ -e "$target/complete" ] || _llmux_build "$python" "$target" "${answer[@]:3}" 9>&-
        ) || return 1
    fi
    export LLMUX_VENV=$target LLMUX_PYTHON=$target/bin/python
}

_llmux_environment || {
    unset LLMUX_VENV LLMUX_PYTHON
    # shellcheck disable=SC2317 # reached when it is run instead of sourced
    return 1 2>/dev/null || exit 1
}
