"""What fits the library into frameworks and other libraries: optional modules, none of which ``import mpisign`` loads.

``ddp``, ``batch_norm`` and ``reports`` need only torch; ``lightning``, ``huggingface`` and ``metrics`` what they are
named after. In the checkout, ``pip install '.[integrations]'`` brings all of it.
"""
