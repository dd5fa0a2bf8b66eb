import subprocess
import sys
from types import SimpleNamespace

import psutil
import torch

from iet_sd.engine import usage
from tests.launching import ROOT


def test_the_peak_is_what_a_large_tensor_needs_and_stays():
    before = usage.peak_memory(torch.device("cpu"))
    size = 2**28
    tensor = torch.ones(size, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss
    del tensor
    after = usage.peak_memory(torch.device("cpu"))
    assert after >= max(before, size)
    assert after >= 0.9 * resident


def test_windows_has_another_way(monkeypatch):
    monkeypatch.setattr(usage.sys, "platform", "win32")
    info = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: info)
    assert usage.peak_memory(torch.device("cpu")) == 123


def test_it_does_without_the_module_that_windows_lacks():
    text = "import sys, torch; sys.modules['resource'] = None; import iet_sd.engine.usage"
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True)
