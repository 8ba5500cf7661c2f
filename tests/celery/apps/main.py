"""What workers are started with: ``celery -A tests.celery.apps.main worker``."""

from __future__ import annotations

import os
import sys

import msgspec

from ..journal import Journal, watch
from .jobs import VARIABLE, Settings, build

# kio imports it wherever it is installed, which takes longer than all else; users have it not.
sys.modules.setdefault("hypothesis", None)  # type: ignore[arg-type]
settings = msgspec.json.decode(os.environ[VARIABLE], type=Settings)
watch(Journal(settings.folder))
app = build(settings)
app.set_default()
