"""Training: data in the formats of the field, and batches of them."""
