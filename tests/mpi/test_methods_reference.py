"""Every method on real ranks against its paper's algorithm, written again in NumPy with all ranks in one place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch

import mpisign
from mpisign import Method
from mpisign.attacks import Adversary, Constant, Scaled, SignFlip
from mpisign.memory import ef21_step_size

from . import ballots
from .test_methods import METHODS, SHAPES, assert_close, drawn, memories, model, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

    from .ballots import Floats

pytestmark = pytest.mark.mpi

Vectors = list[Any]  # of one rank, by parameter: fp64 arrays, changed in place
Compress = Callable[[Any], Any]
STEPS = 4
EXCHANGES = ("allgather", "two_phase")


def zeros(ranks: int) -> list[Vectors]:
    return [[np.zeros(math.prod(shape)) for shape in SHAPES] for _ in range(ranks)]


def everyones(comm: MPI.Comm, at: int) -> list[Vectors]:
    """The gradients of all ranks at a step: ``[rank][parameter]``."""
    return [[ballots.flat(g) for g in drawn(model(torch.float64), at, rank)] for rank in range(comm.size)]


def scaled_sign(p: Floats) -> Floats:
    return np.abs(p).mean() * np.sign(p) if p.size else p


def largest(ratio: float) -> Compress:
    def compress(p: Floats) -> Floats:
        kept = np.argsort(-np.abs(p))[: max(1, round(ratio * p.size))]
        return np.where(np.isin(np.arange(p.size), kept), p, 0.0)

    return compress


# ------------------------------------------------------------------------------------ error feedback, EF21


def double_squeeze(sent: list[Vectors], worker: list[Vectors], server: Vectors) -> Vectors:
    """DoubleSqueeze, Algorithm 1, on what the workers want to send; both errors change in place."""
    decided = []
    for place in range(len(SHAPES)):
        messages = []
        for mine, error in zip(sent, worker, strict=True):
            p = mine[place] + error[place]
            messages.append(scaled_sign(p))
            error[place] = p - messages[-1]
        q = np.mean(messages, axis=0) + server[place]
        decided.append(scaled_sign(q))
        server[place] = q - decided[-1]
    return decided


def test_double_squeeze(comm: MPI.Comm) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.double_squeeze(), exchange="allgather")  # a scale a parameter, as in the paper
    worker, (server,) = zeros(comm.size), zeros(1)
    for at in range(STEPS):
        expected = double_squeeze(everyones(comm, at), worker, server)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([ballots.flat(t.grad) for t in tensors], expected)
    assert_close(memories(optimizer, "error"), worker[comm.rank])


def test_double_squeeze_in_shards_has_a_scale_a_shard(comm: MPI.Comm) -> None:
    shape = (comm.size, 64)  # every rank decides one row
    tensors = ballots.parameters(shape, dtypes=[torch.float64])
    optimizer = wrap(tensors, mpisign.double_squeeze(), exchange="two_phase")
    worker, server = np.zeros((comm.size, *shape)), np.zeros(shape)
    for at in range(STEPS):
        p = worker + np.stack([ballots.flat(drawn(tensors, at, r)[0]).reshape(shape) for r in range(comm.size)])
        messages = np.abs(p).mean(axis=2, keepdims=True) * np.sign(p)
        worker = p - messages
        q = server + messages.mean(axis=0)
        decided = np.abs(q).mean(axis=1, keepdims=True) * np.sign(q)
        server = q - decided
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([ballots.flat(tensors[0].grad)], [decided.ravel()])


@pytest.mark.parametrize("freeze_step", [1, 2])
def test_one_bit_adam(comm: MPI.Comm, freeze_step: int) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.one_bit_adam(freeze_step), exchange="allgather")
    worker, (server,), (m,), (v,) = zeros(comm.size), zeros(1), zeros(1), zeros(1)
    for at in range(freeze_step + 3):
        gradients = everyones(comm, at)
        if at < freeze_step:
            mean = [np.mean(ranks, axis=0) for ranks in zip(*gradients, strict=True)]
            m = [0.9 * a + 0.1 * g for a, g in zip(m, mean, strict=True)]
            v = [0.999 * a + 0.001 * g**2 for a, g in zip(v, mean, strict=True)]
        else:
            wanted = [[0.9 * a + 0.1 * g for a, g in zip(m, mine, strict=True)] for mine in gradients]
            m = double_squeeze(wanted, worker, server)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        applied = [a / (np.sqrt(b) + 1e-8) for a, b in zip(m, v, strict=True)]
        for tensor, expected in zip(tensors, applied, strict=True):  # a scale is fp32, and v may be near 0
            np.testing.assert_allclose(ballots.flat(tensor.grad), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_bit_adam_leaves_alone_what_had_no_gradient_before_the_freeze(comm: MPI.Comm, exchange: str) -> None:
    """Its second moment is 0, and a bit is never 0: divided by eps it would be a step of 10^7 and more."""
    (tensor,) = tensors = ballots.parameters((100, 10), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.one_bit_adam(2), exchange=exchange)
    for at in range(6):
        (gradient,) = drawn(tensors, at, comm.rank)
        gradient[3:7] = 0.0
        step(optimizer, tensors, [gradient])
    assert not tensor[3:7].any()
    assert tensor[:3].all()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_bit_adam_that_never_freezes_is_torchs_adam_on_the_mean(comm: MPI.Comm, exchange: str) -> None:
    """Without bias correction, which torch's has: its rate and eps are set so that it cancels."""
    ours, theirs = model(torch.float64), model(torch.float64)
    optimizer = wrap(ours, mpisign.one_bit_adam(10**9), exchange=exchange)
    adam = torch.optim.Adam(theirs)
    reference = mpisign.DistributedSignOptimizer(adam, ballots.named(theirs), method=mpisign.mean(), exchange=exchange)
    for at in range(STEPS):
        root = math.sqrt(1 - 0.999 ** (at + 1))
        adam.param_groups[0].update(lr=0.1 * (1 - 0.9 ** (at + 1)) / root, eps=1e-8 / root)
        for whose, tensors in ((optimizer, ours), (reference, theirs)):
            step(whose, tensors, drawn(tensors, at, comm.rank))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("ratio", "compress"), [(0.1, largest(0.1)), (None, scaled_sign)], ids=["top-k", "signs"])
