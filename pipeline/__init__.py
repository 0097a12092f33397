"""The pipeline of a run. What must hold before anything imports ray stands here."""

import os

# Any call of Ray's outside a session would start one, or join whatever cluster the machine has: a thread that asks for
# one more block while the job ends is enough. Ray reads this when it is imported.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
