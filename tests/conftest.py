"""Read by pytest before any test is imported."""

import os

# The oracle's models are tiny: threads of torch would only wait for each other, and for the processor.
os.environ.setdefault("OMP_NUM_THREADS", "1")
