"""The pipeline of a run, and the version of the project. Settings that must precede any import of ray are here."""

import os

__version__ = "0.1.0"

# Any call of Ray's outside a session would start one, or join whatever cluster the machine has: a thread that asks for
# one more block while the job ends is enough. Ray reads this when it is imported.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
