"""What every test needs."""

import os

# Small networks on shared processors: threads that wait for each other cost more than they bring. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