@pytest.mark.parametrize("kind", ["ef21", "ef21_sgdm", "ef21_w"])
def test_ef21(comm: MPI.Comm, kind: str, ratio: float | None, compress: Compress) -> None:
    """Each rank compresses what its estimate G_m lacks; the gradient applied is the (weighted) mean of all G_m."""
    smoothness = np.arange(1.0, 1.0 + comm.size)
    weights = smoothness / smoothness.sum() if kind == "ef21_w" else np.full(comm.size, 1 / comm.size)
    beta = 0.8 if kind == "ef21_sgdm" else 0.0
    method = {
        "ef21": lambda: mpisign.ef21(ratio),
        "ef21_sgdm": lambda: mpisign.ef21_sgdm(beta, ratio),
        "ef21_w": lambda: mpisign.ef21_w(smoothness.tolist(), ratio),
    }[kind]()
    tensors = model(torch.float64)
    optimizer = wrap(tensors, method)
    estimates, averages = zeros(comm.size), zeros(comm.size)
    for at in range(STEPS):
        for rank, mine in enumerate(everyones(comm, at)):
            for place, g in enumerate(mine):
                averages[rank][place] = v = beta * averages[rank][place] + (1 - beta) * g
                estimates[rank][place] += compress(v / (comm.size * weights[rank]) - estimates[rank][place])
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        expected = [np.tensordot(weights, ranks, 1) for ranks in zip(*estimates, strict=True)]
        assert_close([ballots.flat(t.grad) for t in tensors], expected)
        assert_close(memories(optimizer, "estimate"), estimates[comm.rank])


