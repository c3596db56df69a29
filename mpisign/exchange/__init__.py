"""How messages cross MPI and become one decision, the same bits on every rank.

A ``plan`` is what all agree on once; a ``round`` is one exchange over it. On its way a gradient is read by
``gradients``, filled into messages by ``encoder``, carried by ``allgather`` or ``two_phase`` (``choose`` picks one)
with a ``header`` beside it, decided by ``decider``, and written by ``decoder`` into a ``sink``.
"""
