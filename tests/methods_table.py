"""Every method with arguments for tests: the one list that tests walk. A method added to methods.py joins by itself.

It joins with its defaults. One that cannot do without arguments needs an entry in ``ARGUMENTS``, and
``test_methods_table.py`` fails until it has one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

import mpisign
from mpisign import Method, methods
from mpisign.codecs import SignBits
from mpisign.memory.noise import Noise
from mpisign.policy import Policy
from mpisign.rules import BallotRule, VectorRule

Make = Callable[[int], Method]  # for a job of so many ranks; skips the test where the method needs more

SOME = 5  # ranks, of which any method can be made


def against(make: Callable[[int], Method], spare: int = 1) -> Make:
    """With as many adversaries as the rule can stand, which needs 2 f + ``spare`` ranks."""

    def of(size: int) -> Method:
        if size < spare:
            pytest.skip(f"needs {spare} ranks")
        return make((size - spare) // 2)

    return of


# By method, then by what follows its name in the test's: "" for nothing. One that is not here has its defaults.
ARGUMENTS: dict[str, dict[str, Make]] = {
    "lion": {"": lambda size: mpisign.lion(), "mean": lambda size: mpisign.lion(vote=False)},
    "scaled_vote": {
        "": lambda size: mpisign.scaled_vote(),
        "momentum": lambda size: mpisign.scaled_vote(0.9),
        "error feedback": lambda size: mpisign.scaled_vote(error_feedback=True),
    },
    "noisy_signsgd": {
        "": lambda size: mpisign.noisy_signsgd(0.5),
        "relative": lambda size: mpisign.noisy_signsgd(0.5, relative=True),
    },
    "sto_sign": {"": lambda size: mpisign.sto_sign(4.0), "maximum": lambda size: mpisign.sto_sign()},
    "dp_sign": {
        "": lambda size: mpisign.dp_sign(1.0, 0.02, private=False),
        "private": lambda size: mpisign.dp_sign(1.0, epsilon=0.5, delta=1e-5),
    },
    "ternary_vote": {"": lambda size: mpisign.ternary_vote(4.0, 5.0)},
    "sparsign": {"": lambda size: mpisign.sparsign(0.5)},
    "qsgd": {"": lambda size: mpisign.qsgd(), "coarse": lambda size: mpisign.qsgd(2, bucket=64)},
    "terngrad": {"": lambda size: mpisign.terngrad(), "clip": lambda size: mpisign.terngrad(2.0)},
    "one_bit_adam": {
        "": lambda size: mpisign.one_bit_adam(freeze_step=1),
        "late": lambda size: mpisign.one_bit_adam(freeze_step=3),
    },
    "zero_one_adam": {"": lambda size: mpisign.zero_one_adam(6, kappa=1)},
    "stc": {"": lambda size: mpisign.stc(0.1)},
    "ef21": {"": lambda size: mpisign.ef21(0.1), "signs": lambda size: mpisign.ef21(None)},
    "ef21_sgdm": {"": lambda size: mpisign.ef21_sgdm(ratio=0.1)},
    "ef21_w": {"": lambda size: mpisign.ef21_w(range(1, size + 1), ratio=0.1)},
    "top_k": {"": lambda size: mpisign.top_k(0.1), "sample": lambda size: mpisign.top_k(0.05, sample=0.5)},
    "dgc": {
        "": lambda size: mpisign.dgc(0.05, clip=1.0, warmup_epochs=1),
        "heavy ball": lambda size: mpisign.dgc(0.05, nesterov=False, warmup_epochs=0, masking=False),
    },
    "noisy_median": {"": lambda size: mpisign.noisy_median(0.5)},
    "trimmed_mean": {"": against(mpisign.trimmed_mean)},
    "krum": {"": against(mpisign.krum, 3)},
    "multi_krum": {"": against(mpisign.multi_krum, 3)},
    "cge": {"": against(mpisign.cge)},
    "centered_clipping": {"": lambda size: mpisign.centered_clipping(1.0)},
    "nearest_neighbour_mixing": {
        "": against(mpisign.nearest_neighbour_mixing),
        "of clipping": against(lambda f: mpisign.nearest_neighbour_mixing(f, mpisign.centered_clipping(2.0, 2, 0.8))),
    },
    "monna": {"": against(mpisign.monna)},
}


def makers() -> dict[str, Callable[..., Method]]:
    """Every public function in ``mpisign.methods`` that makes a method."""
    here = [(name, made) for name, made in vars(methods).items() if inspect.isfunction(made)]
    return {name: make for name, make in here if make.__module__ == methods.__name__ and not name.startswith("_")}


def needs_arguments(make: Callable[..., Method]) -> list[str]:
    """The arguments without which it cannot be called."""
    parameters = inspect.signature(make).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


MAKERS = makers()
MISSING = {name: needed for name, make in MAKERS.items() if name not in ARGUMENTS and (needed := needs_arguments(make))}
TABLE: dict[str, Make] = {
    f"{name} {variant}".strip(): made
    for name, make in MAKERS.items()
    if name not in MISSING
    for variant, made in ARGUMENTS.get(name, {"": lambda size, make=make: make()}).items()
}


def among(size: int, wanted: Callable[[Method], bool] = lambda method: True) -> dict[str, Method]:
    """The wanted methods of a job of ``size`` ranks, without those that need more."""
    found = {}
    for name, make in TABLE.items():
        try:
            method = make(size)
        except pytest.skip.Exception:
            continue
        if wanted(method):
            found[name] = method
    return found


ALONE = among(1)
FOUR = [ALONE[name] for name in ("signsgd", "signum", "lion", "mean")]
"""For what is no matter of the method: no memory, a memory, one that sends what it does not keep, no vote."""


def walk(wanted: Callable[[Method], bool] = lambda method: True) -> pytest.MarkDecorator:
    """Gives a test on many ranks ``make``, of every wanted method."""
    names = among(SOME, wanted)
    return pytest.mark.parametrize("make", [TABLE[name] for name in names], ids=names)


def walk_exchanges(wanted: Callable[[Method], bool] = lambda method: True, size: int = SOME) -> pytest.MarkDecorator:
    """Gives a test ``make`` and ``exchange``, of every wanted method with each exchange that it allows."""
    names = [(name, exchange) for name, method in among(size, wanted).items() for exchange in exchanges(method)]
    parameters = [pytest.param(TABLE[name], exchange, id=f"{name}-{exchange}") for name, exchange in names]
    return pytest.mark.parametrize(("make", "exchange"), parameters)


# ------------------------------------------------------------------------------------------- what a method can


def exchanges(method: Method) -> tuple[str, ...]:
    """The ways in which its messages may cross MPI."""
    comes_down = method.rule.down(method.codec, Policy(), SOME) is not None
    return ("allgather", "two_phase") if comes_down and not isinstance(method.rule, VectorRule) else ("allgather",)


def is_random(method: Method) -> bool:
    """Whether its memory or its codec draws random numbers."""
    return isinstance(method.memory, Noise) or method.codec.random


def packs_signs(method: Method) -> bool:
    """Whether a kernel can turn gradients into its ballots at once."""
    signs = isinstance(method.codec, SignBits) and isinstance(method.rule, BallotRule) and not is_random(method)
    return signs and (not method.memory.fields or method.memory.betas is not None)
