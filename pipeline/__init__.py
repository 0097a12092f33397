"""The pipeline of a run. Importing it configures Ray, which reads its environment when it is imported."""

from __future__ import annotations

import os

# Outside a session, any call to Ray would start one or join a cluster of the machine, even the call of a thread that
# requests one more block while the job ends.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
