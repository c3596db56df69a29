"""How messages cross MPI and become one decision, the same bits on every rank.

``allgather`` and ``two_phase`` are the two ways, ``choose`` picks one, ``header`` is what ranks tell each other
besides the messages, ``pipeline`` drives one step through memory, codec, exchange and rule.
"""
