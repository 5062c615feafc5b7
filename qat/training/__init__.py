"""Training: the LightningModule, its schedule, its optimizer and its callbacks."""
