"""mpisign: distributed training by majority vote, one bit a coordinate, over MPI.

Example::

    import torch
    import mpisign

    mpisign.init()
    model = torch.nn.Linear(20, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # every coordinate moves by lr: take a tenth of Adam's
    optimizer = mpisign.DistributedSignOptimizer(optimizer, model.named_parameters(), method=mpisign.signum(0.9))
    mpisign.broadcast_parameters(model.state_dict())
    mpisign.broadcast_optimizer_state(optimizer)

    for x, y in my_part_of_the_data(mpisign.rank(), mpisign.size()):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()  # the ranks vote, and all take the same step
    print(mpisign.average(evaluate(model)))

Start it with ``mpirun -n 4 python train.py``, or ``python -m mpisign run -n 4 train.py``. Is all in place?
``mpirun -n 2 python -m mpisign doctor``. In ``mpisign.checkpoint`` is what saves and resumes a job.
"""

from mpisign import checkpoint
from mpisign.collectives import allgather, allreduce, average, broadcast
from mpisign.errors import (
    AlreadyInitializedError,
    AuditError,
    CheckpointError,
    ConsistencyError,
    DeadTrainingError,
    GradientError,
    LaunchError,
    MembershipChangedError,
    MpisignError,
    NotInitializedError,
    OptionError,
    SynchronizationError,
)
from mpisign.membership import MembershipChange
from mpisign.method import Method
from mpisign.methods import (
    centered_clipping,
    cge,
    dgc,
    double_squeeze,
    dp_sign,
    ef21,
    ef21_sgdm,
    ef21_w,
    ef_signsgd,
    geometric_median,
    krum,
    lion,
    mean,
    median,
    monna,
    multi_krum,
    nearest_neighbour_mixing,
    noisy_median,
    noisy_signsgd,
    one_bit_adam,
    qsgd,
    scaled_vote,
    signsgd,
    signum,
    sparsign,
    stc,
    sto_sign,
    ternary_vote,
    terngrad,
    top_k,
    trimmed_mean,
    weighted_vote,
    zero_one_adam,
)
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.places import (
    cross_rank,
    cross_size,
    device,
    local_rank,
    local_size,
    node_rank,
    num_nodes,
    on_membership_change,
    rank,
    size,
)
from mpisign.preemption import REQUEUE_EXIT_CODE, stop_on_signal, stop_requested
from mpisign.report import StepReport
from mpisign.sampler import ElasticSampler
from mpisign.session import barrier, init, is_initialized, shutdown, timeline
from mpisign.standby import Standby
from mpisign.sync import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
    check_consistency,
)

__version__ = "0.2.0"

__all__ = [
    "REQUEUE_EXIT_CODE",
    "AlreadyInitializedError",
    "AuditError",
    "CheckpointError",
    "ConsistencyError",
    "DeadTrainingError",
    "DistributedSignOptimizer",
    "ElasticSampler",
    "GradientError",
    "LaunchError",
    "MembershipChange",
    "MembershipChangedError",
    "Method",
    "MpisignError",
    "NotInitializedError",
    "OptionError",
    "Standby",
    "StepReport",
    "SynchronizationError",
    "__version__",
    "allgather",
    "allgather_object",
    "allreduce",
    "average",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "centered_clipping",
    "cge",
    "check_consistency",
    "checkpoint",
    "cross_rank",
    "cross_size",
    "device",
    "dgc",
    "double_squeeze",
    "dp_sign",
    "ef21",
    "ef21_sgdm",
    "ef21_w",
    "ef_signsgd",
    "geometric_median",
    "init",
    "is_initialized",
    "krum",
    "lion",
    "local_rank",
    "local_size",
    "mean",
    "median",
    "monna",
    "multi_krum",
    "nearest_neighbour_mixing",
    "node_rank",
    "noisy_median",
    "noisy_signsgd",
    "num_nodes",
    "on_membership_change",
    "one_bit_adam",
    "qsgd",
    "rank",
    "scaled_vote",
    "shutdown",
    "signsgd",
    "signum",
    "size",
    "sparsign",
    "stc",
    "sto_sign",
    "stop_on_signal",
    "stop_requested",
    "ternary_vote",
    "terngrad",
    "timeline",
    "top_k",
    "trimmed_mean",
    "weighted_vote",
    "zero_one_adam",
]


def __dir__() -> list[str]:
    """What a user needs, and no module that only the library does."""
    return __all__
