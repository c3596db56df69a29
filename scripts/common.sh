# shellcheck shell=bash
# What the shell scripts here share; to be sourced.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MPISIGN_VENV:-$root/.venv}

say() { printf '==> %s\n' "$*"; }

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# The first Python that runs (a pyenv shim may not) and is new enough: $PYTHON, if set, and no other.
find_python() {
    local candidate candidates=("${PYTHON:-python3}")
    [[ -n ${PYTHON:-} ]] || candidates+=(python3.14 python3.13 python3.12 python3.11 python3.10)
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer among: ${candidates[*]}. Install one, or name yours: PYTHON=/path/to/python3 $0"
}

# make_environment EXTRAS: a virtual environment in $venv with mpisign[EXTRAS], first on PATH.
#
# The install is editable: Python then reads mpisign/ itself, so that a changed source needs no new install, and
# only a changed setup.py, pyproject.toml or constraints.txt (or a moved repository) does. The stamp knows.
make_environment() {
    local extras=$1 stamp="$venv/.mpisign-$1" state
    state="$root $(cat "$root/setup.py" "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)"
    if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$state" ]]; then
        say "The environment in $venv is up to date"
    else
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            make_venv
        fi
        say "Installing mpisign[$extras] and the pinned packages (the first time, torch may take minutes to download)"
        "$venv/bin/python" -m pip install -c "$root/scripts/constraints.txt" -e "${root}[$extras]" ||
            fail "pip could not install the packages; its message is above. Behind a mirror or without a network," \
                "set PIP_INDEX_URL or PIP_FIND_LINKS; for another Python, remove $venv and set PYTHON"
        printf '%s\n' "$state" >"$stamp"
    fi
    export PATH="$venv/bin:$PATH"
}

make_venv() {
    local python
    if [[ -e $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        fail "$venv is there and is not a virtual environment: name another place with MPISIGN_VENV"
    fi
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: the modules venv and ensurepip are missing." \
            "On Debian and Ubuntu: sudo apt install python3-venv. Without root: take another Python," \
            "e.g. conda's or uv's: PYTHON=/path/to/python3 $0"
    say "Making a virtual environment in $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

# run_ranks RANKS COMMAND...: on this machine, however few cores it has, by the launcher of the environment's MPI. Ranks
# are bound to no cores, as other programs may share them.
run_ranks() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    say "$1 ranks: ${*:2}"
    python -m mpisign run -n "$1" --bind none "${@:2}" </dev/null
}
