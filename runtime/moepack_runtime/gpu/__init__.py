"""The GPU tier: which experts are in GPU memory, and how the others get there in time.

``link`` is what the rest needs of a GPU: a stream of copies, a stream of computation, events
between them. ``cuda_link`` is the real one; ``simulated_link`` has a set speed and a clock of its
own, so that everything else here is tested without a GPU. ``device_cache`` keeps records in slots,
``resident`` holds all of them when they fit, ``whole_layers`` moves whole layers (what offloading
does without an expert cache, to compare with). ``compute`` is the forward of an experts module, and
``hybrid`` decides which missing experts the CPU computes.
"""
