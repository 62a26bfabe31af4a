"""One measurement of llama.cpp for ``memory.py``, in a process of its own: prints one JSON object.

Its fair case: the file mapped, weights not repacked (a repacked copy would not fit), no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import llama_cpp


def disk_nbytes() -> int:
    """Bytes that this process has had read from disks, page faults included."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.M)
    return int(found.group(1)) if found else 0


def main() -> None:
    """Command line; the token ids come as JSON, the same that moepack gets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--ids", required=True, help="JSON list of token ids")
    parser.add_argument("--warm", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ids = json.loads(options.ids)
    silence = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive its use
    llama_cpp.llama_log_set(silence, None)
    llama_cpp.llama_backend_init()
    how = llama_cpp.llama_model_default_params()
    how.n_gpu_layers, how.use_extra_bufts = 0, False
    how.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    model = llama_cpp.llama_model_load_from_file(options.model.encode(), how)
    context_how = llama_cpp.llama_context_default_params()
    context_how.n_ctx, context_how.n_batch, context_how.n_ubatch = 512, 32, 32
    context_how.n_threads = context_how.n_threads_batch = options.threads
    context = llama_cpp.llama_init_from_model(model, context_how)
    if not context:
        raise SystemExit("llama.cpp could not load the model")
    seconds, before = 0.0, 0
    for i, token in enumerate(ids):
        if i == options.warm:
            seconds, before = 0.0, disk_nbytes()
        start = time.perf_counter()
        one = (llama_cpp.llama_token * 1)(token)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(one, 1)):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_get_logits(context)  # waits for the result
        seconds += time.perf_counter() - start
    count = len(ids) - options.warm
    print(
        json.dumps(
            {
                "tokens_per_s": count / seconds,
                "read_per_token": (disk_nbytes() - before) / count,
                "version": llama_cpp.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
