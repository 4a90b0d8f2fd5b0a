"""Processes for chat templates that all tests of this process share."""

import atexit
from typing import Final

from quire.cluster.gateway.template_processes import TemplateProcesses

TEMPLATES: Final = TemplateProcesses()
atexit.register(TEMPLATES.close)
