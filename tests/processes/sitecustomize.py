"""Run by each Python that finds this folder in PYTHONPATH, before its program: makes ``socket://`` known to brokerkit."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
import brokerkit.drivers

sys.modules["brokerkit.drivers.socket"] = importlib.import_module("tests.processes.client")
brokerkit.drivers._SCHEMES["socket"] = brokerkit.drivers._Scheme("socket", "SocketDriver", remote=False)
