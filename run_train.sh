#!/usr/bin/env bash
# Starts a training run: NGPU=2 CONFIG_FILE=train_configs/debug_model.toml ./run_train.sh --training.steps=20
#
#   NGPU         processes on this machine (default: its GPUs; without any, 2 on the CPU); with CUDA_VISIBLE_DEVICES=""
#                they run on the CPU of a machine that has GPUs
#   CONFIG_FILE  settings; arguments of this script override them (--help lists all)
#   TRAIN_FILE   the recipe, or your edited copy of it
#   LOG_RANK     ranks whose output is shown, with commas
#   NNODES, NODE_RANK, RDZV_ENDPOINT   several machines: how many, which one this is, HOST:PORT of the first
#   MAX_RESTARTS how often a crashed run starts again by itself, from its last checkpoint (default 0)
#   CHUNKFLOW_PYTHON  an interpreter to use as it is, such as a GPU machine's own with another torch: nothing is
#                installed, and what it lacks is told. Without it: the active Python if it has all, else .venv, made once
#   COMM_MODE=fake_backend             one process, one step, as rank 0 of NGPU: checks a large layout anywhere
set -e

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$REPO/.ci/environment.sh" progress,pictures,hf,data

# A relative name means the caller's folder, else this repository.
locate() { if [ ! -e "$1" ] && [ -e "$REPO/$1" ]; then echo "$REPO/$1"; else echo "$1"; fi; }
TRAIN_FILE=$(locate "${TRAIN_FILE:-recipes/finetune.py}")
CONFIG_FILE=$(locate "${CONFIG_FILE:-train_configs/debug_model.toml}")
if [ ! -f "$TRAIN_FILE" ]; then
    echo "error: TRAIN_FILE = $TRAIN_FILE does not exist: name a recipe" >&2
    exit 2
fi

GPUS=0
if command -v nvidia-smi rocm-smi >/dev/null; then # one of them is enough
    GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
CPU_WANTED=
[ -n "$NGPU" ] && [ "${CUDA_VISIBLE_DEVICES-all}" = "" ] && CPU_WANTED=yes
export NGPU=${NGPU:-$((GPUS > 0 ? GPUS : 2))} NNODES=${NNODES:-1} LOG_RANK=${LOG_RANK:-0}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

set -- --job.config_file "$CONFIG_FILE" "$@"
if [ -n "$COMM_MODE" ]; then
    set -- "$@" "--comm.mode=$COMM_MODE" --training.steps=1
fi
for argument in "$@"; do
    case "$argument" in -h | --help | --check) exec "$PYTHON" "$TRAIN_FILE" "$@" ;; esac
done
# GPUs that torch cannot use must not become a slow run on the CPU that nobody asked for.
if [ "$GPUS" -eq 0 ] && [ -z "$CPU_WANTED$COMM_MODE" ] && command -v nvidia-smi >/dev/null; then
    LISTED=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
    if [ "$LISTED" -gt 0 ]; then
        "$PYTHON" - "$LISTED" >&2 <<'SENTENCE'
import os, sys, torch
release, cuda = torch.__version__.split("+")[0], torch.version.cuda
reason = f"the driver is too old for its CUDA {cuda}" if cuda else "it is a build for the CPU"
if "CUDA_VISIBLE_DEVICES" in os.environ:
    reason += f" or CUDA_VISIBLE_DEVICES = \"{os.environ['CUDA_VISIBLE_DEVICES']}\" hides them"
print(
    f"error: nvidia-smi lists {sys.argv[1]} GPUs and torch {torch.__version__} sees none, since {reason}: install the cu126"
    f" or cu128 wheel of torch {release}, or a newer driver; to train on the CPU set NGPU and CUDA_VISIBLE_DEVICES=\"\""
)
SENTENCE
        exit 2
    fi
fi
"$PYTHON" "$TRAIN_FILE" --check "$@" >/dev/null
if [ -n "$COMM_MODE" ]; then
    exec "$PYTHON" "$TRAIN_FILE" "$@"
fi

if [ "$GPUS" -eq 0 ]; then
    CORES=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > NGPU ? CORES / NGPU : 1))}
fi
rendezvous=(--rdzv_endpoint localhost:0)
if [ "$NNODES" -gt 1 ]; then
    if [ -z "$RDZV_ENDPOINT" ]; then
        echo "error: NNODES = $NNODES needs RDZV_ENDPOINT: set it to HOST:PORT of the first machine" >&2
        exit 2
    fi
    rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --rdzv_endpoint "$RDZV_ENDPOINT")
fi
# A store for each attempt of MAX_RESTARTS: NCCL of the next one would find in a shared store that the last one failed, and end.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Asked to stop (SIGTERM, SIGUSR1), the processes finish their step, save, and this script ends with 75; asked again, they end at once.
CHUNKFLOW_CONTROL=$(mktemp -d) CHUNKFLOW_LAUNCHER=$$
export CHUNKFLOW_CONTROL CHUNKFLOW_LAUNCHER
trap 'rm -rf "$CHUNKFLOW_CONTROL"' EXIT
# Processes write into a pipe of torchrun's; where a person looks at its other end, they draw a bar there.
[ -t 1 ] && { CHUNKFLOW_TERMINAL=$(tty <&3); } 3>&1 && export CHUNKFLOW_TERMINAL
stop() { if [ -e "$CHUNKFLOW_CONTROL/stop" ]; then kill -HUP "$job"; else touch "$CHUNKFLOW_CONTROL/stop"; fi; }
(
    trap '' TERM USR1 # the signal may come to the whole process group: torchrun is to leave it to us
    exec "$PYTHON" -m chunkflow.training.launch --nproc_per_node "$NGPU" --rdzv_backend c10d "${rendezvous[@]}" \
        --max-restarts "${MAX_RESTARTS:-0}" --signals-to-handle SIGINT,SIGHUP,SIGQUIT --shutdown-timeout 10 \
        --local-ranks-filter "$LOG_RANK" --role rank --tee 3 "$TRAIN_FILE" "$@"
) &
job=$!
trap stop TERM USR1
trap : INT # torchrun gets Ctrl-C too, and ends its processes
status=0
while wait "$job" && status=0 || status=$?; kill -0 "$job" 2>/dev/null; do :; done
if [ "$status" -eq 0 ] && [ -e "$CHUNKFLOW_CONTROL/saved" ]; then
    status=75
fi
exit "$status"
