"""One thread for what tests compute: it is small, and threads that wait for each other on busy cores cost more than they save."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
