"""No network, no shared cache and one thread, for this process and those that it starts."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
