"""The literature, one method a line: a memory in front, a codec on the wire, a rule that decides.

``Method(memory, codec, rule)`` is all there is to a method; a new one is a new line here, or in your own code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mpisign.codecs import Codec, Dense, Quantized, ScaledBits, ScaledRows, SignBits, SparseTernary, TopK, Trits
from mpisign.errors import OptionError
from mpisign.memory import (
    DGC,
    EF21,
    ClippedNoise,
    ErrorFeedback,
    GaussianNoise,
    Identity,
    LionMomentum,
    Memory,
    Momentum,
    OneBitAdam,
    SparseSign,
    StochasticSign,
    TernarySign,
    gaussian_mechanism,
)
from mpisign.memory.ef21 import check_smoothness
from mpisign.method import Method
from mpisign.policy import check_integer
from mpisign.rules import (
    CenteredClipping,
    GeometricMedian,
    GradientElimination,
    Krum,
    MajorityVote,
    Mean,
    MeanOfSigns,
    Median,
    MultiKrum,
    NearestNeighbourAveraging,
    NearestNeighbourMixing,
    RecodedMean,
    ScaledVote,
    TrimmedMean,
    WeightedVote,
)

# fmt: off
__all__ = [
    "centered_clipping", "cge", "dgc", "double_squeeze", "dp_sign", "ef21", "ef21_sgdm", "ef21_w", "ef_signsgd",
    "geometric_median", "krum", "lion", "mean", "median", "monna", "multi_krum", "nearest_neighbour_mixing",
    "noisy_median", "noisy_signsgd", "one_bit_adam", "qsgd", "scaled_vote", "signsgd", "signum", "sparsign",
    "stc", "sto_sign", "ternary_vote", "terngrad", "top_k", "trimmed_mean", "weighted_vote", "zero_one_adam",
]
# fmt: on


# ------------------------------------------------------------------------------------------- signs and votes


def signsgd() -> Method:
    """signSGD with majority vote: each rank votes with the sign of its gradient.

    Robust to a minority of ranks that err blindly. Biased where ranks hold data of different kinds.

    Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", 2018, Alg. 1.
    """
    return Method(Identity(), SignBits(), MajorityVote(), "signsgd")


def signum(momentum: float = 0.9) -> Method:
    """Signum with majority vote: each rank votes with the sign of ``v <- momentum v + (1 - momentum) g``.

    Take it by default. Robust and biased as :func:`signsgd`, with less noise.

    The same paper, Algorithm 1 with beta > 0: the momentum lives on each worker, before the sign.
    """
    return Method(Momentum(momentum), SignBits(), MajorityVote(), "signum")


def lion(beta1: float = 0.9, beta2: float = 0.99, vote: bool = True) -> Method:
    """Distributed Lion: sign of ``beta1 m + (1 - beta1) g``; m decays by ``beta2``.

    Take it for transformers, with weight decay in the wrapped SGD. ``vote=False`` averages the signs instead: finer,
    ``ceil(log2(M + 1))`` bits a coordinate down, and a hostile rank moves the mean by 2/M.

    Liu et al., "Communication Efficient Distributed Training with Distributed Lion", 2024, Algorithm 1 (MaVo, Avg).
    """
    return Method(LionMomentum(beta1, beta2), SignBits(), MajorityVote() if vote else MeanOfSigns(), "lion")


def scaled_vote(momentum: float = 0.0, error_feedback: bool = False) -> Method:
    """The majority's sign times the median of the voters' mean magnitudes, one a row: a vote that knows how far to go.

    Take it for what has a size of its own, as differences between parameters have, or to keep the learning rate of
    SGD. Robust as :func:`signsgd`, and fewer than half of the ranks do not move the scales either. A row that most
    ranks do not use stays. With ``momentum`` the average is sent; with ``error_feedback`` what a rank's scaled signs
    lose is added to its next vote, for which nothing is guaranteed under a vote. Give one of the two.

    What it sends is a message of Karimireddy et al., 2019 (see :func:`ef_signsgd`) a row; how it decides, no paper's.
    """
    if error_feedback and momentum:
        raise OptionError("scaled_vote takes momentum= or error_feedback=True, not both: an error has no average")
    memory = ErrorFeedback() if error_feedback else _remembering(momentum)
    return Method(memory, ScaledRows(), ScaledVote(), "scaled_vote")


def noisy_signsgd(scale: float, relative: bool = False) -> Method:
    """Each rank votes with the sign of ``g + b xi``, xi normal: the more noise, the closer the vote is to the mean.

    Take it where ranks hold data of different kinds and noise costs less than the bias. ``b`` is ``scale``, or with
    ``relative`` that many times the parameter's largest ``|g|``. Robust to a minority, the less the more noise.

    Chen et al., "Distributed Training with Heterogeneous Data: Bridging Median- and Mean-Based Algorithms", 2020,
    Algorithm 3.
    """
    return Method(GaussianNoise(scale, relative), SignBits(), MajorityVote(), "noisy_signsgd")


def sto_sign(bound: float | None = None) -> Method:
    """Each rank votes +1 with probability ``1/2 + g / 2b``, so that votes are right on average on any data.

    ``bound=None`` takes the exact maximum of ``|g|`` over ranks, coordinate by coordinate, and pays for it with one
    dense fp32 all-reduce a step: no traffic is saved then, and one rank with huge values makes all others toss coins.

    Jin et al., "Stochastic-Sign SGD for Federated Learning with Theoretical Guarantees", 2020, Algorithm 1.
    """
    return Method(StochasticSign(bound), SignBits(), MajorityVote(), "sto_sign")


def dp_sign(
    clip: float,
    noise: float | None = None,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    private: bool = True,
) -> Method:
    """Private votes: clip the rank's gradient to L2 norm ``clip``, add normal ``noise``, take the sign.

    Give ``noise``, or one step's ``epsilon`` and ``delta``. The noise comes from a secret of each rank; with
    ``private=False`` from the seed that all share, for experiments that must repeat: it protects nobody.

    Jin et al., 2020 (see :func:`sto_sign`), Algorithm 2; Lyu, "DP-signSGD", 2021.
    """
    if noise is None and epsilon is not None and delta is not None:
        noise = gaussian_mechanism(clip, epsilon, delta)
    elif noise is None or epsilon is not None or delta is not None:
        raise OptionError("dp_sign needs noise=, or epsilon= and delta=: e.g. dp_sign(1.0, epsilon=0.5, delta=1e-5)")
    return Method(ClippedNoise(clip, noise, private), SignBits(), MajorityVote(), "dp_sign")


def ternary_vote(A: float = 1.0, B: float = 2.0, private: bool = False) -> Method:  # noqa: N803 - the paper's
    """A vote of trits: +1 with probability (A + g)/2B, -1 with (A - g)/2B, else nothing. A bounds ``|g|``; B >= A.

    Robust to a minority; right on any data with a large B; ``private``: see :class:`mpisign.memory.TernarySign`.

    "TernaryVote: Differentially Private, Communication Efficient, and Byzantine Resilient Distributed Optimization on
    Heterogeneous Data", 2024, Algorithm 1.
    """
    return Method(TernarySign(A, B, private), Trits(), MajorityVote(), "ternary_vote")


def sparsign(budget: float) -> Method:
    """A vote of trits: sign(g) with probability ``min(1, budget |g|)``, else nothing.

    Right on any data with a ``budget`` up to one over the largest ``|g|``. Robust to a minority of those that speak.

    Jin et al., "Magnitude Matters: Fixing SIGNSGD Through Magnitude-Aware Sparsification in the Presence of Data
    Heterogeneity", 2023, Algorithm 1.
    """
    return Method(SparseSign(budget), Trits(), MajorityVote(), "sparsign")


def weighted_vote(momentum: float = 0.9) -> Method:
    """:func:`signum`, ranks weighing as often as they are with the majority: see :class:`mpisign.rules.WeightedVote`.

    Take it where a minority may vote blindly or the wrong way round. Zeros do not vote; 2 bits a coordinate both ways.
    """
    return Method(_remembering(momentum), Trits(), WeightedVote(), "weighted_vote")


# ------------------------------------------------------------------------------------- unbiased quantization


def qsgd(levels: int = 7, bucket: int = 512) -> Method:
    """The mean of gradients rounded at random to ``levels`` shares of their norm: right on any data, and noisy.

    ``1 + levels.bit_length()`` bits a coordinate and a norm each ``bucket`` of them; all-gather only. The rate is
    SGD's, as long as the noise is bearable: smaller buckets and more levels make less of it. Not robust.

    Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", 2017, section 3.1;
    lengths are fixed, where the paper has Elias codes.
    """
    return Method(Identity(), Quantized(levels, "l2", bucket), Mean(), "qsgd")


def terngrad(clip: float | None = None) -> Method:
    """The mean of ``s sign(g) b``, s the parameter's largest ``|g|``, b 1 with probability ``|g| / s``, else 0.

    Right on any data without ``clip``, which cuts magnitudes at so many standard deviations of a parameter's gradient
    (the paper's is 2.5) for less noise. All-gather only. Every rank has a scale of its own: the paper's common one
    would need another exchange. Not robust.

    Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", 2017, Algorithm 1.
    """
    return Method(Identity(), Quantized(1, "max", None, clip), Mean(), "terngrad")


# -------------------------------------------------------------------------------------------- error feedback


def ef_signsgd() -> Method:
    """The mean of scaled signs, with what they lose fed back: close to SGD on any data, at a bit a coordinate up.

    All-gather only, as the mean is no message of its own kind; :func:`double_squeeze` sends it in one bit, too.
    Wrap plain SGD, which may have momentum. A hostile rank moves the mean at will.

    Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019, Algorithm 1.
    """
    return Method(ErrorFeedback(), ScaledBits(), Mean(), "ef_signsgd")


def double_squeeze() -> Method:
    """:func:`ef_signsgd` whose mean comes down as scaled signs, too, with an error kept by whoever decided it.

    One bit and a scale a parameter (or part of one, where a shard ends in it) both ways. For many ranks; not robust.

    Tang et al., "DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-Pass Error-Compensated Compression",
    2019, Algorithm 1.
    """
    return Method(ErrorFeedback(), ScaledBits(), RecodedMean(), "double_squeeze")


def one_bit_adam(freeze_step: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Method:
    """Adam on exact means for ``freeze_step`` steps, then compressed momentum over the frozen second moment.

    The gradient it leaves is ``m / (sqrt(v) + eps)``: wrap plain SGD, whose rate is Adam's. Freeze after the warm-up,
    at 15 to 20 % of all steps; what had no gradient until then never moves again. Not robust.

    Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", 2021, Alg. 1.
    """
    freeze_step = check_integer("freeze_step", freeze_step, 1)
    squeezed = Method(OneBitAdam(beta1, beta2, eps, frozen=True), ScaledBits(), RecodedMean(), "one_bit_adam")
    return Method(OneBitAdam(beta1, beta2, eps), Dense(), Mean(), "one_bit_adam", by_step=((freeze_step, squeezed),))


def zero_one_adam(
    freeze_step: int = 100_000, kappa: int = 16, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Method:
    """:func:`one_bit_adam` whose second moment is updated on a schedule, with one bit between from the beginning.

    The j-th update is followed by the next after ``2^floor(j / kappa)`` steps, on exact means, until ``freeze_step``.
    Every step is exchanged: the paper's local steps are no part of a method. At an update the momentum, too, is exact,
    where the paper sends it in bits beside. Not robust.

    Lu et al., "Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam", 2022, Algorithm 1.
    """
    freeze_step, kappa = check_integer("freeze_step", freeze_step, 1), check_integer("kappa", kappa, 1)
    exact = Method(OneBitAdam(beta1, beta2, eps), Dense(), Mean(), "zero_one_adam")
    squeezed = Method(OneBitAdam(beta1, beta2, eps, frozen=True), ScaledBits(), RecodedMean(), "zero_one_adam")
    changes, at, updates = {}, 0, 0
    while at < freeze_step:
        changes[at], changes[at + 1] = exact, squeezed  # and exact again, if the next update is there
        at += 2 ** (updates // kappa)
        updates += 1
    return replace(exact, by_step=tuple(sorted(changes.items())))


def _contraction(ratio: float | None) -> Codec:
    """Top-k of ``ratio``, or the scaled sign."""
    return ScaledBits() if ratio is None else TopK(ratio)


def ef21(ratio: float | None = 0.01) -> Method:
    """Each rank sends the compressed change of an estimate of its gradient; all apply the mean of the estimates.

    Right on data of different kinds; made for exact or large-batch gradients. ``ratio=None`` sends scaled signs
    instead of the top-k. :func:`mpisign.memory.ef21_step_size` computes the theory's step size. Not robust.

    Richtarik et al., "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback", 2021, Alg. 2.
    """
    return Method(EF21(), _contraction(ratio), Mean(of_all=True), "ef21")


def ef21_sgdm(momentum: float = 0.9, ratio: float | None = 0.01) -> Method:
    """:func:`ef21` of a running average of the gradient: for stochastic gradients of any batch size.

    Fatkhullin et al., "Momentum Provably Improves Error Feedback!", 2023, Algorithm 1; ``momentum`` is 1 - eta.
    """
    return Method(EF21(momentum), _contraction(ratio), Mean(of_all=True), "ef21_sgdm")


def ef21_w(smoothness: Iterable[float], ratio: float | None = 0.01) -> Method:
    """:func:`ef21` with ranks weighted by the smoothness L_m of their functions, which allows a larger step.

    With equal step sizes it is EF21, step for step. ``smoothness`` has one constant a rank, the same on all.

    "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants", 2024, Algorithm 3.
    """
    constants = check_smoothness(smoothness)
    shares = tuple(constant / sum(constants) for constant in constants)
    return Method(EF21(shares=shares), _contraction(ratio), Mean(shares=shares), "ef21_w")


# ---------------------------------------------------------------------------------------------------- sparse


def top_k(ratio: float = 0.01, sample: float | None = None) -> Method:
    """The largest coordinates of gradient plus error, with what is left fed back. 64 bits a coordinate sent.

    Take it for slow networks and data of any kind; :func:`dgc` has momentum, too. Not robust.

    Stich et al., "Sparsified SGD with Memory", 2018, Algorithm 1.
    """
    return Method(ErrorFeedback(), TopK(ratio, sample), Mean(), "top_k")


def stc(ratio: float = 0.01) -> Method:
    """Sparse ternary compression: the largest as signs of one magnitude, with error feedback, up and down.

    32 bits a coordinate sent. Take it for many ranks on slow networks, and data of any kind. Not robust.

    Sattler et al., "Robust and Communication-Efficient Federated Learning from Non-IID Data", 2019, Algorithm 2.
    """
    return Method(ErrorFeedback(), SparseTernary(ratio), RecodedMean(), "stc")


def dgc(
    ratio: float = 0.001,
    momentum: float = 0.9,
    nesterov: bool = True,
    clip: float | None = None,
    warmup_epochs: int = 4,
    masking: bool = True,
    sample: float | None = 0.01,
) -> Method:
    """Deep Gradient Compression: momentum, and what was not sent yet, accumulate where they are; the largest are sent.

    Wrap SGD without momentum. For ``warmup_epochs`` epochs the share sent falls from 25 % in equal ratios to ``ratio``:
    tell the epoch with ``optimizer.set_epoch(epoch)``. Parameters of one dimension are sent whole. Not robust.

    Args:
        ratio: share of the coordinates of each parameter that is sent in the end.
        momentum, nesterov, clip, masking: see :class:`mpisign.memory.DGC`.
        sample: share of the coordinates that the threshold is guessed from, see :class:`mpisign.codecs.TopK`.

    Lin et al., "Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training", 2018,
    Algorithm 4.
    """
    warmup_epochs = check_integer("warmup_epochs", warmup_epochs, 0)
    memory = DGC(momentum, nesterov, clip, masking)

    def phase(share: float) -> Method:
        return Method(memory, TopK(share, sample, vectors=False), Mean(), "dgc")

    settled, first = phase(ratio), max(0.25, ratio)
    if warmup_epochs == 0:
        return settled
    shares = [first * (ratio / first) ** (epoch / warmup_epochs) for epoch in range(warmup_epochs)]
    changes = tuple((epoch, phase(share)) for epoch, share in enumerate(shares))
    return replace(settled, by_epoch=(*changes, (warmup_epochs, settled)))


# -------------------------------------------------------------------------------------------- dense and robust


def mean() -> Method:
    """The full-precision baseline: the mean of the gradients in fp32, as any data-parallel training does."""
    return Method(Identity(), Dense(), Mean(), "mean")


def _remembering(momentum: float) -> Memory:
    return Momentum(momentum) if momentum else Identity()


def median(momentum: float = 0.9) -> Method:
    """The coordinatewise median of the ranks' momenta: see :class:`mpisign.rules.Median`."""
    return Method(_remembering(momentum), Dense(), Median(), "median")


def noisy_median(scale: float, relative: bool = False) -> Method:
    """The median of ``g + b xi``: as :func:`noisy_signsgd`, in full precision (Chen et al. 2020, Alg. 4)."""
    return Method(GaussianNoise(scale, relative), Dense(), Median(), "noisy_median")


def trimmed_mean(f: int, momentum: float = 0.9) -> Method:
    """The mean without the f smallest and f largest of each coordinate: see :class:`mpisign.rules.TrimmedMean`."""
    return Method(_remembering(momentum), Dense(), TrimmedMean(f), "trimmed_mean")


def krum(f: int, momentum: float = 0.9) -> Method:
    """One rank's whole vector, the one closest to its neighbours: see :class:`mpisign.rules.Krum`."""
    return Method(_remembering(momentum), Dense(), Krum(f), "krum")


def multi_krum(f: int, m: int | None = None, momentum: float = 0.9) -> Method:
    """The mean of the m vectors that Krum likes best: see :class:`mpisign.rules.MultiKrum`."""
    return Method(_remembering(momentum), Dense(), MultiKrum(f, m), "multi_krum")


def cge(f: int, momentum: float = 0.9) -> Method:
    """The mean without the f longest vectors: see :class:`mpisign.rules.GradientElimination`."""
    return Method(_remembering(momentum), Dense(), GradientElimination(f), "cge")


def geometric_median(nu: float = 0.1, steps: int = 3, momentum: float = 0.9) -> Method:
    """The vector with the smallest sum of distances, smoothed: see :class:`mpisign.rules.GeometricMedian`."""
    return Method(_remembering(momentum), Dense(), GeometricMedian(nu, steps), "geometric_median")


def centered_clipping(radius: float = 10.0, steps: int = 1, momentum: float = 0.9) -> Method:
    """The last decision plus the clipped mean change: see :class:`mpisign.rules.CenteredClipping`."""
    return Method(_remembering(momentum), Dense(), CenteredClipping(radius, steps), "centered_clipping")


def nearest_neighbour_mixing(f: int, then: Method | None = None) -> Method:
    """Each vector becomes the mean of its M - f nearest before the rule of ``then`` (default :func:`trimmed_mean`).

    With it, rules tolerate data of different kinds far better: see :class:`mpisign.rules.NearestNeighbourMixing`.
    """
    inner = trimmed_mean(f) if then is None else then
    if not isinstance(inner, Method):
        raise OptionError(f"then={then!r} is not a Method: use one of mpisign's, e.g. mpisign.trimmed_mean({f})")
    if inner.by_step or inner.by_epoch:
        raise OptionError(f"{inner.name} becomes another method as training goes on, which mixing cannot follow")
    return replace(inner, rule=NearestNeighbourMixing(inner.rule, f), name=f"nearest_neighbour_mixing({inner.name})")


def monna(f: int, momentum: float = 0.99) -> Method:
    """MoNNA: each rank steps on its own momentum, then averages its **parameters** with those nearest to its own.

    Replicas differ, within the honest ranks' spread; nobody decides for all. Robust to f hostile ranks, without a
    shard owner. ``check_consistency`` compares no values, ``synchronize`` and ``join`` do not apply.

    Farhadkhani et al., "Robust Collaborative Learning with Linear Gradient Overhead", 2022, Algorithm 1.
    """
    return Method(_remembering(momentum), Dense(), NearestNeighbourAveraging(f), "monna")
