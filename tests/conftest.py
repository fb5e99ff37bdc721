"""Read by pytest before any test is imported."""

import os
import signal
import sys

import hypothesis

# The oracle's models are tiny: threads of torch would only wait for each other, and for the processor.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes, or is looked for, says how busy the machine is. Whether a change may land does
# not hang on what is drawn: --hypothesis-seed=N draws others.
hypothesis.settings.register_profile(
    "mer",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=not any(each.startswith("--hypothesis-seed") for each in sys.argv),
)
hypothesis.settings.load_profile("mer")

# A shell has told what it runs in the background to ignore it, and so would the children of these tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--write-models", action="store_true", help="write docs/models.md (see tests/oracle/evidence.py)"
    )
