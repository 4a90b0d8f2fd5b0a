"""A child process that sleeps; started by the tests of common/child_process.py."""

import time

from quire.common.child_process import enter_child

if __name__ == "__main__":
    spec = enter_child()
    print("sleeping for", spec["seconds"], flush=True)
    time.sleep(spec["seconds"])
