"""Fine-tuning and the two training stages of the paper, with transformers' Trainer and PEFT."""
