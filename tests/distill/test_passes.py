"""What waiting passes leave behind. How they fit is tested with the fits that use them."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperfade.distill.passes import trim


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere malloc keeps nothing that could be given back so")
def test_what_threads_have_freed_goes_back_to_the_system() -> None:
    kept: list[Tensor] = []

    def allocate_and_free() -> None:
        blocks = [torch.ones(16_000) for _ in range(1000)]  # 64 KB each: from the thread's arena
        kept.append(blocks[-1])  # at the end of it, so that nothing goes back by itself

    thread = threading.Thread(target=allocate_and_free)
    trim()
    before = _resident_bytes()
    thread.start()
    thread.join()
    left = _resident_bytes() - before
    trim()
    gone = left - (_resident_bytes() - before)
    assert left > 50e6  # observed 66 MB
    assert gone > 50e6  # observed 64 MB
    assert kept[0].sum() == 16_000
