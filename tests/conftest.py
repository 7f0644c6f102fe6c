"""What all tests need: no network, no GPU, and the project's folders on the path."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: an unknown hub id fails at once
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read on import: the tests are the same with a GPU

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "experiments", ROOT / "bench", ROOT / "shapes", ROOT / "docs"):
    sys.path.insert(0, str(folder))
