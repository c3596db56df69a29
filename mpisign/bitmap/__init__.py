"""The bit arithmetic: signs to words, words to a decision, a decision to +-1.

``coin`` defines the hash that settles zeros and ties, ``host`` is the NumPy code and the oracle,
``tensors`` shows torch tensors to it without a copy.
"""
