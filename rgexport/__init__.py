"""Export RecurrentGemma (Griffin) checkpoints to files that small devices run."""

import os

__version__ = "0.1.0"

# Before anything that reads them is imported: ONNX Runtime's wheels from 1.29 on would keep a
# device id and a database of events to send in the user's home.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