@pytest.mark.parametrize("weighted", [False, True])
def test_ef21_converges_with_the_step_of_its_theory(comm: MPI.Comm, weighted: bool) -> None:
    """f_m = <a_m, x>^2 + |x|^2 / 4, on which naive top-1 diverges: |x|^2 falls at the rate 1 - lr mu, mu = 1/2."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    vectors = np.full((3, 3), 2.0) - 5.0 * np.eye(3)
    hessians = [2 * np.outer(a, a) + np.eye(3) / 2 for a in vectors]
    smoothness = [float(np.linalg.eigvalsh(h)[-1]) for h in hessians]
    whole = float(np.linalg.eigvalsh(np.mean(hessians, axis=0))[-1])
    lr = ef21_step_size(smoothness, 1 / 3, weighted=weighted, global_smoothness=whole)
    method = mpisign.ef21_w(smoothness, 1 / 3) if weighted else mpisign.ef21(1 / 3)
    (x,) = tensors = ballots.parameters((3,), dtypes=[torch.float64])
    x.data.fill_(1.0)
    optimizer, hessian = wrap(tensors, method, lr=lr), torch.from_numpy(hessians[comm.rank])
    for _ in range(300):
        step(optimizer, tensors, [hessian @ x.detach()])
    assert float(x.detach().norm()) < 3 * (1 - lr / 2) ** 150


# ---------------------------------------------------------------------------------------------------- DGC


@pytest.mark.parametrize("masking", [True, False], ids=["masking", "no masking"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "heavy ball"])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_dgc(comm: MPI.Comm, clip: float | None, nesterov: bool, masking: bool) -> None:
    """Algorithm 4: local clipping at clip / sqrt(M), momentum correction and masking, warm-up, vectors sent whole."""
    m, ratio, warmup = 0.9, 0.02, 2
    tensors = model(torch.float64)
    method = mpisign.dgc(ratio, m, nesterov, clip, warmup, masking, sample=0.5)
    optimizer = wrap(tensors, method)
    u, v = zeros(comm.size), zeros(comm.size)
    for at in range(2 * warmup + 2):
        epoch = at // 2
        compress = largest(0.25 * (ratio / 0.25) ** (min(epoch, warmup) / warmup))
        sent = zeros(comm.size)
        for rank, mine in enumerate(everyones(comm, at)):
            norm = math.sqrt(sum(float(g @ g) for g in mine))
            factor = min(1.0, clip * comm.size**-0.5 / norm) if clip else 1.0
            for place, g in enumerate(mine):
                clipped = factor * g
                if nesterov:
                    u[rank][place] = m * (u[rank][place] + clipped)
                    v[rank][place] += u[rank][place] + clipped
                else:
                    u[rank][place] = m * u[rank][place] + clipped
                    v[rank][place] += u[rank][place]
                message = compress(v[rank][place]) if len(SHAPES[place]) > 1 else v[rank][place].copy()
                sent[rank][place] = message
                v[rank][place] -= message
                if masking:
                    u[rank][place][message != 0] = 0.0
        optimizer.set_epoch(epoch)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        expected = [np.mean(ranks, axis=0) for ranks in zip(*sent, strict=True)]
        assert_close([ballots.flat(t.grad) for t in tensors], expected, 1e-5)
    assert_close(memories(optimizer, "velocity"), u[comm.rank], 1e-5)
    assert_close(memories(optimizer, "residual"), v[comm.rank], 1e-5)


# -------------------------------------------------------------------------------------------- random votes

PULLS = (0.3, -0.5, 0.1, 0.7, -0.2)  # the gradient of each rank, in every coordinate
DRAWS = 40_000
TOLERANCE = 5 / math.sqrt(DRAWS)  # five standard deviations of a mean of values in [-1, 1]


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def expected_vote(chances: Sequence[tuple[float, float]]) -> float:
    """The mean decision of ranks that vote +1 and -1 with these chances, ties being fair coins."""
    total = np.ones(1)
    for up, down in chances:
        total = np.convolve(total, [down, 1 - up - down, up])
    middle = len(chances)
    return float(total[middle + 1 :].sum() - total[:middle].sum())


def two_sided(up: float) -> tuple[float, float]:
    return up, 1 - up


def clipped(g: float, bound: float) -> float:
    return min(max(g, -bound), bound)


RANDOM: dict[str, tuple[Method, Callable[[float, float], tuple[float, float]]]] = {
    # method, and (gradient, largest magnitude over ranks) -> the chances of +1 and -1
    "noisy_signsgd": (mpisign.noisy_signsgd(0.5), lambda g, top: two_sided(normal_cdf(g / 0.5))),
    "noisy_signsgd relative": (
        mpisign.noisy_signsgd(2.0, relative=True),
        lambda g, top: two_sided(normal_cdf(math.copysign(0.5, g))),
    ),
    "sto_sign": (mpisign.sto_sign(0.6), lambda g, top: two_sided(0.5 + clipped(g, 0.6) / 1.2)),
    "sto_sign maximum": (mpisign.sto_sign(), lambda g, top: two_sided(0.5 + g / (2 * top))),
    "dp_sign": (
        mpisign.dp_sign(0.4 * math.sqrt(DRAWS), noise=0.5),
        lambda g, top: two_sided(normal_cdf(clipped(g, 0.4) / 0.5)),
    ),
    "ternary_vote": (
        mpisign.ternary_vote(0.6, 0.8),
        lambda g, top: ((0.6 + clipped(g, 0.6)) / 1.6, (0.6 - clipped(g, 0.6)) / 1.6),
    ),
    "sparsign": (
        mpisign.sparsign(1.5),
        lambda g, top: (min(1.0, 1.5 * max(g, 0.0)), min(1.0, 1.5 * max(-g, 0.0))),
    ),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("method", "chances"), RANDOM.values(), ids=RANDOM)
def test_the_mean_of_random_votes(
    comm: MPI.Comm, method: Method, chances: Callable[[float, float], tuple[float, float]], exchange: str
) -> None:
    (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float32])
    optimizer = wrap(tensors, method, exchange=exchange)
    step(optimizer, tensors, [torch.full((DRAWS,), PULLS[comm.rank])])
    pulls = PULLS[: comm.size]
    top = max(abs(g) for g in pulls)
    expected = expected_vote([chances(g, top) for g in pulls])
    assert float(tensor.grad.mean()) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_median_of_noisy_gradients(comm: MPI.Comm, exchange: str) -> None:
    """Its mean and spread are those of medians of normal numbers around the ranks' gradients."""
    (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float64])
    optimizer = wrap(tensors, mpisign.noisy_median(0.5), exchange=exchange)
    step(optimizer, tensors, [torch.full((DRAWS,), PULLS[comm.rank], dtype=torch.float64)])
    pulls = np.array(PULLS[: comm.size])[:, None]
    expected = np.median(pulls + 0.5 * np.random.default_rng(0).standard_normal((comm.size, DRAWS)), axis=0)
    assert float(tensor.grad.mean()) == pytest.approx(expected.mean(), abs=TOLERANCE)
    assert float(tensor.grad.std()) == pytest.approx(expected.std(), rel=0.03)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("signal", [0.3, 1.0])
