"""Holds for every test and every process that a test starts: idle threads sleep.

Threads of a parallel region otherwise spin while they wait for each other; where tests, servers and ranks share a few
cores, that slows a step of a small model twentyfold.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
