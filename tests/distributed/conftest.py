from __future__ import annotations

from tests.distributed import world

world.start_server()