def test_wrong_votes_are_the_binomial_tail(comm: MPI.Comm, signal: float, exchange: str) -> None:
    """Gaussian noise, signal-to-noise ratio S: an honest rank is right with Phi(S), a blind flipper with 1 - Phi(S)."""
    for flippers in range((comm.size + 1) // 2):
        (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float32])
        tensor.grad = torch.randn(DRAWS, generator=ballots.generator(comm.rank, flippers)) + signal
        Adversary(SignFlip(), range(flippers), comm, i_know_this_is_an_attack=True).corrupt(tensors)
        wrap(tensors, mpisign.signsgd(), exchange=exchange).step()
        right = normal_cdf(signal)
        ups = [1 - right] * flippers + [right] * (comm.size - flippers)
        expected = (1 - expected_vote([two_sided(up) for up in ups])) / 2
        wrong = float((tensor.grad < 0).float().mean())
        assert wrong == pytest.approx(expected, abs=TOLERANCE / 2)


@pytest.mark.parametrize("noise", [2.0, 6.0])
def test_noisy_votes_stop_where_the_theory_says(comm: MPI.Comm, noise: float) -> None:
    """f_m = (x - a_m)^2 / 2, a = 1, 2, 10: the mean vote is 0 where sum arctan(erf((x - a_m) / (b sqrt 2))) is."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    lowest, highest = 1.0, 10.0
    for _ in range(60):
        x = (lowest + highest) / 2
        pull = sum(math.atan(math.erf((x - a) / (noise * math.sqrt(2)))) for a in (1, 2, 10))
        lowest, highest = (x, highest) if pull < 0 else (lowest, x)
    assert 2 < x < 13 / 3  # from the median to the mean, the further the more noise
    a = (1.0, 2.0, 10.0)[comm.rank]
    (tensor,) = tensors = ballots.parameters((DRAWS,), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.noisy_signsgd(noise))
    for away, sign in ((0.0, 0), (1.0, 1), (-1.0, -1)):
        step(optimizer, tensors, [torch.full((DRAWS,), x + away - a)])
        vote = float(tensor.grad.mean())
        assert vote == pytest.approx(0, abs=TOLERANCE) if sign == 0 else vote * sign > TOLERANCE


# -------------------------------------------------------------------------------------------- robust rules

Rule = Callable[[Any, int, Any], Any]  # (rows (M, n), f, previous decision (n,)) -> (n,)

ROBUST: dict[str, tuple[int, Callable[[int], Method], Rule]] = {
    # the f of a job of M ranks is (M - spare) // 2
    "median": (1, lambda f: mpisign.median(0.8), lambda rows, f, last: np.median(rows, axis=0)),
    "trimmed_mean": (1, lambda f: mpisign.trimmed_mean(f, 0.8), lambda rows, f, last: oracle.trimmed_mean(rows, f)),
    "krum": (3, lambda f: mpisign.krum(f, 0.8), lambda rows, f, last: oracle.multi_krum(rows, f, 1)),
    "multi_krum": (
        3,
        lambda f: mpisign.multi_krum(f, momentum=0.8),
        lambda rows, f, last: oracle.multi_krum(rows, f, len(rows) - f),
    ),
    "geometric_median": (
        1,
        lambda f: mpisign.geometric_median(0.5, 4, 0.8),
        lambda rows, f, last: oracle.geometric_median(rows, 0.5, 4),
    ),
    "centered_clipping": (
        1,
        lambda f: mpisign.centered_clipping(2.0, 2, 0.8),
        lambda rows, f, last: oracle.centered_clipping(rows, 2.0, last, 2),
    ),
    "nearest_neighbour_mixing": (
        1,
        lambda f: mpisign.nearest_neighbour_mixing(f, mpisign.trimmed_mean(f, 0.8)),
        lambda rows, f, last: oracle.trimmed_mean(oracle.nearest_neighbour_mixing(rows, f), f),
    ),
    "nearest_neighbour_mixing of clipping": (
        1,
        lambda f: mpisign.nearest_neighbour_mixing(f, mpisign.centered_clipping(2.0, 2, 0.8)),
        lambda rows, f, last: oracle.centered_clipping(oracle.nearest_neighbour_mixing(rows, f), 2.0, last, 2),
    ),
}
robust = pytest.mark.parametrize(("spare", "make", "rule"), ROBUST.values(), ids=ROBUST)


def whole(vectors: Sequence[Any]) -> Any:
    """All parameters of a rank as the one vector of which rules take distances."""
    return np.concatenate(list(vectors))


@pytest.mark.parametrize("exchange", EXCHANGES)
@robust
def test_robust_rules_decide_on_the_ranks_momenta(
    comm: MPI.Comm, spare: int, make: Callable[[int], Method], rule: Rule, exchange: str
) -> None:
    if comm.size < spare:
        pytest.skip(f"needs {spare} ranks")
    f = (comm.size - spare) // 2
    method = make(f)
    if exchange == "two_phase" and not method.rule.shardable:
        pytest.skip("needs whole vectors")
    tensors = model(torch.float64)
    optimizer = wrap(tensors, method, exchange=exchange, bucket_cap_mb=16 / (1 << 20))
    momenta = np.zeros((comm.size, sum(t.numel() for t in tensors)))
    decision = momenta[0]
    for at in range(STEPS):
        momenta = 0.8 * momenta + 0.2 * np.stack([whole(mine) for mine in everyones(comm, at)])
        decision = rule(momenta, f, decision)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([whole([ballots.flat(t.grad) for t in tensors])], [decision], 1e-12)


@pytest.mark.parametrize("attack", [Constant(math.nan), Constant(-math.inf), Constant(3e38), Scaled(1e30)], ids=repr)
@robust
def test_no_rank_can_blow_up_a_robust_rule(
    comm: MPI.Comm, spare: int, make: Callable[[int], Method], rule: Rule, attack: Any
) -> None:
    f = (comm.size - spare) // 2
    if f < 1:
        pytest.skip("too few ranks for an adversary")
    tensors = model()
    optimizer = wrap(tensors, make(f))
    adversary = Adversary(attack, [0], comm, i_know_this_is_an_attack=True)
    for at in range(STEPS):
        for tensor, gradient in zip(tensors, drawn(tensors, at, comm.rank), strict=True):
            tensor.grad = gradient
        adversary.corrupt(tensors)
        optimizer.step()
    honest = max(np.linalg.norm(whole(mine)) for at in range(STEPS) for mine in everyones(comm, at)[1:])
    assert np.linalg.norm(whole([ballots.flat(t) for t in tensors])) <= 0.1 * STEPS * honest


def test_a_parameter_without_gradients_does_not_cut_the_vector_in_two(comm: MPI.Comm) -> None:
    """Krum elects one rank, whose whole vector it is, although nobody uses the parameter in the middle."""
    if comm.size < 3:
        pytest.skip("needs 3 ranks")
    first, unused, last = tensors = ballots.parameters((1,), (4,), (1,), dtypes=[torch.float64])
    optimizer = wrap(tensors, mpisign.krum(0, momentum=0.0))
    rows = np.array([[5.0, 0.0], [0.0, 0.5], [0.6, 3.0], [50.0, 50.0], [90.0, 10.0]])[: comm.size]
    first.grad, last.grad = torch.from_numpy(rows[comm.rank]).split(1)
    optimizer.step()
    assert unused.grad is None
    assert [float(first.grad), float(last.grad)] == oracle.multi_krum(rows, 0, 1).tolist()


@pytest.mark.parametrize("name", [*ROBUST, "monna"])
def test_resuming_is_exact(comm: MPI.Comm, name: str) -> None:
    """Also of what a rule remembers, the center of clipping, and of replicas that differ."""
    spare, make, _ = ROBUST.get(name, (1, lambda f: mpisign.monna(f, 0.8), None))
    if comm.size < spare:
        pytest.skip(f"needs {spare} ranks")
    method, tensors = make((comm.size - spare) // 2), model()
    optimizer = wrap(tensors, method)
    for at in range(2):
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
    resumed = copy.deepcopy(tensors)
    other = wrap(resumed, method)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for at in range(2, 4):
        for theirs, whose in ((tensors, optimizer), (resumed, other)):
            step(whose, theirs, drawn(tensors, at, comm.rank))
    assert all(torch.equal(a, b) for a, b in zip(tensors, resumed, strict=True))


def test_monna(comm: MPI.Comm) -> None:
    """A step on the own momentum, then the mean of the M - f models nearest to the own one."""
    f, tensors = (comm.size - 1) // 2, model(torch.float64)
    optimizer = wrap(tensors, mpisign.monna(f, 0.8))
    models = np.zeros((comm.size, sum(t.numel() for t in tensors)))
    momenta = np.zeros_like(models)
    for at in range(STEPS):
        gradients = np.stack([whole(mine) for mine in everyones(comm, at)])
        momenta = 0.8 * momenta + 0.2 * gradients
        halfway = models - 0.1 * momenta
        models = np.stack([oracle.nearest_neighbour_averaging(halfway, f, rank) for rank in range(comm.size)])
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([whole([ballots.flat(t) for t in tensors])], [models[comm.rank]], 1e-12)
    mpisign.check_consistency(torch.nn.ParameterList(tensors), optimizer)  # replicas may differ


def test_a_rank_of_monna_with_a_nan_makes_no_step_of_its_own_and_goes_on(comm: MPI.Comm) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.monna(0, 0.0))  # the mean of all models
    gradients = drawn(tensors, 0, comm.rank)
    if comm.rank == 0:
        gradients[0].fill_(torch.nan)
    step(optimizer, tensors, gradients)
    steps = [whole(mine) for mine in everyones(comm, 0)[1:]]
    expected = -0.1 * np.sum(steps, axis=0) / comm.size if steps else np.zeros(sum(t.numel() for t in tensors))
    assert_close([whole([ballots.flat(t) for t in tensors])], [expected], 1e-12)
    assert optimizer.report.voters == tuple(range(comm.size))


@pytest.mark.parametrize(
    ("make", "spare"),
    [
        (mpisign.trimmed_mean, 1),
        (mpisign.krum, 3),
        (mpisign.multi_krum, 3),
        (mpisign.nearest_neighbour_mixing, 1),
        (mpisign.monna, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_too_many_adversaries_for_the_job(comm: MPI.Comm, make: Callable[[int], Method], spare: int) -> None:
    """It is said when the optimizer is made, on every rank; one adversary fewer is fine."""
    most = (comm.size - spare) // 2
    with pytest.raises(mpisign.OptionError, match=rf"at least 2 f \+ {spare} = .*, and this job has {comm.size}"):
        wrap(model(), make(most + 1))
    if most >= 0:
        wrap(model(), make(most))


@pytest.mark.parametrize(
    "method",
    [
        mpisign.krum(0),
        mpisign.multi_krum(0),
        mpisign.geometric_median(),
        mpisign.centered_clipping(),
        mpisign.nearest_neighbour_mixing(0),
        mpisign.monna(0),
    ],
    ids=lambda method: method.name,
)
def test_whole_vectors_cannot_be_decided_in_shards(comm: MPI.Comm, method: Method) -> None:
    with pytest.raises(mpisign.OptionError, match=r"exchange='two_phase' decides shards.* needs whole vectors"):
        wrap(model(), method, exchange="two_phase")


# ------------------------------------------------------------------------------------------------- price


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        (mpisign.signum(), 1, 1),
        (mpisign.sto_sign(1.0), 1, 1),
        (mpisign.ternary_vote(), 2, 2),
        (mpisign.sparsign(1.0), 2, 2),
        (mpisign.mean(), 32, 32),
        (mpisign.median(), 32, 32),
        (mpisign.one_bit_adam(9), 32, 32),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bits_both_ways(comm: MPI.Comm, method: Method, up: int, down: int) -> None:
    (tensor,) = tensors = ballots.parameters((64 * comm.size,), dtypes=[torch.float32])
    optimizer = wrap(tensors, method, exchange="two_phase")
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    share = tensor.numel() // comm.size
    assert 8 * (optimizer.report.bytes_sent - optimizer.report.header_bytes) == (comm.size - 1) * share * (up + down)


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (mpisign.lion(vote=False), lambda n, dim: 32 * -(-n // 32)),
        (mpisign.ef21(None), lambda n, dim: 32 * (1 + -(-n // 32))),
        (mpisign.dgc(0.05, warmup_epochs=0), lambda n, dim: 64 * max(1, round(0.05 * n)) if dim > 1 else 32 * n),
        (mpisign.dgc(0.05, warmup_epochs=3), lambda n, dim: 64 * max(1, round(0.25 * n)) if dim > 1 else 32 * n),
        (mpisign.krum(0), lambda n, dim: 32 * n),
        (mpisign.nearest_neighbour_mixing(0), lambda n, dim: 32 * n),
        (mpisign.monna(0), lambda n, dim: 32 * n),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bits_of_what_is_gathered(comm: MPI.Comm, method: Method, bits: Callable[[int, int], int]) -> None:
    if method.name == "krum" and comm.size < 3:
        pytest.skip("needs 3 ranks")
    tensors = model()
    optimizer = wrap(tensors, method)
    step(optimizer, tensors, drawn(tensors, 0, comm.rank))
    sent = (comm.size - 1) * sum(bits(t.numel(), t.dim()) for t in tensors)
    assert 8 * (optimizer.report.bytes_sent - optimizer.report.header_bytes) == sent


# ------------------------------------------------------------------------------------------- loss scaling


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_loss_scale_makes_no_difference(comm: MPI.Comm, make: Callable[[int], Method]) -> None:
    """GradScaler's factor is taken out once, of all that a memory looks at: bounds and norms, too."""
    scaled, plain = ballots.parameters((40, 3), (7,)), ballots.parameters((40, 3), (7,))
    optimizers = [wrap(tensors, make(comm.size)) for tensors in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for at in range(3):
        gradients = drawn(plain, at, comm.rank)
        for tensor, gradient in zip(scaled, gradients, strict=True):
            tensor.grad = gradient * scaler.get_scale()
        scaler.scale(torch.zeros(()))  # what makes a scaler work without a loss
        scaler.step(optimizers[0])
        scaler.update()
        step(optimizers[1], plain, gradients)
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
