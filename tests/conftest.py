"""What every test shares: hypothesis draws the same cases each time, torch keeps to one thread a worker."""

import os
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: two workers share two cores
os.environ["STKIT_CACHE"] = tempfile.mkdtemp(prefix="stkit-frames-")  # never the frames of the machine's user

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and so would its children

from hypothesis import settings  # noqa: E402

settings.register_profile("stkit", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("stkit")
