"""Part E: every pooling trained with every optimiser."""
