# Sourced by run_train.sh and run_tests.sh with REPO set; takes the extras to install, "progress,pictures" or "test".
# Leaves in PYTHON an interpreter that has the packages pyproject.toml asks for: the active one, else .venv, made if need be.
# CHUNKFLOW_PYTHON names one to use as it is: nothing is installed, and what it lacks is told.

# Prints the path of the interpreter $1 if it has everything (the extras $2 included), by what is installed, importing none
# of it. With $3: if it has enough to start; what it lacks, and what that costs, goes to stderr, a line each.
complete_python() {
    "$1" - "$REPO/pyproject.toml" "$2" "$3" <<'CHECK'
import sys
sys.path.pop(0)  # the caller's folder
import importlib.metadata, os.path
try:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    try:
        from packaging.requirements import Requirement  # comes with tensorboard
    except ModuleNotFoundError:
        from pip._vendor.packaging.requirements import Requirement
except ModuleNotFoundError as missing:
    sys.exit(f"error: {sys.executable} lacks {missing.name.split('.')[0]}: install it, or name another CHUNKFLOW_PYTHON")

NEEDED = ("torch", "tomli", "jinja2", "pytest")
COSTS = {
    "torch": "not tested; before 2.13 there is no validation and no pipeline",
    "torchao": "no float8, no int8, no AdamW8bit",
    "tensorboard": "no TensorBoard: set metrics.enable_tensorboard = false",
    "sentencepiece": "no sentencepiece tokenizer, and the shipped one is one",
    "safetensors": "no weights from or to Hugging Face folders",
    "tokenizers": "no tokenizer.json",
    "jinja2": "chat templates, also of others, run in a sandbox with known holes",
    "pyarrow": "no parquet and no .zst data",
    "tqdm": "no progress bars",
    "matplotlib": "no pictures of plans",
}
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
lacking, needed = [], []

def check(lines):
    for requirement in map(Requirement, lines):
        name = requirement.name
        if name == project["name"]:
            for extra in requirement.extras:
                check(project["optional-dependencies"][extra])
        elif requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                has = importlib.metadata.version(name)
                if requirement.specifier.contains(has, prereleases=True):
                    continue
                has = f"is {has}"
            except importlib.metadata.PackageNotFoundError:
                has = "is missing"
                if name in NEEDED:
                    needed.append(name)
            cost = COSTS.get(name) if name not in needed else "nothing runs without it"
            lacking.append(f"  {name}{requirement.specifier} {has}" + (f": {cost}" if cost else ""))

assert not os.path.exists(os.path.join(sys.prefix, ".installing"))
check(project["dependencies"])
for extra in filter(None, sys.argv[2].split(",")):
    check(project["optional-dependencies"][extra])
if lacking and sys.argv[3]:
    print(f"{sys.executable} is used as it is (CHUNKFLOW_PYTHON), without these of pyproject.toml:", *lacking, sep="\n", file=sys.stderr)
    if needed:
        sys.exit(f"error: {sys.executable} lacks {', '.join(needed)}: install it, or name another CHUNKFLOW_PYTHON")
elif lacking:
    sys.exit(1)
print(sys.executable)
CHECK
}

# Runs pip: a line for each package that it fetches, with its size, since all of them take minutes; its errors, not its warnings.
with_progress() {
    local line file version
    {
        "$@" 2>&1 >&3 | while IFS= read -r line; do
            case "$line" in WARNING:\ * | DEPRECATION:\ *) ;; *) echo "$line" >&2 ;; esac
        done
        exit "${PIPESTATUS[0]}"
    } 3>&1 | while IFS= read -r line; do
        case "$line" in
            *Downloading*.metadata*) ;;
            *Downloading\ *)
                file=${line##*Downloading } file=${file##*/} version=${file#*-}
                echo "  ${file%%-*} ${version%%-*} (${line##*(}"
                ;;
            Installing\ collected*) echo "  everything is here: installing it" ;;
        esac
    done
    return "${PIPESTATUS[0]}"
}

# An install that was interrupted leaves its mark, and begins anew. A good .venv is only touched if all that it lacks can be had.
install_venv() {
    local venv="$REPO/.venv" base
    local install=(-m pip install --disable-pip-version-check -e "$REPO[$1]")
    export PIP_PROGRESS_BAR=off # a line for each package will do
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
        with_progress "$venv/bin/python" "${install[@]}" --dry-run || return
    fi
    touch "$venv/.installing"
    with_progress "$venv/bin/python" "${install[@]}" || return
    rm "$venv/.installing"
}

find_python() {
    local extra="" venv="$REPO/.venv/bin/python"
    if [ -n "$CHUNKFLOW_PYTHON" ]; then
        if ! "$CHUNKFLOW_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "error: CHUNKFLOW_PYTHON = $CHUNKFLOW_PYTHON is no Python 3.10 or newer: name an interpreter, or unset it" >&2
            return 2
        fi
        PYTHON=$(complete_python "$CHUNKFLOW_PYTHON" "$1" tell) || return 2
        return
    fi
    [ "$1" = test ] && extra=test # the others only add comfort, an environment will do without
    for PYTHON in python python3; do
        PYTHON=$(complete_python "$PYTHON" "$extra" 2>/dev/null) && return
    done
    exec 9<"$REPO"
    command -v flock >/dev/null && flock 9 # one installs, whoever comes meanwhile waits and finds it done
    if ! PYTHON=$(complete_python "$venv" "$extra" 2>/dev/null); then
        echo "No active Python environment has this project's packages: installing them into $REPO/.venv (once, takes minutes)"
        install_venv "$1" && PYTHON=$(complete_python "$venv" "$extra" 2>/dev/null) || {
            local status=$?
            echo "error: installing into $REPO/.venv failed: see above, then start again" >&2
            return "$status"
        }
    fi
    exec 9<&-
}

find_python "$1" || exit
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" # this checkout's packages, whatever is installed
