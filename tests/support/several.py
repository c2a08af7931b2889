"""Several commands one after the other in each process of one `accelerate launch`: what launching takes is paid once.

    accelerate launch ... -m tests.support.several COMMANDS

COMMANDS is a JSON file of their arguments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from neuron_methods.cli import main

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            main(arguments, prog_name="mergekit-neuron")
        except SystemExit as ended:
            sys.stdout.write(f"ended: {ended.code}\n")  # in one piece, as others write there
            sys.stdout.flush()
