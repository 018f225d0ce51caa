"""From a LightningModule to a running pipeline.

``stages`` cuts a module, ``schedule`` orders the work, ``engine`` does it, or ``virtual`` for a whole mesh in this process,
``messages`` carries signals between stages, ``recovery`` judges them, ``exchange`` tells all ranks, ``steps`` and ``logs`` run the
user's own code.
"""
