"""The application that Flower and the `celery` command look through: `celery -A queues.monitor flower`."""

from __future__ import annotations

from lepton_ai.settings import Settings
from queues.app import make_app

__all__ = ["app"]

app = make_app(Settings.read())
