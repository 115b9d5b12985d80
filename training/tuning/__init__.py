"""Fine-tuning: adapters, merging them, experts in few bits, TRL's trainer."""
