"""Fine-tuning: what a LoRA adapter targets, and adapters that load whole or not at all."""
