"""mpisign: distributed training by majority vote, one bit a coordinate, over MPI."""

from mpisign import checkpoint
from mpisign.errors import (
    AlreadyInitializedError,
    CheckpointError,
    ConsistencyError,
    GradientError,
    LaunchError,
    MpisignError,
    NotInitializedError,
    OptionError,
    SynchronizationError,
)
from mpisign.methods import Method, lion, mean, signsgd, signum
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.preemption import REQUEUE_EXIT_CODE, stop_on_signal, stop_requested
from mpisign.sync import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
    check_consistency,
)
from mpisign.telemetry import StepReport
from mpisign.world import (
    barrier,
    device,
    init,
    is_initialized,
    local_rank,
    local_size,
    node_rank,
    num_nodes,
    rank,
    shutdown,
    size,
)

__version__ = "0.1.0"

__all__ = [
    "REQUEUE_EXIT_CODE",
    "AlreadyInitializedError",
    "CheckpointError",
    "ConsistencyError",
    "DistributedSignOptimizer",
    "GradientError",
    "LaunchError",
    "Method",
    "MpisignError",
    "NotInitializedError",
    "OptionError",
    "StepReport",
    "SynchronizationError",
    "__version__",
    "allgather_object",
    "barrier",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "check_consistency",
    "checkpoint",
    "device",
    "init",
    "is_initialized",
    "lion",
    "local_rank",
    "local_size",
    "mean",
    "node_rank",
    "num_nodes",
    "rank",
    "shutdown",
    "signsgd",
    "signum",
    "size",
    "stop_on_signal",
    "stop_requested",
]
