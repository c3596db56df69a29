"""The bit arithmetic: signs to words, words to a decision, a decision to +-1.

``coin`` defines the hash that settles zeros and ties, ``host`` is the NumPy code and the oracle, and the ``.cu`` files
are the same for GPUs. ``kernels`` compiles them; ``cuda`` and, for many tensors in one launch, ``batch`` call them.
``native`` loads the same once more, in C for the host, where it was compiled.
``tensors`` shows torch tensors to NumPy without a copy. The library calls all of it through :mod:`mpisign.backends`.
"""
