"""Where things are: the project's own files, and the data sets beside the checkout that some tests read."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("RWKV_ES_DATA", ROOT.parent / "shared" / "data"))
