"""A LightningModule cut into stages, of which a process builds its own."""
