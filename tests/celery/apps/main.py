"""What workers are started with: ``celery -A tests.celery.apps.main worker``."""

from __future__ import annotations

import os

import msgspec

from ..journal import Journal, watch
from .jobs import VARIABLE, Settings, build

settings = msgspec.json.decode(os.environ[VARIABLE], type=Settings)
watch(Journal(settings.folder))
app = build(settings)
app.set_default()
