"""From a LightningModule to a running pipeline.

``layers`` finds the layers, ``partition`` cuts them into stages, ``schedule`` orders the work, ``engine`` does it, ``transport``
carries signals between stages, ``guard`` verifies them, ``exchange`` tells all ranks, ``steps`` and ``logs`` run the user's own
code.
"""
