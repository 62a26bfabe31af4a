"""One token through a model, recorded once and played for every token after.

Between its matrices, a model in transformers spends about half a millisecond a layer on calling
small operations one by one. Their shapes and addresses never change from token to token, so a token
is *recorded* (``record.py``: what operations ran on which memory), *lowered* to steps of the native
library (``lower.py``), and then *played* with one call (``player.py``). Keys and values live in
buffers that the recording and transformers' own code share (``kv.py``), so that either can go on
where the other stopped. No model is known by name: what cannot be recorded, or gives other logits
when played, runs as before, and ``describe()`` says why.
"""

from .forward import TapeForward, install

__all__ = ["TapeForward", "install"]
