"""An early child that waits for an owner and then for a file, and ends with a code; started by the tests of common/early_child.py."""

import sys
import time
from pathlib import Path

from quire.common.child_process import enter_child
from quire.common.early_child import EarlyChild

if __name__ == "__main__":
    spec = enter_child()
    early = EarlyChild(Path(spec["early_path"]), objection=lambda late: "" if late["kind"] == spec["kind"] else f"it is a {spec['kind']}")
    print("began as", spec["name"], flush=True)
    order = early.wait()
    print("is", order["name"], flush=True)
    while not Path(order["until"]).exists():
        time.sleep(0.02)
    sys.exit(order["code"])
