"""Fine-tuning and the two stages of the paper, on transformers' Trainer and PEFT."""
