# Sourced by run_train.sh and run_tests.sh with REPO set; takes the extras to install, "progress,pictures" or "test".
# Leaves in PYTHON an interpreter that has the packages pyproject.toml asks for: the active one, else .venv, made if need be.

# Prints the path of the interpreter $1 if it has everything (the extra $2 included), by what is installed, importing none of it.
complete_python() {
    "$1" - "$REPO/pyproject.toml" "$2" 2>/dev/null <<'CHECK'
import sys
sys.path.pop(0)  # the caller's folder
import importlib.metadata, os.path
try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib
from packaging.requirements import Requirement  # comes with tensorboard

project = tomllib.load(open(sys.argv[1], "rb"))["project"]

def check(lines):
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                check(project["optional-dependencies"][extra])
        elif requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)

assert not os.path.exists(os.path.join(sys.prefix, ".installing"))
check(project["dependencies"] + project["optional-dependencies"].get(sys.argv[2], []))
print(sys.executable)
CHECK
}

# An install that was interrupted leaves its mark, and begins anew. A good .venv is only touched if all that it lacks can be had.
install_venv() {
    local venv="$REPO/.venv" base
    local install=(-m pip install --quiet --disable-pip-version-check -e "$REPO[$1]")
    if [ -e "$venv/.installing" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        for base in python3 python python3.13 python3.12 python3.11 python3.10 none; do
            "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        done
        if [ "$base" = none ]; then
            echo "error: there is no Python 3.10 or newer on PATH: install one" >&2
            return 2
        fi
        "$base" -m venv --clear "$venv" || return
    else
        "$venv/bin/python" "${install[@]}" --dry-run || return
    fi
    touch "$venv/.installing"
    "$venv/bin/python" "${install[@]}" || return
    rm "$venv/.installing"
}

find_python() {
    local extra="" venv="$REPO/.venv/bin/python"
    [ "$1" = test ] && extra=test # the others only add comfort, an environment will do without
    for PYTHON in python python3; do
        PYTHON=$(complete_python "$PYTHON" "$extra") && return
    done
    exec 9<"$REPO"
    command -v flock >/dev/null && flock 9 # one installs, whoever comes meanwhile waits and finds it done
    if ! PYTHON=$(complete_python "$venv" "$extra"); then
        echo "No active Python environment has this project's packages: installing them into $REPO/.venv (once, takes minutes)"
        install_venv "$1" && PYTHON=$(complete_python "$venv" "$extra") || {
            local status=$?
            echo "error: installing into $REPO/.venv failed: see above, then start again" >&2
            return "$status"
        }
    fi
    exec 9<&-
}

find_python "$1" || exit
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" # this checkout's packages, whatever is installed
