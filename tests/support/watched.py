"""Load adapter folders in a process of their own that writes down what each load does, takes and costs.

``python -m tests.support.watched GOOD_FOLDER FOLDER ...`` prints one JSON object for each folder but the first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import molora
from tests.support import tiny

EVENTS = {
    "pickle.find_class", "exec", "compile", "import", "ctypes.dlopen", "open", "socket.connect",
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
}  # fmt: skip


class Watch:
    """An audit hook, which cannot be taken off again; it notes events while ``folder`` is set."""

    def __init__(self) -> None:
        self.folder, self.events = "", []
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """Keep everything that reading a file of the folder does not need."""
        if not self.folder or event not in EVENTS:
            return
        path = args[0] if args else None
        if event == "open" and (isinstance(path, int) or os.fsdecode(path).startswith(f"{self.folder}/")):
            return
        self.events.append(f"{event} {str(args)[:200]}")


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def load(base: Any, folder: str, watch: Watch) -> dict[str, Any]:
    """Load ``folder`` onto ``base`` and take it off again."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is used now
    before, start = memory("VmRSS"), time.thread_time()
    watch.events, watch.folder = [], folder
    try:
        molora.load(base, folder)
        said = "loaded"
    except molora.errors.AdapterError:
        said = "refused"
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    watch.folder = ""
    seconds, grown = time.thread_time() - start, memory("VmHWM") - before
    if said == "loaded":
        base.unload()
    return {"said": said, "events": watch.events, "seconds": seconds, "bytes": grown}


def main(good: str, *folders: str) -> None:
    """Load the good folder once, so that everything is imported; then each of the others, watched."""
    torch.set_num_threads(1)
    base = tiny.base_model("llama")
    molora.load(base, good).unload()
    watch = Watch()
    print(json.dumps([load(base, folder, watch) for folder in folders]))


if __name__ == "__main__":
    main(*sys.argv[1:])
