"""The page of mergekit-neuron as a Space of the Hub."""

import os
from pathlib import Path

from neuron_methods.cli import main

# What is chosen, merged and kept lies here, and nothing else is read; a Space with a disk of its own has it at /data.
root = Path("/data" if os.access("/data", os.W_OK) else "merges").resolve()
root.mkdir(exist_ok=True)
port = os.environ.get("GRADIO_SERVER_PORT", "7860")
main(["ui", "--host", "0.0.0.0", "--port", port, "--root", str(root), "--no-browser"])
