"""Cuts a LightningModule into pipeline stages; each process builds only its own."""
